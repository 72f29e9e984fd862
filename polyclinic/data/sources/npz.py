"""NumPy archives: those of MedMNIST (``train_images``, ``train_labels``, ...), and plain ones with ``images``.

MedMNIST: Yang et al., Scientific Data 10:41 (2023), https://doi.org/10.1038/s41597-022-01721-8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.collection import UNKNOWN_PATIENTS, described
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.files import check_pattern, content_of, patients_in, placed
from polyclinic.data.formats.column_roles import NONE, column_of
from polyclinic.data.formats.mask_labels import WHITE, black_and_white, label_problems
from polyclinic.data.formats.safe_reading import LIMITS, Unreadable, read_npz
from polyclinic.data.preprocessing.pipeline_config import Steps, apply, fingerprint
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import Relabel
from polyclinic.data.source import HIDDEN, Info, Table, Task, digest

SPLITS = ("train", "val", "test")
COLORS = (1, 3, 4)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Npz:
    """Images in a NumPy archive, with classes, labels, numbers or masks.

    Attributes:
        path: The ``.npz`` file.
        images: The name of the array of images [n, (z,) y, x] or [n, (z,) y, x, colors]; MedMNIST's are detected.
        target: The name of the array of labels or masks; ``labels`` or ``masks`` are detected.
        patient: The name of the array that identifies the patient of each image; if empty, the first with a usual name
            (``patient_id``, ``subject``, ...); ``"none"`` for no array.
        patient_pattern: A regular expression with one group that matches the patient in an image's name.
        sites: The names of arrays that can name a site, the natural one first; if empty, the first array with
            a usual name (``site``, ``hospital``, ``center``, ``scanner``, ...).
        classes: Names of the classes, in order; an array ``label_names`` is used if there is one.
        regression: Whether the labels are numbers rather than classes.
        steps: Preprocessing.
        gigabytes: Limit on the size of the decoded arrays.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    images: str = "images"
    target: str = ""
    patient: str = ""
    patient_pattern: str = ""
    sites: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    regression: bool = False
    steps: Steps = ()
    gigabytes: float = 4.0
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        if problems := check_pattern("patient_pattern", self.patient_pattern):
            raise DataError(problems)

    @cached_property
    def info(self) -> Info:
        """Description of the data set, as far as the file or the catalog states it."""
        arrays = self._arrays
        notes = () if self._patient or self.patient_pattern else (UNKNOWN_PATIENTS,)
        targets = arrays["target"]
        task: Task = "segmentation" if self._masks else "classification"
        if not self._masks:
            task = "regression" if self.regression else "multilabel" if targets.ndim == 2 else "classification"
        names = self.classes or tuple(str(name) for name in arrays.get("label_names", ()))
        if not names and task != "regression":
            count = targets.shape[1] if task == "multilabel" else int(targets.max()) + 1
            names = tuple(f"{'label' if task == 'multilabel' else 'class'} {i}" for i in range(count))
        stem = Path(self.path).stem
        return described(self.about, Info(stem, stem, "not stated", "not stated", task, names), notes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file's bytes and of the options."""
        options = (self.images, self.target, self.patient, self.patient_pattern, self.sites, self.regression)
        return digest("npz", 2, content_of(placed(self.path)), options, fingerprint(self.steps))

    def table(self) -> Table:
        """Return one row per image, in the file's order. MedMNIST's own split is the column ``split``."""
        return self._table

    @cached_property
    def _table(self) -> Table:
        arrays = self._arrays
        ids = arrays["ids"]
        columns = self._columns
        natural = column_of(columns, "site", "", [])
        sites = self.sites or ((natural,) if natural else ())
        named = (*self.sites, *([self.patient] if self.patient not in ("", NONE) else []))
        if missing := [name for name in named if name not in columns]:
            raise DataError(
                f"{Path(self.path).name} has no array {missing[0]!r} with one entry per image. "
                f"There are {', '.join(columns) or 'none'}"
            )
        patients = columns[self._patient] if self._patient else patients_in(tuple(ids), self.patient_pattern)
        targets = arrays["target"]
        labels = None if self._masks else targets.astype(np.int64 if self._whole(targets) else np.float32)
        return Table(tuple(ids), patients, labels, columns, sites)

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named images: uint8 as stored, or float32 if steps are declared or the file contains floats."""
        arrays, table = self._arrays, self._table
        rows = table.rows(ids)
        images = _channels_first(arrays["images"], self._masks and arrays["target"].ndim)
        targets = torch.from_numpy(arrays["target"][rows])
        inputs = torch.from_numpy(images[rows])
        if self._masks:
            targets = targets.to(torch.uint8) if int(targets.max()) < 256 else targets.long()
        elif self._whole(arrays["target"]):
            targets = targets.long()
        else:
            targets = targets.float()
        if self.steps or inputs.dtype != torch.uint8:
            inputs, targets = self._prepared(inputs, targets)
        return Examples(inputs.contiguous(), targets, tuple(table.patients[i] for i in rows.tolist()), tuple(ids))

    def release(self) -> None:
        """Free the arrays. The description and the table remain; ``examples`` reads the archive again."""
        _ = self.info, self._table
        for name in ("_arrays", "fingerprint"):
            vars(self).pop(name, None)  # how a cached property is cleared

    def _prepared(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = 255.0 if inputs.dtype == torch.uint8 else 1.0
        pictures = [
            apply(self.steps, Picture(x.float() / scale, targets[i].long() if self._masks else None))
            for i, x in enumerate(inputs)
        ]
        if not pictures:
            return inputs.float(), targets
        sizes = {p.size for p in pictures}
        if len(sizes) > 1:
            raise DataError(f"after the steps images have {len(sizes)} different sizes: end with crop_pad or resize")
        masks = [p.mask for p in pictures if p.mask is not None]
        return torch.stack([p.pixels for p in pictures]), torch.stack(masks).to(torch.uint8) if masks else targets

    def _whole(self, targets: Array) -> bool:
        return targets.ndim == 1 and not self.regression

    @cached_property
    def _columns(self) -> dict[str, tuple[str, ...]]:
        """The arrays with one entry per image other than targets and ids, as text."""
        arrays = self._arrays
        own = {"images", "target", "ids", self.images, self.target, "labels", "masks"}
        return {
            name: tuple(str(v) for v in values)
            for name, values in arrays.items()
            if name not in own and values.shape == (len(arrays["images"]),)
        }

    @property
    def _patient(self) -> str:
        """The array of patients; "" if there is none, or if the patient follows from the name."""
        found = column_of(self._columns, "patient", self.patient, [])
        return "" if not self.patient and self.patient_pattern else found

    @property
    def _masks(self) -> bool:
        return bool(self._arrays["target"].ndim > 2)

    @cached_property
    def _arrays(self) -> Mapping[str, Array]:
        """The file's arrays: ``images``, ``target``, ``ids`` and all others with one entry per image."""
        path = placed(self.path)
        try:
            raw = read_npz(path, replace(LIMITS, decoded_bytes=int(self.gigabytes * 2**30)))
        except Unreadable as error:
            raise DataError(str(error)) from None
        if found := [s for s in SPLITS if f"{s}_images" in raw]:
            return self._medmnist(path, raw, found)
        target = self.target or next((name for name in ("labels", "masks") if name in raw), "")
        if self.images not in raw or target not in raw:
            raise DataError(
                f"{path.name} holds {', '.join(raw) or 'nothing'}: name its arrays with images = ... and target = ..., "
                "or lay it out as MedMNIST does (train_images, train_labels, ...)"
            )
        n = len(raw[self.images])
        names = next((raw[k] for k in ("name", "names", "id", "ids") if k in raw and raw[k].shape == (n,)), None)
        ids = np.array([f"{i:06d}" for i in range(n)] if names is None else names.astype(str))
        if len(set(ids)) < n:
            ids = np.array([f"{i:06d} {name}" for i, name in enumerate(ids)])
        return self._checked(path, {**raw, "images": raw[self.images], "target": raw[target], "ids": ids})

    def _medmnist(self, path: Path, raw: Mapping[str, Array], found: Sequence[str]) -> Mapping[str, Array]:
        if missing := [f"{s}_labels" for s in found if f"{s}_labels" not in raw]:
            raise DataError(f"{path.name} has images but no {missing[0]}")
        sizes = [len(raw[f"{s}_images"]) for s in found]
        if len({(raw[f"{s}_images"].shape[1:], raw[f"{s}_labels"].shape[1:]) for s in found}) > 1:
            raise DataError(f"{path.name}: images or labels have different shapes in {' and '.join(found)}")
        split = np.repeat(found, sizes)
        return self._checked(
            path,
            {
                "images": np.concatenate([raw[f"{s}_images"] for s in found]),
                "target": np.concatenate([raw[f"{s}_labels"] for s in found]),
                "ids": np.array([f"{s}-{i:06d}" for s, size in zip(found, sizes, strict=True) for i in range(size)]),
                "split": split,
            },
        )

    def _checked(self, path: Path, arrays: dict[str, Array]) -> Mapping[str, Array]:
        images, target = arrays["images"], arrays["target"]
        if target.ndim == 2 and target.shape[1] == 1 and images.ndim > 2:
            target = target if self.regression else target[:, 0]
        problems = []
        if not len(images):
            problems.append(f"{path.name} holds no images")
        if len(images) != len(target):
            problems.append(f"{path.name} holds {len(images)} images and {len(target)} targets")
        if images.ndim not in (3, 4, 5) or images.dtype.kind not in "uif":
            problems.append(
                f"{path.name}: images are {images.dtype} of shape {images.shape}; they must be numbers of "
                "shape [n, (z,) y, x] or [n, (z,) y, x, colors]"
            )
        if target.dtype.kind not in "uifb":
            problems.append(f"{path.name}: targets are {target.dtype}, not numbers")
        if problems:
            raise DataError(problems)
        whole = target.dtype.kind != "f" or (np.isfinite(target).all() and (target == np.rint(target)).all())
        if self._whole(target) and not whole:
            raise DataError(f"{path.name}: labels are not whole numbers; set regression = true if this is intended")
        if target.ndim > 2 and not whole:
            raise DataError(f"{path.name}: masks are not whole numbers")
        if target.ndim > 2:
            target = self._labels(path, target.astype(np.int64, copy=False), arrays)
        if self._whole(target) and int(target.min()) < 0:
            raise DataError(f"{path.name}: labels go down to {int(target.min())}; number the classes from 0")
        if self.regression and target.ndim == 1:
            target = target[:, None]
        if images.dtype == np.uint8 and int(images.max()) <= 1:
            images = images * np.uint8(255)  # 0 and 1, as in masks, are black and white
        elif images.dtype != np.uint8:
            images = images.astype(np.float32)
        if target.dtype == bool or (target.ndim > 1 and target.dtype.kind in "ui"):
            target = target.astype(np.uint8 if target.ndim > 2 and int(target.max()) < 256 else np.int64)
        return {**arrays, "images": images, "target": target}

    def _labels(self, path: Path, masks: Array, arrays: Mapping[str, Array]) -> Array:
        """Return masks whose values are classes; 0 and 255 become 0 and 1.

        Raises:
            DataError: If values are not declared, or may be stray.
        """
        if int(masks.min()) < 0:
            raise DataError(f"{path.name}: mask values go down to {int(masks.min())}; number the classes from 0")
        found = {str(i): np.unique(mask).tolist() for i, mask in enumerate(masks)}
        relabel = any(isinstance(step, Relabel) for step in self.steps)
        names = self.classes or (self.about.classes if self.about else ()) or tuple(arrays.get("label_names", ()))
        declared = tuple(range(len(names))) if len(names) else None
        if black_and_white(found, declared):
            return masks // WHITE
        if not relabel and (problems := label_problems(found, declared)):
            raise DataError([f"{path.name}: {problem}" for problem in problems])
        return masks


def _channels_first(images: Array, mask_axes: int) -> Array:
    """Return [n, C, *spatial] from [n, *spatial] or [n, *spatial, C]. A last axis of 1, 3 or 4 counts colors."""
    colored = images.ndim > 3 and images.shape[-1] in COLORS and mask_axes in (0, False, images.ndim - 1)
    return np.moveaxis(images, -1, 1) if colored else images[:, None]


def images_in(path: Path, name: str, axes: int) -> tuple[tuple[str, ...], Array]:
    """Return the names of the images in an archive and the images [n, C, *spatial], without their targets.

    Args:
        path: The ``.npz`` file, with an array ``name``, or with MedMNIST's ``test_images`` and so on.
        name: The name of the array of images.
        axes: Number of spatial axes of an image.

    Raises:
        DataError: If it cannot be read, or contains no such array.
    """
    try:
        raw = read_npz(path, LIMITS)
    except Unreadable as error:
        raise DataError(str(error)) from None
    if found := [s for s in SPLITS if f"{s}_images" in raw]:
        images = np.concatenate([raw[f"{s}_images"] for s in found])
        ids = [f"{s}-{i:06d}" for s in found for i in range(len(raw[f"{s}_images"]))]
    elif name in raw:
        images, n = raw[name], len(raw[name])
        names = next((raw[k] for k in ("name", "names", "id", "ids") if k in raw and raw[k].shape == (n,)), None)
        ids = [f"{i:06d}" for i in range(n)] if names is None else [str(value) for value in names]
        ids = [f"{i:06d} {value}" for i, value in enumerate(ids)] if len(set(ids)) < n else ids
    else:
        raise DataError(f"{path.name} holds {', '.join(raw) or 'nothing'}, and no array of images called {name!r}")
    if images.ndim not in (axes + 1, axes + 2) or images.dtype.kind not in "uif":
        raise DataError(
            f"{path.name}: images are {images.dtype} of shape {images.shape}, not [n, *{axes} axes(, colors)]"
        )
    return tuple(ids), _channels_first(images, axes + 1)
