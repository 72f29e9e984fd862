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
from polyclinic.data.formats.volume import Volume, affine_from, as_image, as_mask

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
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    bad = not np.isfinite(matrix).all() or (lengths < 1e-6).any()
    if bad or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise Unreadable(path, "its affine is singular or not finite: it does not place the voxels in space")
    positioned = int(header["goodRASFlag"]) == 1
    notes: tuple[str, ...] = () if positioned else ("no orientation is stated: left and right are a guess",)
    if mask:
        array = as_mask(path, stored)
    else:
        array, filled = as_image(path, stored, fill)
        notes += filled
    array = array[0] if dims[3] == 1 else array
    units = "label" if mask else ""
    return Volume(array, affine_from(matrix[:3, :3], matrix[:3, 3]), units=units, notes=notes, positioned=positioned)
