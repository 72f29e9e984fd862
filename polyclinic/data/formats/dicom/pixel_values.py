"""Values of a DICOM image in their units: modality slope, intercept or table, dose, inverted display, color.

Standard: DICOM PS3.3, C.7.6.3.1.2 (photometric interpretation), C.11.1 (modality LUT), C.7.6.16.2.9 (per-frame values),
C.8.8.3 (dose grid).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.formats.dicom.file import (
    element,
    numbers,
    quiet,
    require_pydicom,
    states,
    stored_pixels,
    whole_number,
)
from polyclinic.data.formats.dicom.geometry import first_item
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing
from polyclinic.data.formats.volume import as_image

_QUANTITATIVE = ("CT", "PT", "RTDOSE")  # an inverted display must not invert their values


def values_of(
    path: Path, dataset: Any, fill: float | None = None, limits: Limits = LIMITS
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Return frames in their units (float32 [F, Y, X] or uint8 [3, F, Y, X]), the units, and notes."""
    stored = stored_pixels(path, dataset, limits)
    if stored.ndim == 4:
        if stored.dtype != np.uint8:
            raise Unreadable(path, f"is a color image of {stored.dtype.itemsize * 8} bits a channel; 8 are read")
        return torch.from_numpy(np.require(np.moveaxis(stored, -1, 0), requirements=["C", "W"])), "RGB", ()
    notes: tuple[str, ...] = ()
    unscaled = stored
    with quiet(), refusing(path, "its values cannot be computed"):
        modality = str(element(dataset, "Modality") or "")
        if element(dataset, "PhotometricInterpretation") == "MONOCHROME1":
            if modality in _QUANTITATIVE:
                notes = ("MONOCHROME1 changes the display only: its values are kept",)
            else:
                stored, notes = _inverted(path, dataset, stored), ("MONOCHROME1 is inverted: higher is brighter",)
        slope, inter = _slopes(path, dataset, stored.shape[0])
        if first_item(dataset, "ModalityLUTSequence") is not None:
            stored = np.asarray(require_pydicom().pixels.apply_modality_lut(stored, dataset))
        rescale_type = _rescale_type(dataset)
        scaled = _states_rescale(dataset)
        padding = _padding(path, dataset, unscaled)
    if len({*slope}) == len({*inter}) == 1:
        values, filled = as_image(path, stored, fill, slope[0], inter[0])
    else:
        parts = [as_image(path, s, fill, a, b) for s, a, b in zip(stored, slope, inter, strict=True)]
        values, filled = torch.stack([part[0] for part in parts]), tuple(note for part in parts for note in part[1])
    if padding is not None:
        if fill is not None:
            values = torch.where(torch.from_numpy(padding), torch.tensor(float(fill)), values)
            notes += ("padding voxels (PixelPaddingValue) were replaced by the fill value",)
        else:
            notes += ("contains padding voxels (PixelPaddingValue), which were not measured; fill = ... replaces them",)
    if modality == "CT" and not scaled:
        notes += ("CT without rescale slope and intercept: its values are not Hounsfield units",)
    units = {"CT": "HU" if rescale_type == "HU" and scaled else "", "RTDOSE": "Gy"}.get(modality, "")
    return values, units, notes + filled


def _states_rescale(dataset: Any) -> bool:
    """Return whether the header states how stored values become units: for the file, for all frames or for each."""
    if states(dataset, "RescaleSlope") or states(dataset, "RescaleIntercept") or states(dataset, "ModalityLUTSequence"):
        return True
    groups = (element(dataset, "SharedFunctionalGroupsSequence"), element(dataset, "PerFrameFunctionalGroupsSequence"))
    return any(g and first_item(g[0], "PixelValueTransformationSequence") is not None for g in groups)


def _rescale_type(dataset: Any) -> str:
    """Return the units that the header states for rescaled values, in capitals; "HU" if it states none."""
    groups = [element(dataset, f"{which}FunctionalGroupsSequence") for which in ("PerFrame", "Shared")]
    inner = [first_item(frame, "PixelValueTransformationSequence") for group in groups for frame in group or []]
    found = {str(element(one, "RescaleType") or "") for one in (dataset, *inner) if one is not None} - {""}
    return found.pop().upper() if len(found) == 1 else "HU" if not found else "SEVERAL"


def _padding(path: Path, dataset: Any, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Return which stored values are padding (PS3.3, C.7.5.1.1.2), or None if none are."""
    if not states(dataset, "PixelPaddingValue"):
        return None
    first = _stored_number(path, dataset, "PixelPaddingValue")
    limit = (
        _stored_number(path, dataset, "PixelPaddingRangeLimit") if states(dataset, "PixelPaddingRangeLimit") else first
    )
    low, high = sorted((first, limit))
    found: np.ndarray[Any, Any] = (stored >= low) & (stored <= high)
    return found if bool(found.any()) else None


def _stored_number(path: Path, dataset: Any, keyword: str) -> int:
    """Return a value in the representation of the pixels: some writers state negative numbers as unsigned ones."""
    bits, raw = whole_number(path, dataset, "BitsAllocated"), element(dataset, keyword)
    value = int.from_bytes(raw[:2], "little") if isinstance(raw, bytes) else whole_number(path, dataset, keyword)
    signed = whole_number(path, dataset, "PixelRepresentation", 0) == 1
    if signed and value >= 2 ** (bits - 1):
        return value - (1 << bits)
    return value + (1 << bits) if not signed and value < 0 else value


def _slopes(path: Path, dataset: Any, frames: int) -> tuple[list[float], list[float]]:
    """Return slope and intercept of each frame; 1 and 0 if not stated."""
    shared = first_item(first_item(dataset, "SharedFunctionalGroupsSequence"), "PixelValueTransformationSequence")
    groups = element(dataset, "PerFrameFunctionalGroupsSequence") or [None] * frames
    slopes, inters = [], []
    for item in list(groups)[:frames]:
        own = first_item(item, "PixelValueTransformationSequence")
        source = own if own is not None else shared if shared is not None else dataset
        keyword = "DoseGridScaling" if states(dataset, "DoseGridScaling") else "RescaleSlope"
        slope, inter = numbers(path, source, keyword, 1), numbers(path, source, "RescaleIntercept", 1)
        if slope is not None and slope[0] == 0:
            raise Unreadable(path, f"its {keyword} is 0: every value would be the same")
        slopes.append(slope[0] if slope else 1.0)
        inters.append(inter[0] if inter else 0.0)
    if len(slopes) != frames:
        raise Unreadable(path, f"describes {len(slopes)} frames and contains {frames}")
    return slopes, inters


def _inverted(path: Path, dataset: Any, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ``lowest + highest - value``, over the range of the stored bits."""
    bits = whole_number(path, dataset, "BitsStored", whole_number(path, dataset, "BitsAllocated"))
    signed = whole_number(path, dataset, "PixelRepresentation", 0) == 1
    if stored.dtype.kind == "f":
        raise Unreadable(path, "is MONOCHROME1 with floating point pixels, whose range is not stated")
    total = -1 if signed else 2**bits - 1
    inverted: np.ndarray[Any, Any] = total - stored.astype(np.int64)
    return inverted
