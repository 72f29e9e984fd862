"""How a run read its images, and the images at a place that are read the same way."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.config_problems import nearest
from polyclinic.data.archives import ENDINGS
from polyclinic.data.cases.cases import seen
from polyclinic.data.collection import FromFiles
from polyclinic.data.examples import DataError
from polyclinic.data.files import ImageOptions, content_of, is_image, kind_of, read_image, stem_of
from polyclinic.data.formats.dicom.file import looks_like_dicom
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.geometry import Geometry
from polyclinic.data.paired_folders import Pairs, cases_in
from polyclinic.data.preprocessing.pipeline_config import apply, parsed, plain
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.preprocessing.transforms import Relabel
from polyclinic.data.source import Source
from polyclinic.data.sources.manifest import Manifest
from polyclinic.data.sources.npz import Npz, images_in
from polyclinic.errors import ConfigError


@dataclass(frozen=True)
class Reading:
    """How a run read its images.

    Attributes:
        steps: Preprocessing.
        options: How files are read.
        channels: Number of channels of an example.
        axes: Number of spatial axes of an example.
        grouped: Whether an example may be several files, one for each channel, named ``CASE_0000``, ``CASE_0001``, ...
        array: Name of the array of images in ``.npz`` archives.
        patch: Shape of the views of images that training read from disk (``polyclinic.data.cases``); empty for images
            in memory.
        masks: Whether masks are predicted.
    """

    steps: tuple[Step, ...]
    options: ImageOptions
    channels: int
    axes: int
    grouped: bool = False
    array: str = "images"
    patch: tuple[int, ...] = ()
    masks: bool = False

    @classmethod
    def of(cls, source: Source, inputs: Sequence[int], masks: bool) -> "Reading":
        """Return how ``source`` reads images, of which an example has the shape ``inputs``.

        Raises:
            ConfigError: If it reads no image files.
        """
        channels, axes = inputs[0], len(inputs) - 1
        if isinstance(source, Npz):
            return cls(_for_images(source.steps), ImageOptions(), channels, axes, array=source.images)
        if isinstance(source, FromFiles):
            grouped = isinstance(source, Pairs) or (isinstance(source, Manifest) and len(source.images) > 1)
            steps: tuple[Step, ...] = getattr(source, "steps", ())
            return cls(_for_images(steps), source.options, channels, axes, grouped, patch=source.patch, masks=masks)
        raise ConfigError(
            f"the run was trained on data of the kind {type(source).__name__}, which are not image files: predictions "
            "of new data are made from image files and .npz archives only"
        )

    @property
    def table(self) -> dict[str, Any]:
        """The reading as plain values."""
        return {
            "steps": plain(self.steps),
            "fill": self.options.fill,
            "geometry_tolerance_mm": self.options.geometry_tolerance_mm,
            "bits": self.options.bits,
            "series": dict(self.options.series),
            "channels": self.channels,
            "axes": self.axes,
            "grouped": self.grouped,
            "array": self.array,
            "patch": list(self.patch),
            "masks": self.masks,
        }

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> "Reading":
        """Return the reading that ``table`` describes.

        Raises:
            ConfigError: If it is not one.
        """
        try:
            steps = parsed(table["steps"])
            options = {key: table[key] for key in ("fill", "geometry_tolerance_mm", "bits", "series")}
            how = {key: table[key] for key in ("channels", "axes", "grouped", "array", "masks")}
            return cls(steps, ImageOptions(**options), **how, patch=tuple(table["patch"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"the bundle does not say how images are read ({error}): export it again") from None

    def prepared(self, picture: Picture) -> Picture:
        """Return the picture after the steps, with the values that it has in training.

        Raises:
            DataError: If a step cannot be applied, or the number of channels or axes differs from the model's.
        """
        prepared = apply(self.steps, picture)
        if len(prepared.size) != self.axes:
            kinds = {2: "a single slice or picture", 3: "a volume"}
            raise DataError(
                f"is {kinds.get(len(prepared.size), 'an image')}, and the model takes {kinds.get(self.axes, 'another')}"
            )
        if (found := len(prepared.pixels)) != self.channels:
            raise DataError(
                f"has {found} channel{'s' * (found != 1)}, and the model takes {self.channels}"
                + (": give one file for each, named CASE_0000, CASE_0001, ..." if self.grouped else "")
            )
        if self.patch:
            prepared = replace(prepared, pixels=seen(prepared.pixels, self.patch, self.masks))
        return prepared


@dataclass(frozen=True)
class Case:
    """One image to predict.

    Attributes:
        id: Its name, unique among the cases.
        files: Its file, one file for each channel, or the folder of its DICOM series.
        row: Its row, if the file is a ``.npz`` archive.
    """

    id: str
    files: tuple[Path, ...]
    row: int | None = None

    @property
    def content(self) -> str:
        """A hash of its files."""
        return " ".join([*(content_of(file) for file in self.files), *([] if self.row is None else [str(self.row)])])


def _for_images(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that change images."""
    return tuple(step for step in steps if not isinstance(step, Relabel))


