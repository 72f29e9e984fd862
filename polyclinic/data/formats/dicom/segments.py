"""Reader of DICOM segmentations (SEG) and radiotherapy structure sets (RTSTRUCT) as masks on the grid of their image.

Standard: DICOM PS3.3, A.51 and C.8.20 (Segmentation), C.8.8.5 and C.8.8.6 (structure set, ROI contours). Frames and
contours are placed by their position in the patient, so a segmentation may leave out empty slices, and its image may be
a series or a file of another format. The numbers of segments and ROIs differ from file to file; labels follow names.
"""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyclinic.data.formats.dicom.file import element, image_shape, open_dicom, quiet, stored_pixels, whole_number
from polyclinic.data.formats.dicom.geometry import Plane, affine_of, first_item, frame_planes, plane_of
from polyclinic.data.formats.grids import GridMismatch, tolerance_of
from polyclinic.data.formats.polygons import inside
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing
from polyclinic.data.formats.volume import Volume

Labels = np.ndarray[Any, np.dtype[np.int16]]
MOST_POINTS = 20_000
"""Largest number of points of one contour."""
OFF_SLICE = 0.1
"""Largest distance of a contour from the middle of a slice, in slices."""
MASKS = ("SEG", "RTSTRUCT")
"""Modalities of masks."""
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_LIST = "`polyclinic data segments FILE` lists their names"


def segments_of(path: str | os.PathLike[str], limits: Limits = LIMITS) -> dict[int, str]:
    """Return the names of the segments or ROIs in a file, by number.

    Raises:
        Unreadable: If it is neither a segmentation nor a structure set.
    """
    path = Path(path)
    dataset = open_dicom(path, pixels=False, limits=limits)
    with quiet(), refusing(path, "its segments are damaged"):
        modality = str(dataset.get("Modality") or "")
        if modality == "SEG":
            items = [
                (item.get("SegmentNumber"), item.get("SegmentLabel")) for item in dataset.get("SegmentSequence") or []
            ]
        elif modality == "RTSTRUCT":
            items = [
                (item.get("ROINumber"), item.get("ROIName")) for item in dataset.get("StructureSetROISequence") or []
            ]
        else:
            raise Unreadable(path, "is neither a DICOM segmentation nor a structure set")
        names = {int(number): str(name or "").strip() for number, name in items}
    if len(names) != len(items) or not names:
        raise Unreadable(path, "contains no segments" if not names else "contains two segments of one number")
    return names


def referenced_series(path: str | os.PathLike[str], dataset: Any) -> frozenset[str] | None:
    """Return the SeriesInstanceUIDs of the images that a segmentation or structure set refers to; None for others.

    Raises:
        Unreadable: If its references are damaged.
    """
    modality = str(element(dataset, "Modality") or "")
    if modality not in MASKS:
        return None
    with quiet(), refusing(path, "its references to images are damaged"):
        if modality == "SEG":
            series = list(dataset.get("ReferencedSeriesSequence") or [])
        else:
            frames = dataset.get("ReferencedFrameOfReferenceSequence") or []
            studies = [study for frame in frames for study in frame.get("RTReferencedStudySequence") or []]
            series = [item for study in studies for item in study.get("RTReferencedSeriesSequence") or []]
        return frozenset(str(item.SeriesInstanceUID) for item in series)


