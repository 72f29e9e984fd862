"""Position of DICOM frames in the patient, and stacking of frames into a volume.

Standard: DICOM PS3.3, C.7.6.2 (Image Plane: equation C.7.6.2.1-1) and C.7.6.16 (Multi-frame Functional Groups). A stack
is accepted only if one affine places every slice: parallel planes, equal steps, no missing slices, no shear.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyclinic.data.formats.dicom.file import element, numbers, states
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.volume import affine_from, lps_to_ras


@dataclass(frozen=True)
class Plane:
    """Position of one frame, in LPS millimeters as DICOM states it.

    Attributes:
        position: Center of the first pixel.
        across: Unit vector along a row (column index increases).
        down: Unit vector along a column (row index increases).
        step: Distance between (rows, columns).
        thickness: Nominal thickness or stated distance of slices; None if neither is stated.
    """

    position: tuple[float, ...]
    across: tuple[float, ...]
    down: tuple[float, ...]
    step: tuple[float, float]
    thickness: float | None

    @property
    def normal(self) -> np.ndarray[Any, Any]:
        """Unit vector perpendicular to the plane."""
        (a, b, c), (d, e, f) = self.across, self.down
        return np.array([b * f - c * e, c * d - a * f, a * e - b * d])  # np.cross is 20 times slower for one pair


def plane_of(path: Path, *sources: Any) -> Plane | None:
    """Return the plane, taking each element from the first data set that states it (a frame's groups, then the
    file's).
    """

    def find(keyword: str, count: int) -> tuple[float, ...] | None:
        for source in sources:
            if source is not None and (found := numbers(path, source, keyword, count)) is not None:
                return found
        return None

    position, cosines = find("ImagePositionPatient", 3), find("ImageOrientationPatient", 6)
    step = find("PixelSpacing", 2)
    if position is None or cosines is None or step is None:
        return None
    across, down = cosines[:3], cosines[3:]
    lengths = math.hypot(*across), math.hypot(*down)
    cosine = sum(a * d for a, d in zip(across, down, strict=True))
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01 or abs(cosine) > 0.01:
        raise Unreadable(path, "its ImageOrientationPatient is not two perpendicular unit vectors")
    if min(step) <= 0:
        raise Unreadable(path, "its PixelSpacing is not positive")
    between = find("SpacingBetweenSlices", 1) or find("SliceThickness", 1)
    thickness = abs(between[0]) if between and between[0] else None
    unit = tuple(v / lengths[0] for v in across), tuple(v / lengths[1] for v in down)
    return Plane(position, *unit, (step[0], step[1]), thickness)


def stack(
    path: Path, planes: Sequence[Plane], tolerance_mm: float | None = None
) -> tuple[list[int], Tensor, tuple[str, ...]]:
    """Return the order of parallel slices along their normal, and the affine of the volume they make.

    Args:
        path: Path named in errors: the series' first file or folder.
        planes: One per slice, in any order.
        tolerance_mm: Largest deviation of a slice from its place in an even stack; None for 1 % of the step, at
            least 0.01 mm.

    Returns:
        The order, the affine (index x, y, z to RAS mm), and notes.

    Raises:
        Unreadable: If slices share a position, are missing, unevenly spaced, rotated or sheared.
    """
    first = planes[0]
    for plane in planes[1:]:
        turned = np.abs(np.subtract(plane.across + plane.down, first.across + first.down)).max() > 1e-3
        if turned or not np.allclose(plane.step, first.step, rtol=1e-3):
            raise Unreadable(path, "its slices differ in orientation or pixel spacing")
    if len(planes) == 1:
        notes = () if first.thickness else ("one slice without thickness: 1 mm is assumed",)
        return [0], affine_of(first, first.normal * (first.thickness or 1.0)), notes
    heights = np.array([float(np.dot(plane.normal, plane.position)) for plane in planes])
    order = [int(i) for i in np.argsort(heights, kind="stable")]
    positions = np.array([planes[i].position for i in order])
    across_slices = _even_steps(path, np.diff(heights[order]), positions, first.normal, tolerance_mm)
    return order, affine_of(replace(first, position=planes[order[0]].position), across_slices), ()


def affine_of(first: Plane, across_slices: np.ndarray[Any, Any]) -> Tensor:
    """Return the affine of a volume from its first plane, and the step in mm from slice to slice."""
    along_row = [v * first.step[1] for v in first.across]
    along_column = [v * first.step[0] for v in first.down]
    columns = np.array([along_row, along_column, across_slices]).T
    return lps_to_ras(affine_from(columns, np.array(first.position)))


def _even_steps(
    path: Path,
    gaps: np.ndarray[Any, Any],
    positions: np.ndarray[Any, Any],
    normal: np.ndarray[Any, Any],
    tolerance_mm: float | None,
) -> np.ndarray[Any, Any]:
    """Return the step from slice to slice, if all are equal to within the tolerance and along the normal."""
    step = float(np.median(gaps))
    slack = max(0.01 * step, 0.01)
    spread = np.abs(np.cumsum(gaps) - np.arange(1, len(gaps) + 1) * gaps.mean()).max()
    if gaps.min() < 1e-3:
        twice = int((gaps < 1e-3).sum())
        raise Unreadable(
            path, f"{twice} slices have the position of another: a series of several images that no tag distinguishes"
        )
    if np.abs(gaps - step).max() > slack if tolerance_mm is None else spread > tolerance_mm:
        missing = np.rint(gaps / gaps.min()) - 1
        if np.abs(gaps - (missing + 1) * gaps.min()).max() <= 2 * slack and missing.sum() <= len(gaps):
            count, wide, narrow = int(missing.sum()), gaps.max(), gaps.min()
            raise Unreadable(path, f"{count} slices are missing (gaps of {wide:.4g} mm among gaps of {narrow:.4g} mm)")
        hint = f"; if this is rounding, set geometry_tolerance_mm = {spread * 1.2:.2g}" if spread < step / 4 else ""
        raise Unreadable(path, f"its slices are unevenly spaced, from {gaps.min():.4g} to {gaps.max():.4g} mm{hint}")
    mean: np.ndarray[Any, Any] = (positions[-1] - positions[0]) / len(gaps)
    aside = mean - normal * float(mean @ normal)
    if np.linalg.norm(aside) > max(0.01 * step, 0.01):
        angle = float(np.degrees(np.arctan2(np.linalg.norm(aside), step)))
        why = "a tilted gantry: straighten the series first, as dcm2niix does"
        raise Unreadable(path, f"its slices are sheared by {angle:.1f} degrees ({why})")
    wander = np.abs(positions - positions[0] - np.arange(len(positions))[:, None] * mean).max()
    if wander > (max(0.05 * step, 0.05) if tolerance_mm is None else max(tolerance_mm, 1e-3)):
        raise Unreadable(path, f"its slices stray by {wander:.3g} mm from one straight line")
    return mean


def frame_planes(path: Path, dataset: Any, frames: int, plane: Plane | None) -> list[Plane] | None:
    """Return one plane per frame (from functional groups, a dose grid, or a classic frame), or None without
    position.
    """
    per_frame = element(dataset, "PerFrameFunctionalGroupsSequence")
    if per_frame is not None:
        if len(per_frame) != frames:
            raise Unreadable(path, f"describes {len(per_frame)} frames and holds {frames}")
        shared = element(dataset, "SharedFunctionalGroupsSequence") or [None]
        groups = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        found = []
        for item in per_frame:
            inner = [first_item(source, name) for source in (item, shared[0]) for name in groups]
            found.append(plane_of(path, *inner))
        known = [each for each in found if each is not None]
        if known and len(known) < frames:
            raise Unreadable(path, f"states the position of {len(known)} of its {frames} frames")
        return known or None
    if plane is None:
        return None
    if frames == 1:
        return [plane]
    offsets = (
        numbers(path, dataset, "GridFrameOffsetVector", frames) if states(dataset, "GridFrameOffsetVector") else None
    )
    if offsets is None:
        return None
    start, normal = np.array(plane.position), plane.normal
    return [replace(plane, position=tuple(start + normal * (o - offsets[0]))) for o in offsets]


_FRAME_MARKS = (  # sequence and element that separate several images in one multi-frame file, in this order
    ("FrameContentSequence", "StackID"),
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("MRImageFrameTypeSequence", "FrameType"),
    ("CTImageFrameTypeSequence", "FrameType"),
)


def images_within(dataset: Any) -> str:
    """Return how many images the frames of a file form, and what distinguishes them; "" if nothing does."""
    frames = element(dataset, "PerFrameFunctionalGroupsSequence") or []
    for group, keyword in _FRAME_MARKS:
        values = [str(element(first_item(frame, group), keyword) or "") for frame in frames if first_item(frame, group)]
        if len(values) == len(frames) and len(set(values)) > 1:
            return f"{len(set(values))} images, distinguished by {keyword}"
    return ""


def first_item(dataset: Any, keyword: str) -> Any:
    """Return the first item of a sequence, or None if there is none."""
    items = element(dataset, keyword) if dataset is not None else None
    return items[0] if items else None


def flat_spacing(path: Path, dataset: Any) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Return the (row, column) spacing of an image without position, and a note on where it was measured."""
    for keyword, where in (
        ("PixelSpacing", "as the header states"),
        ("NominalScannedPixelSpacing", "on the scanned film"),
        ("ImagerPixelSpacing", "at the detector, larger than in the patient"),
    ):
        found = numbers(path, dataset, keyword, 2)
        if found is not None and min(found) > 0:
            return (found[0], found[1]), (f"its pixel spacing is {where}",)
    regions = [
        (numbers(path, r, "PhysicalDeltaY", 1), numbers(path, r, "PhysicalDeltaX", 1))
        for r in element(dataset, "SequenceOfUltrasoundRegions") or []
        if element(r, "PhysicalUnitsXDirection") == element(r, "PhysicalUnitsYDirection") == 3  # 3: centimeters
    ]
    if regions and len(set(regions)) == 1 and regions[0][0] and regions[0][1]:
        steps = abs(regions[0][0][0]) * 10, abs(regions[0][1][0]) * 10
        if min(steps) > 0:
            return steps, ("its pixel spacing is that of its ultrasound region",)
    return (1.0, 1.0), ()
