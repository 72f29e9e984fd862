"""Reader of MetaImage files (.mha, and .mhd with one data file in the same folder) through SimpleITK.

Format: https://docs.itk.org/en/latest/learn/metaio.html. The header is checked here before SimpleITK opens the file:
its size against the limits, the length of the data, and that the data file is in the same folder.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.formats.safe_reading import (
    LIMITS,
    Limits,
    Unreadable,
    fits,
    inflate,
    read_whole,
    refusing,
    regular_file,
)
from polyclinic.data.formats.volume import (
    UNORIENTED,
    Volume,
    affine_from,
    lps_to_ras,
    spans_space,
    voxels_of,
)
from polyclinic.errors import MissingDependency

_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 8, "ULONG": 8, "FLOAT": 4}
_BYTES |= {"DOUBLE": 8, "LONG_LONG": 8, "ULONG_LONG": 8}
_POSITION = ("transformmatrix", "rotation", "orientation", "offset", "position", "origin")


def read_metaimage(
    path: str | os.PathLike[str], mask: bool = False, fill: float | None = None, limits: Limits = LIMITS
) -> Volume:
    """Read an ``.mha`` or ``.mhd`` file. float32 (mask: int16) of shape [Z, Y, X] or [C, Z, Y, X]."""
    path = Path(path)
    fields, start = _fields(path, limits)
    sizes, channels = _numbers(path, fields, "dimsize"), _numbers(path, fields, "elementnumberofchannels", "1")[0]
    kind = fields.get("elementtype", "").upper().removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in _BYTES or fields.get("objecttype", "Image") != "Image":
        raise Unreadable(path, "is not a MetaImage of numbers")
    if fields.get("ndims") != str(len(sizes)) or not 2 <= len(sizes) <= 4:
        raise Unreadable(path, f"its NDims is not the number of its sizes ({len(sizes)}), or not 2 to 4")
    expected = fits(path, (*sizes, channels), _BYTES[kind], limits)
    _data_file(path, fields, start, expected, limits)
    try:
        import SimpleITK
    except ImportError:
        raise MissingDependency("itk", f"{path.name} is a MetaImage file: reading it needs SimpleITK") from None
    with refusing(path, "is not a sound MetaImage file"):
        image = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO")
        stored = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        stored = np.moveaxis(stored, -1, 0)
    affine = _affine(path, image)
    positioned = any(name in fields for name in _POSITION)
    measured = positioned or "elementspacing" in fields or "elementsize" in fields
    notes: tuple[str, ...] = () if positioned else (UNORIENTED,)
    array, units, filled = voxels_of(path, stored, mask, fill)
    if len(sizes) == 2:
        array = array.unsqueeze(-3)
    if array.ndim > 4:
        raise Unreadable(path, "has channels and four axes, which is not read")
    return Volume(array, affine, units=units, measured=measured, notes=notes + filled, positioned=positioned)


def _fields(path: Path, limits: Limits) -> tuple[dict[str, str], int]:
    """Return the header's fields in lower case, and the start of the data. The header ends at ElementDataFile."""
    regular_file(path, limits)
    with open(path, "rb") as file:
        head = file.read(min(limits.header_bytes, 2**16))
    fields: dict[str, str] = {}
    start = 0
    for line in head.split(b"\n"):
        start += len(line) + 1
        name, mark, value = line.decode("latin-1").partition("=")
        if not mark:
            break
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            return fields, start
    raise Unreadable(path, "does not start with the header of a MetaImage file")


def _numbers(path: Path, fields: dict[str, str], name: str, default: str = "") -> tuple[int, ...]:
    words = fields.get(name, default).split()
    if not words or not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise Unreadable(path, f"its {name} is not a list of whole numbers")
    return tuple(int(word) for word in words)


def _data_file(path: Path, fields: dict[str, str], start: int, expected: int, limits: Limits) -> None:
    """Refuse data outside the file's folder, lists of files, and data of another length than the header states."""
    name = fields["elementdatafile"]
    local = name.upper() == "LOCAL"
    if not local and (
        name.upper() == "LIST" or "%" in name or Path(name).name != name or path.suffix.lower() == ".mha"
    ):
        raise Unreadable(path, "its voxels are not in one file in the same folder")
    data = path if local else path.parent / name
    present = regular_file(data, limits)
    if fields.get("compresseddata", "False").lower() == "true":
        content = read_whole(data, limits)
        packed = content[start:] if local else content
        if (present := len(inflate(path, packed, expected, 15))) < expected:
            raise Unreadable(path, f"is truncated: {present} of the {expected} bytes of the voxels are present")
    elif present - (start if local else 0) < expected:
        raise Unreadable(path, f"is truncated: {present} of the {expected} bytes of the voxels are present")


def _affine(path: Path, image: Any) -> Any:
    """Return the affine in RAS millimeters from SimpleITK's origin, spacing and direction, which are LPS."""
    axes = min(image.GetDimension(), 3)
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:axes, :axes]
    columns, origin = np.eye(3), np.zeros(3)
    columns[:axes, :axes] = direction * np.array(image.GetSpacing()[:axes])
    origin[:axes] = image.GetOrigin()[:axes]
    if not spans_space(columns):
        raise Unreadable(path, "its affine is singular: it does not place the voxels in space")
    return lps_to_ras(affine_from(columns, origin))
