"""Reader of FreeSurfer volumes (.mgz, .mgh), checked before they are decoded.

Format: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat. nibabel parses the header and builds the affine.
"""

import gzip
import importlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, read_exactly, regular_file
from polyclinic.data.formats.volume import UNORIENTED, Volume, affine_from, spans_space, voxels_of

_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}
_HEADER, _VOXELS = 90, 284  # bytes that are read, and the byte at which voxels start


def read_mgh(
    path: str | os.PathLike[str], mask: bool = False, fill: float | None = None, limits: Limits = LIMITS
) -> Volume:
    """Read an ``.mgz`` or ``.mgh`` file. float32 (mask: int16) of shape [Z, Y, X], or [C, Z, Y, X] with frames."""
    nibabel: Any = importlib.import_module("nibabel")
    path = Path(path)
    regular_file(path, limits)
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=plain) if packed else plain
        block = read_exactly(path, stream, _VOXELS, "header")
        header = nibabel.freesurfer.mghformat.MGHHeader(block[:_HEADER], check=False)
        dims, code = tuple(int(n) for n in header["dims"]), int(header["type"])
        if int(header["version"]) != 1 or code not in _TYPES:
            raise Unreadable(path, "is not a FreeSurfer volume of version 1 with a known type of numbers")
        dtype = np.dtype(_TYPES[code])
        raw = read_exactly(path, stream, fits(path, dims, dtype.itemsize, limits), "voxels")
    stored = np.frombuffer(raw, dtype=dtype).reshape(dims[::-1]).astype(dtype.newbyteorder("="))
    matrix = np.array(header.get_affine(), dtype=np.float64)
    if not np.isfinite(matrix).all() or not spans_space(matrix[:3, :3]):
        raise Unreadable(path, "its affine is singular or not finite: it does not place the voxels in space")
    positioned = int(header["goodRASFlag"]) == 1
    notes: tuple[str, ...] = () if positioned else (UNORIENTED,)
    array, units, filled = voxels_of(path, stored, mask, fill)
    array = array[0] if dims[3] == 1 else array
    return Volume(
        array, affine_from(matrix[:3, :3], matrix[:3, 3]), units=units, notes=notes + filled, positioned=positioned
    )
