"""Files named by a study: location, content and content hash."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.archives import ENDINGS, unpack
from polyclinic.data.cache import folder
from polyclinic.data.examples import DataError
from polyclinic.data.formats.dicom.file import looks_like_dicom
from polyclinic.data.formats.dicom.segments import read_segments
from polyclinic.data.formats.dicom.series import SELECTORS, Series, read_dicom, read_series
from polyclinic.data.formats.grids import GridMismatch, matched
from polyclinic.data.formats.mask_labels import single_map
from polyclinic.data.formats.metaimage import read_metaimage
from polyclinic.data.formats.mgh import read_mgh
from polyclinic.data.formats.nifti import read_nifti
from polyclinic.data.formats.nrrd import read_nrrd
from polyclinic.data.formats.pictures import PICTURES, Pixels, read_picture, turned_by
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable
from polyclinic.data.formats.slides import SLIDES as SLIDES
from polyclinic.data.formats.slides import TIFF, is_slide
from polyclinic.data.formats.video import VIDEOS as VIDEOS
from polyclinic.data.formats.volume import SPATIAL, Turn, Volume, as_image, as_mask, nearest_axes, turned
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.sample import Picture

VOLUMES = (".nii", ".nii.gz", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".dcm")
TILES_KEY = "tiles = {size = 256, mpp = 0.5}"
FRAMES_KEY = "frames = {every = 25}"
_FLAT = torch.eye(4, dtype=torch.float64)


def placed(path: str, key: str = "path") -> Path:
    """Return the path given for ``key``, with ``~`` and ``$VARIABLES`` expanded; it must exist.

    Raises:
        DataError: If a variable is not set, or the path does not exist.
    """
    filled = os.path.expandvars(os.path.expanduser(path))
    if unset := re.findall(r"\$\{?(\w+)\}?", filled):
        raise DataError(f'{key} = "{path}": the environment variable {unset[0]} is not set')
    location = Path(filled)
    if not location.exists() and (fetched := folder() / "downloads") in location.parents:
        name = Path(location.relative_to(fetched).parts[0]).stem.split("_")[0]
        says = f"fetch it with `polyclinic data get {name}`, or set path to its location"
        raise DataError(f"{location.name} is not here yet: {says}")
    if not location.exists():
        raise DataError(f'{key} = "{path}": there is nothing at {location.absolute()}')
    return location


def content_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the names and bytes of all files in a folder."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        named = [f"{file.relative_to(path).as_posix()} {content_of(file)}" for file in inside]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: str) -> Path:
    """Return the folder at ``path``. A ``.zip`` or ``.tar`` file is unpacked once, into the cache under its hash.

    Raises:
        DataError: If the path is neither a folder nor a valid archive.
    """
    location = placed(path)
    if location.is_dir():
        return location
    if not location.name.lower().endswith(ENDINGS):
        raise DataError(f'path = "{path}": give a folder, or a .zip or .tar file of one')
    home = folder() / "unpacked" / content_of(location)
    if not home.is_dir():
        unpack(location, home)
    return home


def kind_of(path: Path) -> str:
    """Return the suffix by which a file is read, such as ``".nii.gz"``, or "" if it is not supported."""
    name = path.name.lower()
    return next((ending for ending in (*PICTURES, *VOLUMES, *SLIDES, *VIDEOS) if name.endswith(ending)), "")


def is_image(path: Path) -> bool:
    """Return whether a file can be read as an image: by its suffix, or DICOM by its content."""
    return bool(kind_of(path)) or (path.is_file() and looks_like_dicom(path))


def stem_of(path: Path) -> str:
    """Return a file's name without the suffix by which it is read."""
    return path.name[: len(path.name) - len(kind_of(path))]


def patients_in(ids: Sequence[str], pattern: str) -> tuple[str, ...]:
    r"""Return the patient of each example, taken from its name.

    Args:
        ids: Names of examples.
        pattern: A regular expression with one group, such as ``"_(\d+)[LR]$"``, that matches the patient; "" if names
            do not identify patients. A name without a match is its own patient.
    """
    if not pattern:
        return tuple(ids)
    matches = (re.search(pattern, name) for name in ids)
    return tuple(match.group(1) if match else name for match, name in zip(matches, ids, strict=True))


