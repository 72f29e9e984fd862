"""Reader of NIfTI files (.nii, .nii.gz, .hdr with .img) and Analyze 7.5: images and masks in 2, 3 and 4 dimensions.

Format: Cox et al., "A (sort of) new image data format standard: NIfTI-1", 2004, and nifti2.h
(https://nifti.nimh.nih.gov). nibabel parses the header and builds the affine; the voxel bytes are read here, so that a
compressed file never inflates beyond what its header states and the limits allow. Where the standard leaves a choice
(slope of NaN, qfac of 0) the readers of nibabel and ITK are followed.
"""

import contextlib
import gzip
import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, read_exactly, regular_file
from polyclinic.data.formats.volume import UNORIENTED, Volume, affine_from, as_image, as_mask, spans_space

_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's spatial units (none stated, meter, mm, micron) in mm


def is_nifti(path: str | os.PathLike[str]) -> bool:
    """Return whether the file name is that of a NIfTI file, or of the header of a pair."""
    return str(path).lower().endswith((".nii", ".nii.gz", ".hdr"))


def read_nifti(
    path: str | os.PathLike[str], mask: bool = False, fill: float | None = None, limits: Limits = LIMITS
) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` file, or an ``.hdr`` file with the ``.img`` file next to it.

    Args:
        mask: Read labels: integers from 0 to 32767 as int16, not scaled to float.
        fill: Replacement of voxels that are not finite numbers; None to refuse such a file.
        limits: Limits on the file.

    Returns:
        float32 (RGB: uint8; mask: int16) of shape [Z, Y, X]; a 4th or 5th dimension (time, channels) comes first.
    """
    path = Path(path)
    if not is_nifti(path):
        raise Unreadable(path, "is not named .nii, .nii.gz or .hdr")
    pair = path.suffix.lower() == ".hdr"
    with _stream(path, limits) as stream:
        header, dtype, shape, skip = _header(path, stream, limits, pair)
        size = fits(path, shape, dtype.itemsize, limits)
        if not pair:
            read_exactly(path, stream, skip, "header's extensions")
            raw = read_exactly(path, stream, size, "voxels")
    if pair:
        data = _voxels_of(path)
        with _stream(data, limits) as stream:
            read_exactly(data, stream, skip, "bytes before the voxels")
            raw = read_exactly(data, stream, size, "voxels")
    slope, inter = _scaling(path, header)
    affine, positioned, notes = _affine(path, header)
    stored = np.frombuffer(raw, dtype=dtype).reshape(shape[::-1])  # the file's first axis is the fastest
    if dtype.names:  # RGB: three bytes a voxel
        if mask:
            raise Unreadable(path, "is a color image, not a mask of labels")
        color = np.stack([stored[name] for name in ("R", "G", "B")])
        rgb = _axes(torch.from_numpy(color), lead=1)
        return Volume(rgb, affine, units="RGB", notes=notes, positioned=positioned, full_scale=255)
    if mask:
        labels = stored if (slope, inter) == (1.0, 0.0) else stored.astype(np.float64) * slope + inter
        return Volume(_axes(as_mask(path, labels)), affine, units="label", notes=notes, positioned=positioned)
    values, filled = as_image(path, stored, fill, slope, inter)
    array = _axes(values)
    if array.ndim > 3 and array.shape[0] > 1:
        notes += (f"its {array.shape[0]} volumes (a fourth dimension) are read as channels",)
    return Volume(array, affine, notes=notes + filled, positioned=positioned)


def header_of(path: Path) -> Any:
    """Return nibabel's header of a .nii or .nii.gz file, which is compressed or not, whatever its name says.

    Raises:
        Unreadable: If it cannot be read.
    """
    with _stream(path, LIMITS) as stream:
        header = _header(path, stream, LIMITS, False)[0]
    _complete_qfac(header)
    return header


@contextlib.contextmanager
def _stream(path: Path, limits: Limits) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Open a regular file for reading, through gzip if its content is compressed."""
    regular_file(path, limits)
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        yield gzip.GzipFile(fileobj=plain) if packed else plain


def _voxels_of(path: Path) -> Path:
    """Return the .img file that belongs to an .hdr file."""
    found = [path.with_suffix(suffix) for suffix in (".img", ".IMG", ".img.gz")]
    data = next((file for file in found if file.is_file()), None)
    if data is None:
        raise Unreadable(path, "is a header; its .img file is not next to it")
    return data


def _header(
    path: Path, stream: BinaryIO | gzip.GzipFile, limits: Limits, pair: bool
) -> tuple[Any, np.dtype[Any], tuple[int, ...], int]:
    """Return the header, the dtype, the shape (fastest axis first), and the bytes between header and voxels."""
    nibabel: Any = importlib.import_module("nibabel")
    start = read_exactly(path, stream, 348, "header")
    size = int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")
    two = 540 in size
    if not two and 348 not in size:
        raise Unreadable(path, "does not start with a NIfTI header")
    block = start + read_exactly(path, stream, 540 - 348, "header") if two else start
    if pair and not two and block[344:347] != b"ni1":  # Analyze 7.5, which has no magic word
        kind = nibabel.spm2analyze.Spm2AnalyzeHeader
    elif pair:
        kind = nibabel.nifti2.Nifti2PairHeader if two else nibabel.nifti1.Nifti1PairHeader
    else:
        kind = nibabel.Nifti2Header if two else nibabel.Nifti1Header
    header = kind(block, check=False)
    if not pair and bytes(header["magic"])[:2] != b"n+":
        raise Unreadable(path, "is not a single NIfTI file (its magic word is not n+1 or n+2)")
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7 or any(n < 1 for n in dims[1 : dims[0] + 1]):
        raise Unreadable(path, f"has impossible dimensions {dims[: max(min(dims[0], 7), 0) + 1]}")
    shape = tuple(dims[1 : dims[0] + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError):
        raise Unreadable(path, f"states the unknown data type {code}") from None
    if dtype.kind not in "iuf" and dtype.names != ("R", "G", "B"):
        raise Unreadable(path, f"states the data type {code}, which is not a real number or RGB")
    if dtype.itemsize > 8:
        raise Unreadable(path, f"states numbers of {dtype.itemsize} bytes; save it as float32")
    offset, first = float(header["vox_offset"]), 0 if pair else len(block)
    if not math.isfinite(offset) or not (first <= offset <= limits.header_bytes):
        raise Unreadable(path, f"states that its voxels start at byte {offset:g}, which is impossible")
    return header, dtype, shape, int(offset) - first


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    """Return slope and intercept. A slope of 0 or NaN means no scaling, as in nibabel and ITK."""
    if "scl_inter" not in header:  # Analyze
        slope, inter = header.get_slope_inter()
        return (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(inter):
        raise Unreadable(path, "its intensity intercept is not a finite number")
    return slope, inter


def _affine(path: Path, header: Any) -> tuple[Tensor, bool, tuple[str, ...]]:
    """Return the affine in RAS millimeters, whether an orientation is stated, and notes."""
    notes = []
    analyze = "sform_code" not in header
    code = 0 if analyze else int(header["xyzt_units"]) & 7
    if code not in _MM:
        raise Unreadable(path, f"states the unknown unit of length {code}")
    if _MM[code] != 1:
        notes.append("lengths are converted to millimeters")
    sform, qform = (0, 0) if analyze else (int(header["sform_code"]), int(header["qform_code"]))
    if not sform and not qform:
        notes.append(UNORIENTED)
    widths = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not np.isfinite(widths[: min(int(header["dim"][0]), 3)]).all():
        raise Unreadable(path, "its voxel size is not a finite number")
    if not analyze:
        _complete_qfac(header)
    try:
        matrix = np.array(header.get_best_affine(), dtype=np.float64)
    except Exception as error:  # nibabel refuses impossible quaternions with several types
        raise Unreadable(path, f"its orientation cannot be computed ({type(error).__name__})") from None
    if not np.isfinite(matrix).all():
        raise Unreadable(path, "its affine contains numbers that are not finite")
    for axis in range(3):  # a 2-D file may leave the third direction empty
        if axis >= int(header["dim"][0]) and not matrix[:3, axis].any():
            matrix[:3, axis] = np.cross(matrix[:3, (axis + 1) % 3], matrix[:3, (axis + 2) % 3])
            matrix[:3, axis] /= np.linalg.norm(matrix[:3, axis]) or 1.0
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not spans_space(matrix[:3, :3]):
        raise Unreadable(path, "its affine is singular: it does not place the voxels in space")
    if sform and qform and (note := _disagreement(header, matrix)):
        notes.append(note)
    across = matrix[:3, :3] / lengths
    if np.abs(across.T @ across - np.eye(3)).max() > 0.01:
        notes.append("its axes are not perpendicular (the image is sheared); sizes are measured along the axes")
    if sform and not np.allclose(lengths, np.abs(widths), rtol=0.01, atol=1e-3):
        notes.append("its affine and its voxel size disagree; the affine is used")
    lengths = lengths * _MM[code]
    if lengths.max() > 100 or lengths.min() < 1e-3:
        notes.append(f"its voxels measure {lengths.min():.3g} to {lengths.max():.3g} mm: is the unit right?")
    matrix[:3] *= _MM[code]
    return affine_from(matrix[:3, :3], matrix[:3, 3]), bool(sform or qform), tuple(notes)


def _complete_qfac(header: Any) -> None:
    """Replace a sign of the third axis (``qfac``) that is neither -1 nor 1; nifti1.h: 0 is taken as 1."""
    if float(header["pixdim"][0]) not in (-1.0, 1.0):
        header["pixdim"][0] = -1.0 if float(header["pixdim"][0]) < 0 else 1.0


def _disagreement(header: Any, matrix: np.ndarray[Any, Any]) -> str:
    """Return a note if the qform places the voxels differently from the sform, which is used; empty otherwise."""
    try:
        other = np.array(header.get_qform(), dtype=np.float64)
    except Exception:  # an impossible quaternion, which is not used
        return "its qform is invalid; the sform is used"
    signs = [np.sign(np.linalg.det(m[:3, :3])) for m in (matrix, other)]
    if signs[0] != signs[1]:
        return "its sform and qform are mirror images of each other: left and right may be exchanged; the sform is used"
    sizes = np.maximum(np.asarray(header["dim"][1:4], dtype=np.float64) - 1, 0)
    moved = np.abs(matrix[:3] - other[:3]) @ np.append(sizes, 1)
    side = np.linalg.norm(matrix[:3, :3], axis=0).min()
    return "its sform and qform place the voxels differently; the sform is used" if moved.max() > side / 2 else ""


def _axes(array: Tensor, lead: int = 0) -> Tensor:
    """Return [(C,) Z, Y, X] from slow-to-fast axes: a picture gains Z, a 4th dimension is C, a 5th is merged
    into it.
    """
    while array.ndim < 3 + lead:
        array = array.unsqueeze(lead)
    if array.ndim > 4:
        array = array.flatten(0, array.ndim - 4)
    return array
