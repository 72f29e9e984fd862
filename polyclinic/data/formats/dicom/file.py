"""Reader of one DICOM file within limits: header, stored pixels, and the name of a missing decoder.

Standard: DICOM PS3.5 (encoding) and PS3.10 (files), https://www.dicomstandard.org/current. pydicom parses and decodes.
Additional checks: a file without the DICM word is refused (never ``force=True``, which reads random bytes as DICOM), a
deflated data set is inflated with a limit first, every stated length is compared with the available bytes, and Rows,
Columns, bits and frames are checked before pixels are decoded. Reasons never quote a value, because the text in a
header may be a name.
"""

import contextlib
import functools
import io
import logging
import math
import os
import stat
import struct
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, inflate, read_whole, refusing
from polyclinic.errors import MissingDependency

_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_UNDEFINED = 0xFFFFFFFF
_JPEG = "pip install python-gdcm"
_DECODERS = {  # transfer syntax: decoder in addition to the `dicom` extra
    "1.2.840.10008.1.2.4.50": ("JPEG baseline", "pip install pillow"),
    "1.2.840.10008.1.2.4.51": ("JPEG extended, 12 bits", _JPEG),
    "1.2.840.10008.1.2.4.57": ("lossless JPEG", _JPEG),
    "1.2.840.10008.1.2.4.70": ("lossless JPEG", _JPEG),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS", "pip install pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS, near-lossless", "pip install pyjpegls"),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000, lossless", "pip install 'polyclinic[dicom]'"),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", "pip install 'polyclinic[dicom]'"),
    "1.2.840.10008.1.2.4.201": ("HTJ2K, lossless", "pip install 'polyclinic[dicom]'"),
    "1.2.840.10008.1.2.4.202": ("HTJ2K, lossless", "pip install 'polyclinic[dicom]'"),
    "1.2.840.10008.1.2.4.203": ("HTJ2K", "pip install 'polyclinic[dicom]'"),
}
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class _Silence:
    """Suppress warnings and log lines of pydicom from the first thread that enters until the last one has left."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:  # levels are left alone: to change them empties the caches of all loggers
                log, silent = logging.getLogger("pydicom"), logging.NullHandler()
                self._stack.callback(setattr, log, "propagate", log.propagate)
                self._stack.callback(setattr, log, "handlers", log.handlers)
                log.propagate, log.handlers = False, [silent]
                self._stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._stack.close()


_SILENCE = _Silence()


def quiet() -> contextlib.AbstractContextManager[None]:
    """Suppress pydicom's warnings and log lines, which quote values, in all threads."""
    return _SILENCE


def require_pydicom() -> Any:
    """Return the pydicom module.

    Raises:
        MissingDependency: If it is not installed.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise MissingDependency("dicom", "reading DICOM needs pydicom") from None
    return pydicom


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Return whether the word DICM is at byte 128."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def open_dicom(path: str | os.PathLike[str], pixels: bool = True, limits: Limits = LIMITS) -> Any:
    """Parse a DICOM file into a pydicom data set (without pixels if ``pixels`` is False).

    Raises:
        Unreadable: If the file is not DICOM, is truncated or damaged, or exceeds the limits.
    """
    pydicom = require_pydicom()
    path = Path(path)
    content = read_whole(path, limits)
    if content[128:132] != b"DICM":
        raise Unreadable(path, "is not a DICOM file (the word DICM is missing at byte 128)")
    syntax, start, at = _meta(path, content)
    if syntax == _DEFLATED:
        body = inflate(path, content[start:], limits.inflated_bytes, -15)
        plain = _DEFLATED[:-3].encode().ljust(len(_DEFLATED), b"\0")  # same length: the group length remains valid
        content = content[:at] + plain + content[at + len(plain) : start] + body
    with quiet(), refusing(path, "its DICOM header is damaged"):
        dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=not pixels, force=False)
        _complete(path, dataset)
    return dataset


def _meta(path: Path, content: bytes) -> tuple[str, int, int]:
    """Return the transfer syntax, the start of the data set, and the position of the syntax's value (PS3.10, 7.1)."""
    position, syntax, at = 132, "", 0
    while position + 8 <= len(content):
        group, element = struct.unpack_from("<HH", content, position)
        if group != 2:
            break
        vr = content[position + 4 : position + 6]
        long = vr in _LONG
        if position + 12 > len(content):
            break
        (length,) = struct.unpack_from("<I" if long else "<H", content, position + (8 if long else 6))
        value = position + (12 if long else 8)
        if value + length > len(content):
            raise Unreadable(path, f"is truncated: element (0002,{element:04x}) reaches beyond the end")
        if element == 0x10:
            syntax, at = content[value : value + length].rstrip(b"\0 ").decode("ascii", "replace"), value
        position = value + length
    if not syntax:
        raise Unreadable(path, "does not state its transfer syntax (0002,0010)")
    return syntax, position, at