def check_pattern(key: str, pattern: str) -> list[str]:
    """Return the problems of a regular expression that needs one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"{key} = {pattern}: is not a regular expression ({error})"]
    return (
        [] if groups == 1 or not pattern else [f"{key} = {pattern}: needs exactly one group in ( ), and has {groups}"]
    )


@dataclass(frozen=True)
class ImageOptions:
    """How files are read, as a study declares it.

    Attributes:
        fill: Value for pixels without a measurement (NaN, infinite, DICOM padding); None to refuse files with NaN.
        geometry_tolerance_mm: Largest distance between corresponding voxels of an image and its mask, and of DICOM
            slices from even steps; None for 1 % of the voxel size.
        regions: For masks of several channels: the label of each channel, in the order in which they are painted.
        bits: Significant bits of 16-bit pictures, such as 12; 0 for all.
        series: Selection of DICOM series in a folder, by the keys of ``SELECTORS``.
        limits: Limits on a file.
        segments: For masks in DICOM segmentations and structure sets: the names of the segments of labels 1, 2, ...
    """

    fill: float | None = None
    geometry_tolerance_mm: float | None = None
    regions: tuple[int, ...] = ()
    bits: int = 0
    series: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = LIMITS
    segments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.fill is not None and not math.isfinite(self.fill):
            problems.append(f"fill = {self.fill}: give a finite number")
        if self.geometry_tolerance_mm is not None and not 0 <= self.geometry_tolerance_mm < math.inf:
            problems.append(f"geometry_tolerance_mm = {self.geometry_tolerance_mm}: give a length in mm")
        if any(label < 0 for label in self.regions):
            problems.append(f"regions = {list(self.regions)}: give the label of each channel, from 0")
        if self.bits not in (0, *range(8, 17)):
            problems.append(f"bits = {self.bits}: give 8 to 16, or 0 if all bits are used")
        if unknown := sorted(set(self.series) - set(SELECTORS)):
            problems.append(f"series = {unknown[0]}: choose among {', '.join(SELECTORS)}")
        if problems:
            raise DataError(problems)

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that affects what is read, for a fingerprint."""
        own = (self.segments,) if self.segments else ()
        return self.fill, self.geometry_tolerance_mm, self.regions, self.bits, sorted(self.series.items()), *own


OPTIONS = ImageOptions()


class Part(Protocol):
    """Part of a file that is an example, such as a tile of a slide (``polyclinic.data.cases.tiles``)."""

    @property
    def name(self) -> str:
        """Name of the part within its file."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Metadata of the example."""

    def read(self, path: Path, limits: Limits = LIMITS) -> Volume:
        """Read the part."""


@dataclass(frozen=True)
class Case:
    """One example as read: the image in its file's orientation, and its mask voxel by voxel on the same grid."""

    image: Volume
    mask: Volume | None = None
    notes: tuple[str, ...] = ()


def read_case(
    paths: Sequence[Path],
    mask: Path | None = None,
    options: ImageOptions = OPTIONS,
    *,
    slices: bool = False,
    part: Part | None = None,
) -> Case:
    """Read one image from one file, from one file per channel, from the slices of a series, or from a part of a file,
    and its mask.

    The loader and ``data check`` both read with this function.

    Raises:
        Unreadable: If a file is damaged or too large, or a mask or channel is on another grid.
    """
    if slices:
        image = read_series(Series(tuple(paths), "", ""), options.fill, options.limits, options.geometry_tolerance_mm)
        turn = 1
    elif part is not None:
        image, turn = part.read(paths[0], options.limits), 1
    else:
        image, turn = _upright(paths[0], options)
    notes = list(image.notes)
    if len(paths) > 1 and not slices:
        parts = [image]
        for path in paths[1:]:
            channel, more = matched(image, _upright(path, options)[0], path, "channel", options.geometry_tolerance_mm)
            parts.append(channel)
            notes += (*channel.notes, *more)
        image = _stacked(parts)
    if mask is None:
        return Case(image, None, tuple(dict.fromkeys(notes)))
    labels, more = read_mask(mask, options, image, turn)
    labels, placed_notes = matched(image, labels, mask, "mask", options.geometry_tolerance_mm)
    notes += (*labels.notes, *more, *placed_notes)
    return Case(image, labels, tuple(dict.fromkeys(notes)))