def read_segments(
    path: str | os.PathLike[str],
    image: Volume | None,
    wanted: Sequence[str],
    limits: Limits = LIMITS,
    tolerance_mm: float | None = None,
) -> Volume | None:
    """Read a segmentation or a structure set as labels on the grid of its image; None for other objects.

    Args:
        path: The file.
        image: Its image, whose position in the patient must be known.
        wanted: The names of segments or ROIs, compared without case; ``*`` matches any text. The first becomes label 1,
            the second 2, ...; where they overlap, later ones are painted over earlier ones.
        limits: Limits on the file.
        tolerance_mm: Largest distance between corresponding pixels of a frame and the image; None for the default.

    Returns:
        int16 [Z, Y, X]. A segmentation with fractions marks the pixels of at least one half. Contours mark the pixels
        whose centers they enclose; contours of one ROI on one slice are combined by exclusive or: inner ones are holes.

    Raises:
        GridMismatch: If frames or contours are not on the image's grid.
        Unreadable: If the file is damaged, or ``wanted`` names none of its segments.
    """
    path = Path(path)
    dataset = open_dicom(path, limits=limits)
    modality = str(dataset.get("Modality") or "")
    if modality not in MASKS:
        return None
    label = _labels(path, segments_of(path, limits), wanted)
    if image is None or not image.positioned:
        raise GridMismatch(path, "is placed by its position in the patient, which its image does not state")
    labels: Labels = np.zeros(image.size, np.int16)
    if modality == "SEG":
        _paint_frames(path, dataset, image, label, labels, limits, tolerance_mm)
    else:
        with quiet(), refusing(path, "its contours are damaged"):
            _paint_contours(path, dataset, image, label, labels)
    return replace(image, array=torch.from_numpy(labels), modality=modality, units="label", full_scale=None, notes=())


def _labels(path: Path, names: Mapping[int, str], wanted: Sequence[str]) -> dict[int, int]:
    """Return the label of each chosen segment, by its number."""
    count = f"{len(names)} segment{'s' * (len(names) > 1)}"
    if not wanted:
        raise Unreadable(
            path, f"contains {count}: name those to read, in the order of their labels, with segments = [...]; {_LIST}"
        )
    patterns = [name.casefold() for name in wanted]
    found = {}
    for number, name in names.items():
        fitting = [i for i, pattern in enumerate(patterns) if fnmatch.fnmatchcase(name.casefold(), pattern)]
        if fitting:
            found[number] = fitting[0] + 1
    if not found:
        raise Unreadable(path, f"contains {count}, none of which is named in segments = {list(wanted)}; {_LIST}")
    return found


def _paint_frames(
    path: Path,
    dataset: Any,
    image: Volume,
    label: Mapping[int, int],
    labels: Labels,
    limits: Limits,
    tolerance_mm: float | None,
) -> None:
    """Paint the frames of a segmentation, in the order of their labels."""
    kind = str(dataset.get("SegmentationType") or "")
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise Unreadable(path, "its SegmentationType is none of the standard's")
    if kind == "LABELMAP":
        dataset.PhotometricInterpretation = "MONOCHROME2"  # a palette would turn segment numbers into colors
    frames = image_shape(path, dataset, limits)[0]
    pixels = stored_pixels(path, dataset, limits)
    if pixels.ndim != 3:
        raise Unreadable(path, "is a segmentation in color")
    with quiet(), refusing(path, "its functional groups are damaged"):
        planes = frame_planes(path, dataset, frames, plane_of(path, dataset))
        numbers = [0] * frames if kind == "LABELMAP" else _numbers(path, dataset, frames)
        half = whole_number(path, dataset, "MaximumFractionalValue", 1) / 2 if kind == "FRACTIONAL" else 0.5
    if planes is None:
        raise GridMismatch(path, "its frames state no position in the patient")
    for wanted in sorted(set(label.values())):
        for frame, plane, number in zip(pixels, planes, numbers, strict=True):
            own = [n for n, at in label.items() if at == wanted]
            marked = np.isin(frame, own) if kind == "LABELMAP" else (frame >= half) if number in own else None
            if marked is not None and marked.any():
                _paint(path, labels, marked, plane, image, wanted, tolerance_mm)


def _numbers(path: Path, dataset: Any, frames: int) -> list[int]:
    """Return the segment number of each frame."""
    shared = first_item(first_item(dataset, "SharedFunctionalGroupsSequence"), "SegmentIdentificationSequence")
    own = [
        first_item(item, "SegmentIdentificationSequence")
        for item in dataset.get("PerFrameFunctionalGroupsSequence") or []
    ]
    sources = [item if item is not None else shared for item in own]
    if len(sources) != frames or None in sources:
        raise Unreadable(path, "does not state the segment of each frame")
    return [whole_number(path, source, "ReferencedSegmentNumber") for source in sources]


