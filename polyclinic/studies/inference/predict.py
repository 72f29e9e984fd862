"""Application of a trained model to new images or rows of a table: a file of masks, a reconstructed image, or a row of
predictions, for each.

The output folder contains ``predictions.csv``; ``prediction.json``, which says by which model and how;
``labels.json``, the names of the labels of masks; and ``cases.jsonl``, a line for each finished image, from which an
interrupted prediction resumes.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic import __version__
from polyclinic.core import atomic
from polyclinic.data.formats.dicom.file import looks_like_dicom
from polyclinic.data.formats.dicom.segment_writer import Maker, require_writer
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.errors import ConfigError, PolyclinicError
from polyclinic.studies.inference.image_files import write_map, write_mask, write_segments
from polyclinic.studies.inference.predictor import Prediction, Predictor
from polyclinic.studies.inference.reading import Case, Reading, cases_at, pictures
from polyclinic.studies.inference.reconstruction import Acquisition, scores, write_image
from polyclinic.studies.inference.table_reading import TableReading

ABOUT, LINES, TABLE, LABELS = "prediction.json", "cases.jsonl", "predictions.csv", "labels.json"


@dataclass(frozen=True)
class Outputs:
    """What is written with masks and the table.

    Attributes:
        probabilities: Whether to write the probabilities of all classes for each voxel.
        uncertainty: Whether to write the entropy for each voxel, and with several models or copies their disagreement.
        dicom: Whether to write masks as DICOM segmentations; all images must then be DICOM.
    """

    probabilities: bool = False
    uncertainty: bool = False
    dicom: bool = False


@dataclass(frozen=True)
class Predicted:
    """The result for one image.

    Attributes:
        id: Its name.
        row: Its row of the table; empty if it was not predicted.
        files: The files that were written.
        problem: The reason why it was not predicted; empty if it was.
        resumed: Whether an earlier prediction of the same image was kept.
    """

    id: str
    row: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    problem: str = ""
    resumed: bool = False


class Work:
    """The prediction of all images at a place into a folder.

    Args:
        predictor: The model and how it is applied.
        place: A file, a ``.npz`` archive or a folder of images; or a table.
        out: The output folder. It may contain an earlier prediction by the same model in the same way.
        outputs: What is written.
        fresh: Whether to repeat what an earlier prediction in ``out`` has done.
        references: Place of the complete images, under the names of the undersampled ones, for the scores of
            reconstructions.
        undersample: The site whose columns of k-space are left out of complete images before their reconstruction.

    Raises:
        ConfigError: If there are no images, or ``out`` contains something else.
    """

    def __init__(
        self,
        predictor: Predictor,
        place: Path,
        out: Path,
        outputs: Outputs = Outputs(),
        fresh: bool = False,
        references: Path | None = None,
        undersample: str = "",
    ) -> None:
        self.predictor, self.out, self.outputs = predictor, out, outputs
        if predictor.kind != "reconstruction" and (references is not None or undersample):
            raise ConfigError(
                f"--reference and --undersample are for reconstructions, and the model predicts {predictor.kind}"
            )
        if (outputs.probabilities or outputs.uncertainty) and predictor.kind != "segmentation":
            raise ConfigError(
                f"--probabilities and --uncertainty write maps of masks; the table has them for {predictor.kind} anyway"
            )
        if outputs.dicom:
            if predictor.kind != "segmentation":
                raise ConfigError(f"--dicom-seg writes masks, and the model predicts {predictor.kind}")
            require_writer()
        _require_apart(place, out)
        reading = predictor.model.reading
        self.cases = reading.cases(place) if isinstance(reading, TableReading) else cases_at(place, reading)
        self.acquisition = Acquisition({})
        if predictor.kind == "reconstruction":
            self.acquisition = Acquisition.of(predictor.model, references, undersample)
            if self.acquisition.references and not any(case.id in self.acquisition.references for case in self.cases):
                raise ConfigError(f"--reference {references}: no image there has the name of one in {place}")
        self.about = self._about()
        self.done = self._earlier(fresh)

    def __len__(self) -> int:
        return len(self.cases)

    def run(self) -> Iterator[Predicted]:
        """Predict image by image, and write the table at the end."""
        self.out.mkdir(parents=True, exist_ok=True)
        atomic.write_json(self.out / ABOUT, self.about)
        if self.predictor.kind == "segmentation":
            names = {str(i): name for i, name in enumerate(self.predictor.model.classes)}
            atomic.write_json(self.out / LABELS, names)
        found = list[Predicted]()
        with open(self.out / LINES, "a", encoding="utf-8") as lines:
            waiting = []
            for case in self.cases:
                if (kept := self._kept(case)) is not None:
                    found.append(kept)
                    yield kept
                else:
                    waiting.append(case)
            reading = self.predictor.model.reading
            for case, picture in (
                reading.rows(waiting) if isinstance(reading, TableReading) else pictures(waiting, reading)
            ):
                result = self._one(case, picture)
                if not result.problem:
                    line = {
                        "id": case.id,
                        "content": self.acquisition.content(case),
                        "row": dict(result.row),
                        "files": result.files,
                    }
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()
                found.append(result)
                yield result
        order = {case.id: i for i, case in enumerate(self.cases)}
        rows = [dict(p.row) for p in sorted(found, key=lambda p: order[p.id]) if p.row]
        if rows:
            atomic.write(self.out / TABLE, _csv(rows))

    def _one(self, case: Case, picture: Picture | str) -> Predicted:
        if isinstance(picture, str):
            return Predicted(case.id, problem=picture)
        if self.outputs.dicom and (len(case.files) > 1 or not _is_dicom(case.files[0])):
            return Predicted(case.id, problem=f"{case.files[0].name}: is no DICOM image: leave --dicom-seg out")
        row: dict[str, Any] = {"id": case.id, "file": case.files[0].name}
        try:
            if self.predictor.kind == "reconstruction":
                return self._image(case, picture, row)
            prediction = self.predictor(picture.pixels)
            if self.predictor.kind == "segmentation":
                assert picture.geometry is not None
                return self._mask(case, prediction, picture.geometry, row)
        except Unreadable as error:  # names the file
            return Predicted(case.id, problem=str(error))
        except PolyclinicError as error:
            return Predicted(case.id, problem=f"{case.files[0].name}: {error}")
        return Predicted(case.id, row | self._values(prediction))

    def _image(self, case: Case, picture: Picture, row: dict[str, Any]) -> Predicted:
        """Reconstruct an image, score it if its complete image is known, and write it."""
        reading = self.predictor.model.reading
        assert isinstance(reading, Reading)
        assert picture.geometry is not None
        given = self.acquisition.acquired(picture.pixels)
        truth = self.acquisition.reference(case, picture.pixels, reading)
        image = self.predictor(given).scores
        row["image"] = write_image(self.out, case, image, picture.geometry, reading)
        return Predicted(case.id, row | scores(image, given, truth), (row["image"],))

    def _mask(self, case: Case, prediction: Prediction, geometry: Geometry, row: dict[str, Any]) -> Predicted:
        labels = geometry.labels(prediction.scores, self.predictor.labels)
        files = [self._written(case, labels, geometry)]
        row["mask"] = files[0]
        sides = geometry.original_mm
        for k, name in list(enumerate(self.predictor.model.classes))[1:]:
            count = int((labels == k).sum())
            row[f"pixels_{name}"] = count
            if sides is not None and len(sides) == 3:
                row[f"ml_{name}"] = count * math.prod(sides) / 1000
        outside = prediction.scores.new_zeros(len(prediction.scores))
        outside[0] = 0.0 if self.predictor.regions else 1.0  # of the background
        maps = {"entropy": prediction.entropy, "disagreement": prediction.disagreement}
        for what, values in maps.items():
            if values is None:
                continue
            whole = geometry.to_original(values[None], values.new_zeros(1))[0]
            inside = labels > 0
            row[f"{what}_in_object"] = float(whole[inside].mean()) if bool(inside.any()) else None
            if self.outputs.uncertainty:
                files.append(write_map(self.out, case, what, whole, geometry))
        if self.outputs.probabilities:
            shares = geometry.to_original(prediction.probabilities, outside)
            files.append(write_map(self.out, case, "probabilities", shares, geometry))
        return Predicted(case.id, row, tuple(files))

    def _written(self, case: Case, labels: Tensor, geometry: Geometry) -> str:
        """Write the mask of an image and return the name of the file."""
        if not self.outputs.dicom:
            return write_mask(self.out, case, labels, geometry)
        model = self.predictor.model
        assert isinstance(model.reading, Reading)
        identity = hashlib.sha256(json.dumps(self.about["model"], sort_keys=True).encode()).hexdigest()
        maker = Maker(model.method, __version__, identity)
        return write_segments(self.out, case, labels, geometry, model.classes[1:], maker, model.reading.options)

    def _values(self, prediction: Prediction) -> dict[str, Any]:
        """Return the columns of one image: its class and probabilities, or its values."""
        values: list[float] = prediction.probabilities.tolist()
        if self.predictor.kind == "regression":
            return {"value" if len(values) == 1 else f"value_{i}": value for i, value in enumerate(values)}
        if self.predictor.kind == "survival":
            cuts = self.predictor.model.plan.task["cuts"]
            times = [f"survival_{time:g}" for time in cuts] if len(cuts) == len(values) else ["longer_survival"]
            return dict(zip(times, values, strict=True))
        names = self.predictor.model.classes
        named: dict[str, Any] = dict(zip((f"p_{name}" for name in names), values, strict=True))
        if self.predictor.kind == "classification":
            named = {"class": names[max(range(len(values)), key=values.__getitem__)], **named}
        assert prediction.entropy is not None
        named["entropy"] = float(prediction.entropy)
        return named if prediction.disagreement is None else named | {"disagreement": float(prediction.disagreement)}

    def _about(self) -> dict[str, Any]:
        how = {"tta": list(self.predictor.mirror), "window": self.predictor.window and list(self.predictor.window)}
        outputs = {"probabilities": self.outputs.probabilities, "uncertainty": self.outputs.uncertainty}
        outputs["dicom"] = self.outputs.dicom
        model = json.loads(json.dumps(self.predictor.model.identity))
        if self.predictor.kind == "reconstruction":
            outputs |= self.acquisition.table
        return {"polyclinic": __version__, "kind": self.predictor.kind, "model": model, **how, **outputs}

    def _earlier(self, fresh: bool) -> dict[str, dict[str, Any]]:
        """Return the finished images of an earlier prediction in the folder, by name."""
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out}: name a folder for --out")
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return {}
        if not (self.out / ABOUT).is_file():
            raise ConfigError(f"{self.out}: contains files of something else. Name an empty or new folder with --out")
        try:
            before = json.loads((self.out / ABOUT).read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if fresh or before == self.about:
            if fresh:
                (self.out / LINES).unlink(missing_ok=True)
            return {} if fresh else _lines(self.out / LINES)
        changed = [k for k in self.about if not isinstance(before, dict) or before.get(k) != self.about[k]]
        raise ConfigError(
            f"{self.out}: contains predictions that were made in another way ({', '.join(changed)} differ): name "
            "another folder with --out, or repeat them with --fresh"
        )

    def _kept(self, case: Case) -> Predicted | None:
        line = self.done.get(case.id)
        if line is None or not all((self.out / name).is_file() for name in line["files"]):
            return None
        return Predicted(case.id, line["row"], tuple(line["files"]), resumed=True) if self._same(case, line) else None

    def _same(self, case: Case, line: Mapping[str, Any]) -> bool:
        try:
            return bool(self.acquisition.content(case) == line["content"])
        except OSError:
            return False


def _is_dicom(place: Path) -> bool:
    """Return whether a file, or the first file of a folder that is read as a series, is DICOM."""
    return place.is_dir() or looks_like_dicom(place)


def _lines(file: Path) -> dict[str, dict[str, Any]]:
    """Return the valid lines of ``cases.jsonl`` by image; an incomplete last line is ignored."""
    found: dict[str, dict[str, Any]] = {}
    if not file.is_file():
        return found
    text = file.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"id", "content", "row", "files"} <= value.keys():
            found[value["id"]] = value
    if text and not text.endswith("\n"):
        atomic.write(file, "".join(json.dumps(value) + "\n" for value in found.values()))
    return found


def _require_apart(place: Path, out: Path) -> None:
    """Require that no prediction is written among the images."""
    inside = place if place.is_dir() else place.parent
    if out.resolve() == inside.resolve():
        raise ConfigError(f"--out {out}: is the folder of the images; name another one")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
