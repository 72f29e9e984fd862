"""``polyclinic predict``: application of a trained model to new images."""

import sys
from pathlib import Path

from polyclinic.cli.rendering import Json, document, done, line, progress


def predict(
    model: Path,
    images: Path,
    *,
    out: Path,
    method: str = "",
    seed: list[int] | None = None,
    fold: list[int] | None = None,
    site: str = "",
    tta: bool = False,
    window: list[int] | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    device: str = "cpu",
    fresh: bool = False,
    json_: Json = False,
) -> None:
    """Apply the model of a run to new images: masks in the geometry of each image, or a table of probabilities.

    The images are read and prepared as the study says. Models of several seeds and folds are averaged. An interrupted
    prediction continues when the command is repeated. Exit code 1 if an image cannot be predicted; the others are.

    Args:
        model: A finished run, or a bundle of `polyclinic export`.
        images: An image, a `.npz` archive, a folder of images, or a folder of folders of DICOM series.
        out: Folder for the masks and `predictions.csv`.
        method: The method whose model is used; by default the main method of the report.
        seed: The seeds whose models are averaged; all by default.
        fold: The folds whose models are averaged; all by default.
        site: The site whose own model is used, for personalized methods.
        tta: Average mirrored copies, along the axes that training mirrored.
        window: Size of the sliding windows for masks, one number for each axis (z y x); by default the study's.
        probabilities: Also write the probability of each class for each voxel.
        uncertainty: Also write the entropy for each voxel and, with several models, their disagreement.
        device: The device of PyTorch, such as `cuda:0`.
        fresh: Repeat what an earlier prediction in the folder has done.
    """
    from polyclinic.studies.inference.models import trained_model
    from polyclinic.studies.inference.predict import Outputs, Work
    from polyclinic.studies.inference.predictor import Predictor, require_window, tta_axes

    with document(json_) as emit:
        trained = trained_model(model, method, seed or (), fold or (), site)
        size = tuple(window) if window else None
        require_window(size, trained)
        predictor = Predictor(trained, tta_axes(trained) if tta else (), device, size)
        work = Work(predictor, images, out, Outputs(probabilities, uncertainty), fresh)
        members = ", ".join(member.name for member in trained.members)
        results = []
        with progress.status("") as status:
            for result in work.run():
                results.append(result)
                status.update(f"{len(results)} of {len(work)} images")
                if result.problem:
                    line(f"  not predicted: {result.problem}")
        failed = [result for result in results if result.problem]
        kept = sum(result.resumed for result in results)
        done(
            f"{out}: {len(results) - len(failed)} of {len(work)} images by {members}"
            + (f" ({kept} from an earlier prediction)" if kept else "")
        )
        emit(
            {
                "out": out,
                "models": [member.name for member in trained.members],
                "images": [{"id": r.id, "files": r.files, "problem": r.problem or None, **r.row} for r in results],
            }
        )
    if failed:
        sys.exit(1)