def read_image(
    paths: Sequence[Path],
    mask: Path | None = None,
    options: ImageOptions = OPTIONS,
    *,
    as_bytes: bool = False,
    slices: bool = False,
    part: Part | None = None,
) -> Picture:
    """Read one image and its mask as tensors.

    Pictures of whole numbers are scaled to 0 to 1 by their number of bits (with ``as_bytes``, 8-bit pictures remain
    uint8); signed and floating point pictures, and volumes, keep their values. Volumes are reoriented to the axes
    (z, y, x) of RAS, and become 2-D if they have one slice. A folder is read as a DICOM series.

    Raises:
        Unreadable: If a file is damaged, too large, or does not match the others.
    """
    return picture_of(read_case(paths, mask, options, slices=slices, part=part), as_bytes=as_bytes)


def picture_of(case: Case, *, as_bytes: bool = False) -> Picture:
    """Return an example as tensors, in the axes of RAS if its position in the patient is known."""
    image, mask = case.image, case.mask
    affine, shape = image.affine, image.size
    turn: Turn = ((0, 1, 2), (1, 1, 1))
    if image.positioned or image.size[0] > 1:
        turn = nearest_axes(image.affine)
        image, mask = turned(image, turn), None if mask is None else turned(mask, turn)
    pixels = image.array if image.array.ndim > SPATIAL else image.array[None]
    if not (as_bytes and pixels.dtype == torch.uint8):
        if image.full_scale is None:
            pixels = pixels.float()
        else:  # in one pass
            pixels = torch.from_numpy(np.divide(pixels.numpy(), np.float32(image.full_scale), dtype=np.float32))
    labels = None if mask is None else mask.array.long()
    spacing: tuple[float, ...] | None = image.spacing_mm if image.measured else None
    kept = list(range(SPATIAL))
    if 1 in image.size:  # a slice
        flat = image.size.index(1)
        pixels, labels = pixels.select(1 + flat, 0), None if labels is None else labels.select(flat, 0)
        spacing = spacing and (*spacing[:flat], *spacing[flat + 1 :])
        kept.remove(kept[flat])
    sources = [turn[0].index(SPATIAL - 1 - axis) for axis in kept]  # index axes x, y, z of the file
    geometry = Geometry.of_file(
        affine, shape, [SPATIAL - 1 - axis for axis in sources], [turn[1][axis] < 0 for axis in sources], spacing
    )
    return Picture(pixels, labels, spacing, geometry)


def read_mask(
    path: Path, options: ImageOptions = OPTIONS, image: Volume | None = None, turn: int = 1
) -> tuple[Volume, tuple[str, ...]]:
    """Read the labels in one file, one label per voxel, and notes.

    Args:
        path: The mask.
        options: How files are read.
        image: Its image, if it is a picture that was turned by an EXIF orientation.
        turn: That orientation; 1 for none.

    Raises:
        Unreadable: If the file contains no labels, or channels that ``options.regions`` does not describe.
    """
    if kind_of(path) in PICTURES:
        pixels = read_picture(path, options.limits)
        array, notes = _turned_with(path, pixels, image, turn)
        if pixels.transparent and len(np.unique(array.reshape(-1, *array.shape[2:]), axis=0)) == 1:
            raise Unreadable(path, "has one color, and differs in transparency only: save the labels as gray values")
        if array.ndim == 3 and array.shape[-1] == 3 and (array == array[..., :1]).all():
            array = array[..., 0]  # gray values stored as colors
        if pixels.lossy and not set(np.unique(array).tolist()) <= {0, 255}:
            count = len(np.unique(array))
            raise Unreadable(
                path, f"contains {count} values because its compression loses detail: save masks as PNG, not JPEG"
            )
        if array.ndim > SPATIAL - 1:
            raise Unreadable(path, "is a color picture, not a mask of labels")
        return _plain_picture(as_mask(path, array), "label"), notes
    if kind_of(path) == ".dcm" or (not kind_of(path) and looks_like_dicom(path)):
        segments = read_segments(path, image, options.segments, options.limits, options.geometry_tolerance_mm)
        if segments is not None:
            return segments, ()
    volume = _read_volume(path, kind_of(path), True, options)
    if volume.units != "label":  # DICOM
        volume = replace(volume, array=as_mask(path, volume.array.numpy()), units="label", full_scale=None)
    if volume.array.ndim > SPATIAL:
        volume = replace(volume, array=single_map(path, volume.array, options.regions))
    return volume, ()