def _paint(
    path: Path,
    labels: Labels,
    marked: np.ndarray[Any, np.dtype[np.bool_]],
    plane: Plane,
    image: Volume,
    label: int,
    tolerance_mm: float | None,
) -> None:
    """Paint the marked pixels [rows, columns] of one frame into the voxels at their position."""
    affine = affine_of(plane, plane.normal)
    relative = torch.linalg.solve(image.affine, affine).numpy()
    start = np.rint(relative[:3, 3])
    steps = np.rint(relative[:3, :2])  # one voxel along one axis of the image for each column, and for each row
    rows, wide = marked.shape
    corners = np.array([[0, 0], [wide - 1, 0], [0, rows - 1], [wide - 1, rows - 1]]).T  # (column, row)
    place = affine.numpy()[:3, :2] @ corners + affine.numpy()[:3, 3:]
    voxel = start[:, None] + steps @ corners
    grid = image.affine.numpy()[:3, :3] @ voxel + image.affine.numpy()[:3, 3:]
    distance = float(np.linalg.norm(place - grid, axis=0).max())
    if np.abs(steps).sum(0).tolist() != [1, 1] or distance > tolerance_of(image, tolerance_mm):
        raise GridMismatch(
            path,
            f"the segmentation is on another grid than its image: its pixels are up to {distance:.3g} mm from voxels",
        )
    row, column = np.nonzero(marked)
    at = start[:, None] + steps @ np.stack([column, row])  # x, y, z
    if (at.min(1) < 0).any() or (at.max(1) >= image.size[::-1]).any():
        raise GridMismatch(path, "the segmentation marks pixels outside of its image")
    x, y, z = at.astype(np.int64)
    labels[z, y, x] = label


def _paint_contours(path: Path, dataset: Any, image: Volume, label: Mapping[int, int], labels: Labels) -> None:
    """Paint the contours of a structure set, in the order of their labels."""
    rois = [item for item in dataset.get("ROIContourSequence") or [] if int(item.ReferencedROINumber) in label]
    to_index = torch.linalg.inv(image.affine).numpy()
    size = image.size[::-1]  # x, y, z
    painted = False
    for roi in sorted(rois, key=lambda item: label[int(item.ReferencedROINumber)]):
        slices: dict[tuple[int, int], np.ndarray[Any, np.dtype[np.bool_]]] = {}
        for contour in roi.get("ContourSequence") or []:
            points = _points(path, contour) @ to_index[:3, :3].T + to_index[:3, 3]
            spread = np.ptp(points, axis=0)
            axis = int(np.argmin(spread))
            at = float(points[:, axis].mean())
            if spread[axis] > OFF_SLICE or abs(at - round(at)) > OFF_SLICE:
                raise GridMismatch(path, "has contours that do not lie on slices of its image")
            if not 0 <= round(at) < size[axis]:
                raise GridMismatch(path, "has contours outside of its image")
            u, v = (k for k in range(3) if k != axis)
            filled = inside(points[:, (u, v)], np.arange(max(size[u], 2.0)), np.arange(float(size[v])))[:, : size[u]]
            key = axis, round(at)
            slices[key] = slices[key] ^ filled if key in slices else filled
        volume = labels.transpose(2, 1, 0)  # x, y, z
        for (axis, at_slice), filled in slices.items():
            flat = np.moveaxis(volume, axis, 0)[at_slice]  # [u, v], a view
            flat[filled.T] = label[int(roi.ReferencedROINumber)]
            painted = painted or bool(filled.any())
    if not painted:
        raise Unreadable(path, "its contours enclose no voxel of the image")


def _points(path: Path, contour: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the corners of a contour in RAS millimeters. Shape [n, 3]."""
    if str(contour.get("ContourGeometricType") or "") not in _CLOSED:
        raise Unreadable(path, "has contours that are not closed and planar")
    numbers = np.array([float(value) for value in contour.get("ContourData") or []])
    if len(numbers) % 3 or not np.isfinite(numbers).all() or not 9 <= len(numbers) <= 3 * MOST_POINTS:
        raise Unreadable(path, f"has a contour that is not 3 to {MOST_POINTS} points")
    return numbers.reshape(-1, 3) * [-1, -1, 1]
