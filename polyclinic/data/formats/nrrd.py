"""Reader of NRRD files (.nrrd, and .nhdr with one data file in the same folder), without further dependencies.

Format: Kindlmann, "Definition of NRRD File Format", https://teem.sourceforge.net/nrrd/format.html. Reads raw and gzip
encodings, all integer and float types, 2 to 4 axes of which at most one is not spatial (channels, ``none`` among the
space directions), and the spaces LPS, RAS and LAS. Everything else is refused with the reason.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, inflate, read_whole, regular_file
from polyclinic.data.formats.volume import UNORIENTED, Volume, affine_from, spans_space, voxels_of

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_CODES = {name: code for code, names in _TYPES.items() for name in names}
_TO_RAS = {  # signs that turn a space into right-anterior-superior
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}


def read_nrrd(
    path: str | os.PathLike[str], mask: bool = False, fill: float | None = None, limits: Limits = LIMITS
) -> Volume:
    """Read an NRRD file.

    Args:
        mask: Read labels: integers from 0 to 32767 as int16.
        fill: Replacement of voxels that are not finite numbers; None to refuse such a file.
        limits: Limits on the file.

    Returns:
        float32 (mask: int16) of shape [Z, Y, X] or [C, Z, Y, X], in RAS millimeters.
    """
    path = Path(path)
    content = read_whole(path, limits)
    fields, start = _fields(path, content, limits)
    sizes, dtype = _sizes(path, fields), _dtype(path, fields)
    expected = fits(path, sizes, dtype.itemsize, limits)
    data = _data(path, fields, content[start:], expected, limits)
    stored = np.frombuffer(data, dtype=dtype).reshape(sizes[::-1])
    affine, channel, measured, notes = _space(path, fields, sizes)
    positioned = "space directions" in fields
    if channel is not None:
        stored = np.moveaxis(stored, stored.ndim - 1 - channel, 0)
    array, units, filled = voxels_of(path, stored, mask, fill)
    if array.ndim == 2 or (channel is not None and array.ndim == 3):  # a picture gains Z
        array = array.unsqueeze(-3)
    return Volume(array, affine, units=units, measured=measured, notes=notes + filled, positioned=positioned)


def _fields(path: Path, content: bytes, limits: Limits) -> tuple[dict[str, str], int]:
    """Return the header's fields in lower case, and the start of the data."""
    if not re.match(rb"NRRD000[1-5]\r?\n", content[:10]):
        raise Unreadable(path, "does not start with NRRD0001 to NRRD0005")
    end = re.search(rb"\r?\n\r?\n", content[: limits.header_bytes])
    detached = path.suffix.lower() == ".nhdr"
    if end is None and not detached:
        raise Unreadable(path, f"its header does not end within {limits.header_bytes} bytes")
    stop = end.start() if end else min(len(content), limits.header_bytes)
    fields: dict[str, str] = {}
    for line in content[:stop].decode("latin-1").splitlines()[1:]:
        name, colon, value = line.partition(": ")
        if line.startswith("#") or not colon or ":=" in name:
            continue  # a comment, or a free key/value pair
        if (name := name.strip().lower()) in fields:
            raise Unreadable(path, "states a header field twice")
        fields[name] = value.strip()
    return fields, end.end() if end else len(content)


def _sizes(path: Path, fields: dict[str, str]) -> tuple[int, ...]:
    text = fields.get("sizes", "").split()
    if not text or not all(re.fullmatch(r"\d{1,18}", n) for n in text):
        raise Unreadable(path, "its sizes are not whole numbers")
    sizes = tuple(int(n) for n in text)
    if fields.get("dimension") != str(len(sizes)):
        raise Unreadable(path, f"its dimension is not the number of its sizes ({len(sizes)})")
    if not 2 <= len(sizes) <= 4:
        raise Unreadable(path, f"has {len(sizes)} axes; 2 to 4 are read")
    return sizes


def _dtype(path: Path, fields: dict[str, str]) -> np.dtype[Any]:
    code = _CODES.get(fields.get("type", "").lower())
    if code is None:
        raise Unreadable(path, "its type is not an integer or floating point number")
    endian = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower())
    if endian is None and code[1] != "1":
        raise Unreadable(path, "does not state its byte order (endian: little or big)")
    return np.dtype((endian or "|") + code)