def _turned_with(
    path: Path, pixels: Pixels, image: Volume | None, turn: int
) -> tuple["np.ndarray[Any, Any]", tuple[str, ...]]:
    """Return a mask in the orientation of its image, which was turned by the EXIF orientation ``turn``."""
    if image is None or pixels.orientation == turn:
        return pixels.upright, ()
    if pixels.orientation == 1:
        stored, upright = pixels.array.shape[:2], turned_by(pixels.array, turn).shape[:2]
        if stored != upright and stored == image.size[1:]:
            return pixels.array, ("EXIF turns the image and not its mask, which is upright, as its size shows",)
        if stored != upright and upright == image.size[1:]:
            return turned_by(pixels.array, turn), ("the mask is turned with its image (EXIF), as its size shows",)
    raise GridMismatch(
        path,
        f"its image has EXIF orientation {turn} and the mask {pixels.orientation}, so how they correspond is not "
        "known: save the image upright, without the EXIF orientation",
    )


def _upright(path: Path, options: ImageOptions) -> tuple[Volume, int]:
    """Return the image in one file, and the EXIF orientation by which it was turned (1: not turned)."""
    kind = kind_of(path)
    if kind in SLIDES or (kind in TIFF and is_slide(path)):
        raise Unreadable(path, f"is a whole-slide image: divide it with {TILES_KEY}")
    if kind in VIDEOS:
        raise Unreadable(path, f"is a video: select frames with {FRAMES_KEY}")
    if kind not in PICTURES:
        return _read_volume(path, kind, False, options), 1
    pixels = read_picture(path, options.limits)
    array, scale, notes = pixels.upright, pixels.full_scale, pixels.notes
    if options.bits and array.dtype == np.uint16:
        scale = float(2**options.bits - 1)
        if (highest := int(array.max())) > scale:
            raise Unreadable(path, f"contains the value {highest}, and bits = {options.bits} allows up to {scale:.0f}")
    if array.dtype == np.uint8:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    else:
        tensor, more = as_image(path, array, options.fill)
        notes += more
    if tensor.ndim == 2:
        return replace(_plain_picture(tensor, ""), full_scale=scale, notes=notes), pixels.orientation
    color = _plain_picture(tensor.movedim(-1, 0), "RGB" if tensor.shape[-1] == 3 else "")
    return replace(color, full_scale=scale, notes=notes), pixels.orientation


def _plain_picture(array: Tensor, units: str) -> Volume:
    """Return a picture [Y, X] or [C, Y, X] as a volume of one slice without a position."""
    return Volume(array.unsqueeze(-3), _FLAT, units=units, measured=False, positioned=False)


def _stacked(parts: Sequence[Volume]) -> Volume:
    """Return volumes on one grid as the channels of one volume; scaled if their full scales differ."""
    arrays = [part.array if part.array.ndim > SPATIAL else part.array[None] for part in parts]
    if len({(part.full_scale, part.array.dtype) for part in parts}) == 1:
        return replace(parts[0], array=torch.cat(arrays))
    pairs = zip(arrays, parts, strict=True)
    scaled = [a.float() if p.full_scale is None else a.float() / p.full_scale for a, p in pairs]
    known = all(part.full_scale is not None for part in parts)
    return replace(parts[0], array=torch.cat(scaled), full_scale=1.0 if known else None)


def _read_volume(path: Path, kind: str, mask: bool, options: ImageOptions) -> Volume:
    fill, limits = options.fill, options.limits
    if kind in (".nii", ".nii.gz", ".hdr"):
        return read_nifti(path, mask, fill, limits)
    if kind in (".nrrd", ".nhdr"):
        return read_nrrd(path, mask, fill, limits)
    if kind in (".mgz", ".mgh"):
        return read_mgh(path, mask, fill, limits)
    if kind in (".mha", ".mhd"):
        return read_metaimage(path, mask, fill, limits)
    if path.is_dir() or kind == ".dcm" or looks_like_dicom(path):
        return read_dicom(path, fill, limits, options.geometry_tolerance_mm, options.series)
    raise Unreadable(path, f"is none of {', '.join((*PICTURES, *VOLUMES))}")