def _complete(path: Path, dataset: Any) -> None:
    """Refuse a data set in which an element states another length than the bytes that are present."""
    for element in dataset.elements():
        length, value = getattr(element, "length", None), getattr(element, "value", None)
        if length in (None, _UNDEFINED) or not isinstance(value, bytes):
            continue
        if length != len(value):
            tag = f"({element.tag.group:04x},{element.tag.element:04x})"
            raise Unreadable(path, f"is truncated: element {tag} states {length} bytes, {len(value)} are present")


@functools.cache
def _tag(keyword: str) -> Any:
    return require_pydicom().tag.Tag(keyword)


def element(dataset: Any, keyword: str) -> Any:
    """Return an element's value, or None if it is missing.

    ``dataset.get`` looks the keyword up each time and raises an error for an element that is missing: 20 times slower.
    """
    tag = _tag(keyword)
    return dataset[tag].value if tag in dataset else None


def states(dataset: Any, keyword: str) -> bool:
    """Return whether a data set has an element, possibly an empty one."""
    return _tag(keyword) in dataset


def _unparsed(dataset: Any, keyword: str, vr: str) -> Any:
    """Return an element that pydicom has not parsed yet, if it is of type ``vr``; to parse numbers here is faster."""
    tag = _tag(keyword)
    if tag not in dataset:
        return None
    stored = dataset.get_item(tag)
    return stored if vr == stored.VR and isinstance(stored.value, bytes) else None


def whole_number(path: Path, dataset: Any, keyword: str, default: int | None = None) -> int:
    """Return an integer element, or ``default`` if it is missing or empty; refuse anything but one integer."""
    try:
        stored = _unparsed(dataset, keyword, "US")
        if stored is not None and len(stored.value) == 2:
            return int.from_bytes(stored.value, "little" if stored.is_little_endian else "big")
        value = element(dataset, keyword)
        if value is None or value == "":
            if default is None:
                raise Unreadable(path, f"does not state {keyword}")
            return default
        return int(value)
    except Unreadable:
        raise
    except Exception:  # multi-valued, text, or not a number
        raise Unreadable(path, f"its {keyword} is not a whole number") from None