def _data(path: Path, fields: dict[str, str], rest: bytes, expected: int, limits: Limits) -> bytes:
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise Unreadable(path, "its encoding is not raw or gzip (save it again with one of these)")
    for skip in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(skip, "0") not in ("0",):
            raise Unreadable(path, f"asks for a {skip}, which is not read")
    name = fields.get("data file", fields.get("datafile"))
    if name is not None:
        if Path(name).name != name or name in ("", ".", "..") or "%" in name or name.upper().startswith("LIST"):
            raise Unreadable(path, "its data file must be one file in the same folder")
        regular_file(path.parent / name, limits)
        rest = read_whole(path.parent / name, limits)
    elif path.suffix.lower() == ".nhdr":
        raise Unreadable(path, "is a header that names no data file")
    data = rest if encoding == "raw" else inflate(path, rest, expected, 31)
    if len(data) < expected:
        raise Unreadable(path, f"is truncated: {len(data)} of the {expected} bytes of the voxels are present")
    return data[:expected]


def _vector(path: Path, text: str) -> list[float] | None:
    """Return ``(1,0,0)`` as numbers; None for ``none``."""
    if text == "none":
        return None
    parts = text[1:-1].split(",") if text.startswith("(") and text.endswith(")") else []
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise Unreadable(path, "a space direction or origin is not three finite numbers")
    return numbers


def _space(
    path: Path, fields: dict[str, str], sizes: tuple[int, ...]
) -> tuple[Tensor, int | None, bool, tuple[str, ...]]:
    """Return the affine in RAS, the axis of channels, whether a voxel size is stated, and notes."""
    if "space directions" not in fields:
        return _spacings_only(path, fields, sizes)
    space = fields.get("space", "").lower()
    if space not in _TO_RAS:
        raise Unreadable(path, "its space is not left-posterior-superior, right-anterior- or left-anterior-superior")
    text = re.sub(r"\s*([(),])\s*", r"\1", fields["space directions"]).replace(")(", ") (").replace("none(", "none (")
    vectors = [_vector(path, part) for part in text.replace(")none", ") none").split()]
    if len(vectors) != len(sizes):
        raise Unreadable(path, f"states {len(vectors)} space directions for {len(sizes)} axes")
    spatial = [v for v in vectors if v is not None]
    channels = [axis for axis, v in enumerate(vectors) if v is None]
    if len(channels) > 1 or not 2 <= len(spatial) <= 3:
        raise Unreadable(path, "has more than one axis that is not in space")
    if len(spatial) == 2:
        across = np.cross(spatial[0], spatial[1])
        spatial.append([float(n) for n in across / (np.linalg.norm(across) or 1.0)])
    origin = _vector(path, re.sub(r"\s", "", fields.get("space origin", "(0,0,0)"))) or [0.0, 0.0, 0.0]
    signs = np.array(_TO_RAS[space], dtype=np.float64)
    columns = np.array(spatial).T * signs[:, None]
    if not spans_space(columns):
        raise Unreadable(path, "its space directions are singular: they do not place the voxels in space")
    notes = ("no origin is stated",) if "space origin" not in fields else ()
    return affine_from(columns, np.array(origin) * signs), channels[0] if channels else None, True, notes


def _spacings_only(
    path: Path, fields: dict[str, str], sizes: tuple[int, ...]
) -> tuple[Tensor, int | None, bool, tuple[str, ...]]:
    words = fields.get("spacings", " ".join(["nan"] * len(sizes))).split()
    try:
        widths = [abs(float(word)) for word in words]
    except ValueError:
        widths = []
    if len(widths) != len(sizes) or any(w == 0 or w == float("inf") for w in widths):
        raise Unreadable(path, "its spacings are not one positive number per axis")
    if len(sizes) == 4:
        raise Unreadable(path, "has 4 axes and no space directions to say which are in space")
    measured = all(w == w for w in widths)
    steps = [w if w == w else 1.0 for w in widths] + [1.0] * (3 - len(widths))
    return affine_from(np.diag(steps), np.zeros(3)), None, measured, (UNORIENTED,)
