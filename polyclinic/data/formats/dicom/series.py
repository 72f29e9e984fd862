"""Reader of DICOM series: files grouped, slices ordered by their position in the patient, values in their units.

Standard: DICOM PS3.3 (C.7.6.2 planes, C.7.6.3 pixels, C.7.6.16 multi-frame, C.11.1 modality LUT). Reads classic series,
enhanced multi-frame CT/MR, RT dose, single radiographs, and ultrasound in color or as a cine loop.
"""

import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.formats.dicom.file import (
    element,
    image_shape,
    looks_like_dicom,
    open_dicom,
    quiet,
    states,
    whole_number,
)
from polyclinic.data.formats.dicom.geometry import Plane, flat_spacing, frame_planes, images_within, plane_of, stack
from polyclinic.data.formats.dicom.pixel_values import values_of
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, refusing
from polyclinic.data.formats.volume import Volume, affine_from

SUFFIXES = (".dcm", ".ima", ".dicom", "")
_NOT_IMAGES = ("DICOMDIR", "README", "LICENSE", "LICENCE", "VERSION", "CHANGES", "MAKEFILE")  # codespell:ignore
_TELL_APART = (  # tags that separate several images in one series at the same positions, in this order
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "DiffusionBValue",
    "ImageType",
    "AcquisitionNumber",
)