def cases_at(place: Path, reading: Reading) -> tuple[Case, ...]:
    """Return the images at ``place``: a file, a ``.npz`` archive, a folder of images, or of folders of DICOM series.

    Raises:
        ConfigError: If there are none, or two have one name.
    """
    if not place.exists():
        siblings = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise ConfigError(f"{place}: there is nothing here.{nearest(place.name, siblings)}")
    if place.is_file() and place.name.lower().endswith(".npz"):
        ids, _ = images_in(place, reading.array, reading.axes)
        names = [_name(name) for name in ids]
        names = names if len(set(names)) == len(names) else [f"{row:06d}_{name}" for row, name in enumerate(names)]
        return tuple(Case(name, (place,), row) for row, name in enumerate(names))
    if place.is_file() and place.name.lower().endswith(ENDINGS):
        raise ConfigError(f"{place}: unpack the archive and name its folder")
    if place.is_file():
        return (Case(_stem(place), (place,)),)
    found = list[Case]()
    if reading.grouped:
        found = [Case(name, files) for name, files in cases_in(place, channels=True).items()]
    else:
        files = [f for f in sorted(place.iterdir()) if f.is_file() and not f.name.startswith(".") and is_image(f)]
        if files and all(looks_like_dicom(file) for file in files):
            return (Case(place.resolve().name, (place,)),)
        found = [Case(_stem(file), (file,)) for file in files]
    for folder in sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if any(file.is_file() and looks_like_dicom(file) for file in folder.iterdir()):
            found.append(Case(folder.name, (folder,)))
    if not found:
        raise ConfigError(f"{place}: there are no images here (subfolders are searched for DICOM series only)")
    names = [case.id for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{place}: several images are called {', '.join(twice[:3])}: rename them or move them apart")
    return tuple(found)


def pictures(cases: Sequence[Case], reading: Reading) -> Iterator[tuple[Case, Picture | str]]:
    """Yield each case with its prepared picture, or with the reason why it cannot be read."""
    archive: tuple[Path, Tensor] | None = None
    for case in cases:
        try:
            if case.row is None:
                yield case, reading.prepared(read_image(case.files, None, reading.options))
                continue
            if archive is None or archive[0] != case.files[0]:
                archive = case.files[0], torch.from_numpy(images_in(case.files[0], reading.array, reading.axes)[1])
            yield case, reading.prepared(_of_array(archive[1][case.row]))
        except Unreadable as error:
            yield case, str(error)
        except DataError as error:
            yield case, f"{case.files[0].name}: {error}"


def _of_array(stored: Tensor) -> Picture:
    """Return an image of an archive. Its voxels are 1 mm apart in a geometry that says so of no file."""
    pixels = stored.float() / (255.0 if stored.dtype == torch.uint8 else 1.0)
    shape = (1,) * (3 - pixels.ndim + 1) + tuple(pixels.shape[1:])
    axes = tuple(range(3 - (pixels.ndim - 1), 3))
    geometry = Geometry.of_file(torch.eye(4, dtype=torch.float64), shape, axes, (False,) * len(axes), None)
    return Picture(pixels, None, None, geometry)


def _stem(file: Path) -> str:
    return stem_of(file) if kind_of(file) else file.name


def _name(text: str) -> str:
    """Return a name from an archive as the name of a file in the output folder."""
    return re.sub(r"[^\w.+-]+", "_", text).lstrip(".")[:200] or "image"