def numbers(path: Path, dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return ``count`` finite numbers from an element, or None if it is missing or empty."""
    try:
        stored = _unparsed(dataset, keyword, "DS")
        if stored is not None:
            text = stored.value.strip(b" \0")
            values = tuple(map(float, text.split(b"\\"))) if text else ()
        else:
            value = element(dataset, keyword)
            if value is None or value == "":
                return None
            values = tuple(float(v) for v in value) if hasattr(value, "__iter__") else (float(value),)
        if not values:
            return None
    except Exception:
        raise Unreadable(path, f"its {keyword} is not a list of numbers") from None
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise Unreadable(path, f"its {keyword} is not {count} finite number{'s' if count > 1 else ''}")
    return values


def image_shape(path: Path, dataset: Any, limits: Limits = LIMITS) -> tuple[int, int, int, int]:
    """Return (frames, rows, columns, samples) as the header states them, after checking plausibility and limits."""
    rows, columns = whole_number(path, dataset, "Rows"), whole_number(path, dataset, "Columns")
    frames = whole_number(path, dataset, "NumberOfFrames", 1) or 1
    samples, bits = whole_number(path, dataset, "SamplesPerPixel", 1), whole_number(path, dataset, "BitsAllocated")
    if samples not in (1, 3):
        raise Unreadable(path, f"states {samples} samples per pixel, not 1 or 3")
    if bits not in (1, 8, 16, 32, 64):
        raise Unreadable(path, f"states {bits} bits per pixel (BitsAllocated), not 1, 8, 16, 32 or 64")
    if not 1 <= whole_number(path, dataset, "BitsStored", bits) <= bits:
        raise Unreadable(path, "its BitsStored is not between 1 and BitsAllocated")
    fits(path, (frames, rows, columns, samples), max(bits // 8, 1), limits)
    return frames, rows, columns, samples


def stored_pixels(path: str | os.PathLike[str], dataset: Any, limits: Limits = LIMITS) -> np.ndarray[Any, Any]:
    """Return stored values, color as RGB. Shape [frames, rows, columns] or [frames, rows, columns, 3], native byte
    order. The array may be a read-only view of the data set's bytes.
    """
    path, pydicom = Path(path), require_pydicom()
    with quiet(), refusing(path, "its pixels cannot be decoded"):
        keyword = next((k for k in PIXELS if states(dataset, k)), None)
        if keyword is None:
            raise Unreadable(path, "contains no image")
        frames, rows, columns, samples = image_shape(path, dataset, limits)
        syntax = pydicom.uid.UID(dataset.file_meta.TransferSyntaxUID)
        if syntax.is_private or not syntax.is_transfer_syntax:
            raise Unreadable(path, "its transfer syntax is not one of the standard's")
        if syntax.is_compressed and not syntax.is_deflated:
            _decodable(path, dataset, syntax, frames, (rows, columns))
        else:
            bits = 8 * dict(zip(PIXELS, (0, 4, 8), strict=True))[keyword] or whole_number(
                path, dataset, "BitsAllocated"
            )
            share = 2 / 3 if element(dataset, "PhotometricInterpretation") == "YBR_FULL_422" else 1
            expected = math.ceil(math.ceil(frames * rows * columns * samples * bits / 8) * share)
            if (present := len(dataset[keyword].value or b"")) < expected:
                raise Unreadable(path, f"is truncated: {present} of the {expected} bytes of its pixels are present")
        name, remedy = _DECODERS.get(str(syntax), ("", ""))
        hint = f"; a decoder for {name} may help: {remedy}" if remedy == _JPEG else ""
        with refusing(path, f"its pixels cannot be decoded{hint}"):
            array = _plain_values(path, dataset, syntax, frames * rows * columns) if samples == 1 else None
            if array is None:
                array = pydicom.pixels.pixel_array(dataset, view_only=True)
            if element(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
                array = pydicom.pixels.apply_color_lut(array, dataset)
                array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    color = array.ndim > 2 and array.shape[-1] == 3 and (samples == 3 or array.ndim > 2 + (frames > 1))
    wanted = (frames, rows, columns, 3) if color else (frames, rows, columns)
    if array.size != math.prod(wanted):
        raise Unreadable(path, f"decodes to {array.shape}, not to the {wanted} that its header states")
    native: np.ndarray[Any, Any] = array.reshape(wanted)
    return native.astype(native.dtype.newbyteorder("="), copy=False)


def _plain_values(path: Path, dataset: Any, syntax: Any, count: int) -> np.ndarray[Any, Any] | None:
    """Return the first ``count`` gray values if they are stored as they are and need no decoder; None for others.

    Of the bits of a value the lowest ``BitsStored`` count. The others may hold anything, such as overlays, and are
    cleared, or those of a signed value filled with its sign, as pydicom does.
    """
    bits = whole_number(path, dataset, "BitsAllocated")
    used = whole_number(path, dataset, "BitsStored", 0)
    signed = whole_number(path, dataset, "PixelRepresentation", -1)
    gray = element(dataset, "PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    little = not syntax.is_compressed and syntax.is_little_endian
    if not (states(dataset, "PixelData") and gray and little and bits in (8, 16, 32)):
        return None
    if signed not in (0, 1) or not 0 < used <= bits:
        return None
    values = np.frombuffer(dataset.PixelData, f"<{'ui'[signed]}{bits // 8}", count)
    return values if used == bits else (values << (bits - used)) >> (bits - used)


def _decodable(path: Path, dataset: Any, syntax: Any, frames: int, size: tuple[int, int]) -> None:
    """Refuse a compression without decoder, naming it, and compressed frames larger than the header states."""
    pydicom = require_pydicom()
    name, remedy = _DECODERS.get(str(syntax), (f"transfer syntax {syntax}", ""))
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        fix = f"install its decoder: {remedy}" if remedy else "no decoder is known; export it uncompressed"
        raise Unreadable(path, f"is compressed as {name}: {fix}")
    count = 0
    with refusing(path, "its compressed frames are damaged"):
        for frame in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames):
            inside, count = _codec_size(frame), count + 1
            if inside is not None and inside != size:
                raise Unreadable(path, f"frame {count} is compressed from {inside} pixels, its header says {size}")
    if count < frames:
        raise Unreadable(path, f"holds {count} of the {frames} frames that its header states")


def _codec_size(frame: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) as a JPEG, JPEG-LS or JPEG 2000 stream states them; None for other streams."""
    at = frame[:4096].find(b"\xff\x4f\xff\x51")
    if at >= 0 and len(frame) >= at + 24:  # JPEG 2000: SIZ has the extent less the offset
        wide, high, left, top = struct.unpack_from(">IIII", frame, at + 8)
        return high - top, wide - left
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker in (0xF7, *range(0xC0, 0xD0)) and marker not in (0xC4, 0xC8, 0xCC):
            high, wide = struct.unpack_from(">HH", frame, at + 5)
            return high, wide
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big") if marker != 0xFF else 1
    return None
