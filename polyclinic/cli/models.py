"""``polyclinic predict`` and ``evaluate``: application of a trained model to new data."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polyclinic.cli.panel_table import number
from polyclinic.cli.rendering import Json, document, done, line, progress
from polyclinic.cli.run import Set, changes


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
    dicom_seg: bool = False,
    reference: Path | None = None,
    undersample: str = "",
    device: str = "cpu",
    fresh: bool = False,
    json_: Json = False,
) -> None:
    """Apply the model of a run to new images: masks or reconstructions in the geometry of each image, or a table of
    probabilities.

    The images are read and prepared as the study says. Models of several seeds and folds are averaged. An interrupted
    prediction continues when the command is repeated. Exit code 1 if an image cannot be predicted; the others are.

    Args:
        model: A finished run, or a bundle of `polyclinic export`.
        images: An image, a `.npz` archive, a folder of images, or a folder of folders of DICOM series.
        out: Folder for the masks or reconstructed images and `predictions.csv`.
        method: The method whose model is used; by default the main method of the report.
        seed: The seeds whose models are averaged; all by default.
        fold: The folds whose models are averaged; all by default.
        site: The site whose own model is used, for personalized methods.
        tta: Average mirrored copies, along the axes that training mirrored.
        window: Size of the sliding windows for masks, one number for each axis (z y x); by default the study's.
        probabilities: Also write the probability of each class for each voxel.
        uncertainty: Also write the entropy for each voxel and, with several models, their disagreement.
        dicom_seg: Write the masks of DICOM images as DICOM segmentations (SEG), `CASE.dcm`. Needs the extra dicom-seg.
        reference: For reconstructions, a folder of the complete images under the same names: the table then has PSNR,
            SSIM and NMSE.
        undersample: For reconstructions of complete images: leave out the columns of k-space that the study left out at
            this site first.
        device: The device of PyTorch, such as `cuda:0`; `auto` for a GPU if there is one.
        fresh: Repeat what an earlier prediction in the folder has done.
    """
    from polyclinic.engines.devices import chosen_device
    from polyclinic.studies.inference.models import trained_model
    from polyclinic.studies.inference.predict import Outputs, Work
    from polyclinic.studies.inference.predictor import Predictor, require_window, tta_axes

    with document(json_) as emit:
        device = chosen_device(device)
        trained = trained_model(model, method, seed or (), fold or (), site)
        size = tuple(window) if window else None
        require_window(size, trained)
        predictor = Predictor(trained, tta_axes(trained) if tta else (), device, size)
        work = Work(
            predictor, images, out, Outputs(probabilities, uncertainty, dicom_seg), fresh, reference, undersample
        )
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


def evaluate(
    model: Path,
    study: Path,
    *,
    against: Path | None = None,
    out: Path | None = None,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    set_: Set = None,
    method: str = "",
    against_method: str = "",
    seed: list[int] | None = None,
    json_: Json = False,
) -> None:
    """Evaluate a trained model, which stays as it is, on the test data of a study at each of its sites.

    Scores and intervals are computed as at the end of a run. With --against, two models are compared, paired by
    patient (DeLong's test for AUCs).

    Args:
        model: A finished run, or a bundle of `polyclinic export`.
        study: A study file. Its `[data]` is used; task and steps are the model's if it does not set them.
        against: A second model, to which the first is compared.
        out: Folder for the scores and the predictions of every image.
        all_: Use all examples, not only the study's test data.
        set_: Change one value of the study, such as `--set data.path=/data/new`.
        method: The method whose model is evaluated; by default the main method of the report.
        against_method: The same for the second model.
        seed: The seeds whose models are evaluated; all by default.
    """
    from polyclinic.report.formatting import with_interval
    from polyclinic.studies.config.loader import text_of
    from polyclinic.studies.inference.frozen_evaluation import evaluate_frozen, study_for, summary, write_result
    from polyclinic.studies.inference.models import trained_model

    with document(json_) as emit:
        text, given = text_of(study), changes(set_ or [])
        models = [trained_model(model, method, seed or ())]
        if against is not None:
            models.insert(0, trained_model(against, against_method, seed or ()))
        result = evaluate_frozen(models, study_for(models[-1], text, study, given), all_)
        table = summary(result)
        label = result.evaluation.metric.label
        line(f"  {label} on {'all' if all_ else 'the test'} data (95 % confidence interval)")
        for found in result.evaluation.methods:
            for site, estimates in found.sites.items():
                shown = with_interval(estimates[result.evaluation.metric.name])
                line(f"    {found.label:<28} {site:<24} {shown}")
            if found.macro.value is not None and len(found.sites) > 1:
                line(f"    {found.label:<28} {'mean over sites':<24} {with_interval(found.macro)}")
        for row in table["comparisons"]:
            line(f"  {row['model']} against {row['reference']}: {number(row['difference'])}, {row['verdict']}")
        for note in result.notes:
            line(f"  {note}")
        if out is not None:
            done(str(write_result(result, models, out)))
        emit(table)