@dataclass(frozen=True)
class Header:
    """Header fields of one file that grouping needs. Identifiers are excluded from ``repr``."""

    path: Path
    modality: str
    shape: tuple[int, int, int, int]
    plane: Plane | None
    series: str = field(repr=False, default="")
    patient: str = field(repr=False, default="")
    instance: str = field(repr=False, default="")
    named: Mapping[str, str] = field(repr=False, default_factory=dict)
    marks: tuple[str, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Series:
    """Files that make one volume, in any order, and the patient they show (a pseudonym or an identifier).

    Attributes:
        key: SeriesInstanceUID.
        marks: Values that distinguish series, by the names of ``SELECTORS``.
        localizer: Whether the files are a localizer (scout), by their ImageType.
    """

    paths: tuple[Path, ...]
    modality: str
    patient: str = field(repr=False)
    key: str = field(repr=False, default="")
    marks: Mapping[str, str] = field(repr=False, default_factory=dict)
    localizer: bool = False


SELECTORS = {
    "uid": "SeriesInstanceUID",
    "description": "SeriesDescription",
    "number": "SeriesNumber",
    "modality": "Modality",
    "protocol": "ProtocolName",
    "body_part": "BodyPartExamined",
    "kernel": "ConvolutionKernel",
    "slice_thickness": "SliceThickness",
}
"""Keys by which a study selects series, ``series = {description = "T1"}``, and the DICOM elements that they compare."""


@dataclass(frozen=True)
class Found:
    """Content of a folder of DICOM files: series, refused files, and the number of objects that are not images
    (reports, ...).
    """

    series: tuple[Series, ...]
    problems: tuple[Unreadable, ...]
    not_images: int = 0


def header_of(path: Path, dataset: Any, limits: Limits = LIMITS, grouping: bool = True) -> Header | None:
    """Return the header of an image, or None for objects that are no images (reports, plans, segmentations).

    Without ``grouping``, the patient, the series and the values that tell series apart are left out.
    """
    with quiet(), refusing(path, "its DICOM header is damaged"):
        if (not states(dataset, "Rows") and not states(dataset, "Columns")) or element(dataset, "Modality") == "SEG":
            return None

        def text(keyword: str) -> str:
            return str(element(dataset, keyword) or "")

        header = Header(
            path,
            text("Modality"),
            image_shape(path, dataset, limits),
            plane_of(path, dataset),
            instance=text("SOPInstanceUID"),
        )
        if not grouping:
            return header
        return replace(
            header,
            series=text("SeriesInstanceUID"),
            patient=text("PatientID"),
            named={key: text(keyword).strip() for key, keyword in SELECTORS.items()},
            marks=tuple(map(text, _TELL_APART)),
        )


def dicom_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the DICOM files under ``folder``, by name or content, in a fixed order; links are not followed."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if name.startswith(".") or name.upper() in _NOT_IMAGES:
                continue
            if path.suffix.lower() in SUFFIXES or path.suffix[1:].isdigit() or looks_like_dicom(path):
                found.append(path)
    return found


def find_series(
    paths: Iterable[Path], limits: Limits = LIMITS, look: Callable[[Path, Any], None] | None = None
) -> Found:
    """Group files into series by their headers; a refused file does not affect the others.

    Args:
        paths: Paths, as from ``dicom_files``.
        limits: Limits on one file.
        look: Called with each path and its data set (without pixels), for checks in the same pass.
    """
    headers, problems, others = [], [], 0
    for path in paths:
        try:
            dataset = open_dicom(path, pixels=False, limits=limits)
            if look is not None:
                look(path, dataset)
            header = header_of(path, dataset, limits)
        except Unreadable as refusal:
            problems.append(refusal)
            continue
        if header is None:
            others += 1
        else:
            headers.append(header)
    return Found(tuple(group(headers)), tuple(problems), others)


def group(headers: Sequence[Header]) -> list[Series]:
    """Group headers into series by series number, size and orientation; split series whose positions repeat."""
    stacks: dict[tuple[object, ...], list[Header]] = {}
    for header in headers:
        if header.plane is None or header.shape[0] > 1 or not header.series:
            key: tuple[object, ...] = (str(header.path),)  # a radiograph, a cine loop, a multi-frame file: alone
        else:
            turn = tuple(round(v, 2) for v in header.plane.across + header.plane.down)
            key = (header.series, header.patient, header.shape[1:], turn, tuple(round(v, 3) for v in header.plane.step))
        stacks.setdefault(key, []).append(header)
    return [_series(part) for members in stacks.values() for part in _apart(members)]


def _apart(members: list[Header]) -> list[list[Header]]:
    def unique(part: list[Header]) -> bool:
        places = [tuple(round(v, 3) for v in h.plane.position) for h in part if h.plane is not None]
        return len(set(places)) == len(places)

    if unique(members):
        return [members]
    for mark in range(len(_TELL_APART)):
        parts: dict[str, list[Header]] = {}
        for header in members:
            parts.setdefault(header.marks[mark], []).append(header)
        if len(parts) > 1 and all(unique(part) for part in parts.values()):
            return list(parts.values())
    return [members]  # refused when it is read


def _series(members: list[Header]) -> Series:
    first = members[0]
    scout = all("LOCALIZER" in header.marks[_TELL_APART.index("ImageType")].upper() for header in members)
    return Series(tuple(h.path for h in members), first.modality, first.patient, first.series, first.named, scout)


def selected(series: Series, wanted: Mapping[str, str]) -> bool:
    """Return whether a series has the ``wanted`` values, compared without case; ``*`` matches any text."""
    return all(fnmatch.fnmatchcase(series.marks.get(k, "").lower(), str(v).lower()) for k, v in wanted.items())


def read_dicom(
    path: str | os.PathLike[str],
    fill: float | None = None,
    limits: Limits = LIMITS,
    tolerance_mm: float | None = None,
    wanted: Mapping[str, str] = MappingProxyType({}),
) -> Volume:
    """Read one DICOM file, or a folder that contains exactly one series that has the ``wanted`` values.

    Localizers are left out if the folder contains another series.
    """
    path = Path(path)
    if not path.is_dir():
        return read_series(Series((path,), "", ""), fill, limits, tolerance_mm)
    return read_series(chosen_series(path, limits, wanted), fill, limits, tolerance_mm)


def chosen_series(path: Path, limits: Limits, wanted: Mapping[str, str]) -> Series:
    """Return the series in a folder that has the ``wanted`` values.

    Raises:
        Unreadable: If a file is refused, or the folder contains several such series, or none.
    """
    content = find_series(dicom_files(path), limits)
    if content.problems:
        raise content.problems[0]
    fitting = [series for series in content.series if selected(series, wanted)]
    images = [series for series in fitting if not series.localizer] or fitting
    if len(images) != 1:
        raise Unreadable(path, f"contains {_series_found(images, len(content.series))}")
    return images[0]


def _series_found(images: Sequence[Series], total: int) -> str:
    """Return how many series there are, and by which keys one can be selected."""
    if not images:
        return f"{total} series, none of which has the values of series = ..."
    named = [*(key for key in SELECTORS if key != "uid"), "uid"]
    keys = [key for key in named if len({series.marks.get(key, "") for series in images}) == len(images)]
    counts = " and ".join(str(len(series.paths)) for series in images[:5])
    return f"{len(images)} series of {counts} files; choose one with series = {{{keys[0] if keys else 'uid'} = ...}}"


def read_series(
    series: Series, fill: float | None = None, limits: Limits = LIMITS, tolerance_mm: float | None = None
) -> Volume:
    """Read the volume of one series.

    Args:
        series: Its files.
        fill: Replacement of voxels without a measurement (not finite, or padding); None to refuse values that are not
            finite.
        limits: Limits on each file and on the series.
        tolerance_mm: Largest deviation of a slice from its place in an even stack; None for the default.

    Returns:
        float32 [Z, Y, X] in the file's units (CT: HU), or uint8 [3, Z, Y, X] for color; slices ordered along the normal
        of their planes. MONOCHROME1 is inverted so that higher is brighter, except for CT, PET and dose.

    Raises:
        Unreadable: If one file is refused, or the slices do not make one even stack.
    """
    with quiet():  # once: to enter again within is cheap
        if len(series.paths) == 1:
            return _one_file(series.paths[0], fill, limits, tolerance_mm)
        return _stacked(series, fill, limits, tolerance_mm)


def _stacked(series: Series, fill: float | None, limits: Limits, tolerance_mm: float | None) -> Volume:
    """Read the volume of a series of several files."""
    parts: list[tuple[Header, Tensor, str, tuple[str, ...]]] = []
    for path in series.paths:
        dataset = open_dicom(path, limits=limits)
        header = header_of(path, dataset, limits, grouping=False)
        if header is None or header.plane is None:
            raise Unreadable(path, "does not state its position, orientation and spacing")
        if not parts:
            fits(path, (len(series.paths), *header.shape[1:]), 4, limits, "series")
        values, units, notes = values_of(path, dataset, fill, limits)
        parts.append((header, values, units, notes))
    first = parts[0][0]
    if len({(tuple(values.shape), units) for _, values, units, _ in parts}) > 1:
        raise Unreadable(first.path, "the slices of its series differ in size, color or units")
    _refuse_copies([header for header, _, _, _ in parts])
    order, affine, notes = stack(first.path, [h.plane for h, _, _, _ in parts if h.plane is not None], tolerance_mm)
    array = torch.cat([parts[i][1] for i in order], dim=-3)
    reader_notes = dict.fromkeys(note for _, _, _, part in parts for note in part)
    scale = _full_scale(parts[0][2])
    return Volume(array, affine, first.modality, parts[0][2], True, notes + tuple(reader_notes), full_scale=scale)


def _refuse_copies(headers: Sequence[Header]) -> None:
    """Refuse a series in which two files have the same SOPInstanceUID: one is a copy of the other."""
    seen: dict[str, Path] = {}
    copies = [h.path for h in headers if h.instance and seen.setdefault(h.instance, h.path) != h.path]
    if copies:
        more = f" ({len(copies)} such files)" if len(copies) > 1 else ""
        raise Unreadable(copies[0], f"is a copy of another file (same SOPInstanceUID){more}: remove one of them")


def _one_file(path: Path, fill: float | None, limits: Limits, tolerance_mm: float | None) -> Volume:
    dataset = open_dicom(path, limits=limits)
    header = header_of(path, dataset, limits, grouping=False)
    if header is None:
        segments = str(element(dataset, "Modality") or "") in ("SEG", "RTSTRUCT")
        raise Unreadable(path, "is a mask of an image, not an image" if segments else "contains no image")
    with quiet(), refusing(path, "its functional groups are damaged"):
        _refuse_parts(path, dataset, header.shape)
        planes = frame_planes(path, dataset, header.shape[0], header.plane)
    values, units, notes = values_of(path, dataset, fill, limits)
    if planes is not None:
        try:
            order, affine, more = stack(path, planes, tolerance_mm)
        except Unreadable as refusal:
            if several := images_within(dataset):
                raise Unreadable(path, f"contains {several}: save each as a file of its own") from None
            raise refusal
        array = values if order == sorted(order) else values.index_select(values.ndim - 3, torch.tensor(order))
        return Volume(array, affine, header.modality, units, True, notes + more, full_scale=_full_scale(units))
    with quiet(), refusing(path, "its pixel spacing is damaged"):
        step, note = flat_spacing(path, dataset)
    notes += ("no position in the patient is stated: left and right are as on the screen", *note)
    if header.shape[0] > 1:
        notes += ("its frames have no position: they are time points or views, stored as slices 1 mm apart",)
    affine = affine_from(np.diag([step[1], step[0], 1.0]) @ np.diag([-1.0, -1.0, 1.0]), np.zeros(3))
    known = bool(note) and header.shape[0] == 1  # the distance of frames is not stated
    return Volume(values, affine, header.modality, units, known, notes, False, _full_scale(units))


def _refuse_parts(path: Path, dataset: Any, shape: tuple[int, int, int, int]) -> None:
    """Refuse a file that is one of several of an image, and an image that is stored as tiles."""
    if (total := whole_number(path, dataset, "InConcatenationTotalNumber", 1)) > 1 or (
        whole_number(path, dataset, "InConcatenationNumber", 1) > 1
    ):
        raise Unreadable(path, f"is one of {max(total, 2)} parts of an image (a concatenation): join them first")
    whole = [whole_number(path, dataset, f"TotalPixelMatrix{axis}", 0) for axis in ("Rows", "Columns")]
    if all(whole) and (whole[0] > shape[1] or whole[1] > shape[2]):
        raise Unreadable(path, f"is a slide of {whole[0]} x {whole[1]} pixels in tiles, which is not read as DICOM")


def _full_scale(units: str) -> float | None:
    return 255.0 if units == "RGB" else None
