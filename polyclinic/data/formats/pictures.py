"""Reader of pictures (PNG, JPEG, TIFF, BMP, WebP): stored values, the value of full brightness, and orientation.

Pillow decodes pictures. TIFF files, whose numbers may be of any type, byte order and layout, are described and, as far
as it has a bounded decoder, decoded by tifffile. No value is clipped or reduced to 8 bits.
"""

import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, inflate, refusing, regular_file
from polyclinic.errors import MissingDependency

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_PLAIN = ("L", "RGB", "F", "I", "I;16", "I;16B", "I;16L")  # modes of Pillow whose values are kept
_DEFLATE, _BOUNDED = (8, 32946), (1, 8, 32946, 32773)  # TIFF compressions: deflate; none, deflate and PackBits
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # TIFF photometric interpretations
GRAY_ALPHA, COLORS = 4, (2, 6)  # color types of PNG
_TURNS = {  # EXIF orientation: what makes the picture upright, on [Y, X, ...]
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True)
class Pixels:
    """Picture as stored.

    Attributes:
        array: Shape [Y, X] or [Y, X, C], native byte order, not turned.
        full_scale: The value of full brightness; None for signed and floating point numbers.
        orientation: EXIF orientation, 1 to 8; 1 if none is stated.
        lossy: Whether compression has changed values (JPEG, WebP).
        notes: Observations of the reader.
        transparent: Whether the picture has transparency that differs from pixel to pixel, which is left out.
    """

    array: np.ndarray[Any, Any]
    full_scale: float | None
    orientation: int = 1
    lossy: bool = False
    notes: tuple[str, ...] = ()
    transparent: bool = False

    @property
    def upright(self) -> np.ndarray[Any, Any]:
        """The array as it is meant to be shown."""
        return turned_by(self.array, self.orientation)


def turned_by(array: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Return a picture of an EXIF ``orientation`` turned upright."""
    return np.ascontiguousarray(_TURNS[orientation](array)) if orientation in _TURNS else array


def read_picture(path: str | os.PathLike[str], limits: Limits = LIMITS) -> Pixels:
    """Read a picture of one page.

    Raises:
        Unreadable: If it is damaged, too large, has several pages, or its values cannot be read without loss.
    """
    path = Path(path)
    regular_file(path, limits)
    with open(path, "rb") as file:
        head = file.read(64)
    tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    with refusing(path, "is not a sound PNG, JPEG, TIFF, BMP or WebP picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _tiff(path, limits) if tiff else _pillow(path, head, limits)


def _pillow(path: Path, head: bytes, limits: Limits, inverted: bool = False) -> Pixels:
    """Read a picture with Pillow.

    Args:
        path: The file.
        head: Its first 64 bytes.
        limits: Limits on the file.
        inverted: Whether 0 is white in numbers that Pillow does not invert.
    """
    from PIL import Image

    lossless = b"VP8L" in head  # WebP
    try:
        picture = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise Unreadable(path, "claims more pixels than a picture may have") from None
    with picture:
        wide, high = picture.size
        fits(path, (high, wide, len(picture.getbands())), 1, limits)
        if (pages := getattr(picture, "n_frames", 1)) > 1:
            raise Unreadable(path, f"holds {pages} pages; save one image per file")
        jpeg = picture.format == "JPEG" or "jpeg" in str(picture.info.get("compression", ""))
        lossy = jpeg or (picture.format == "WEBP" and not lossless)
        orientation = int(picture.getexif().get(0x0112, 1) or 1)
        depth, kind = _png_kind(head)
        if depth == 16 and kind == GRAY_ALPHA:
            raise Unreadable(path, "is gray in 16 bits with transparency; save it without transparency")
        if depth == 16 and kind in COLORS:
            fits(path, (high, wide, len(picture.getbands())), 2, limits)
            return Pixels(_sixteen_bit_colors(path), 65535.0, orientation if orientation in _TURNS else 1)
        picture.load()
        transparent = _is_transparent(picture)
        notes = ("its transparency is left out: pixels have the colors that are stored",) if transparent else ()
        if picture.mode == "CMYK":
            notes = ("its colors are for printing (CMYK), and are converted without their profile",)
        gray = picture.mode in ("1", "LA", "La")
        array = np.array(picture if picture.mode in _PLAIN else picture.convert("L" if gray else "RGB"))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.int32 and picture.format == "PNG":  # 16 bits in older versions of Pillow
        array = array.astype(np.uint16)
    scale = float(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else None
    array = (np.iinfo(array.dtype).max - array) if inverted and array.dtype.kind == "u" else array
    return Pixels(array, scale, orientation if orientation in _TURNS else 1, lossy, notes, transparent)


def _is_transparent(picture: Any) -> bool:
    """Return whether a decoded picture has transparency that differs from pixel to pixel."""
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if "A" not in picture.getbands():
        return False
    low, high = picture.getchannel("A").getextrema()
    return bool(low < high)


def _png_kind(head: bytes) -> tuple[int, int]:
    """Return bit depth and color type of a PNG from its first bytes; (0, 0) of other files."""
    return (head[24], head[25]) if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) > 25 else (0, 0)


def _sixteen_bit_colors(path: Path) -> np.ndarray[Any, Any]:
    """Return a PNG of 16 bits per color without transparency; Pillow would keep 8."""
    try:
        import SimpleITK
    except ImportError:
        raise MissingDependency("itk", f"{path.name} has 16 bits per color: reading it needs SimpleITK") from None
    array: np.ndarray[Any, Any] = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), imageIO="PNGImageIO"))
    return array[..., :3]


def _tiff(path: Path, limits: Limits) -> Pixels:
    tifffile: Any = importlib.import_module("tifffile")
    with tifffile.TiffFile(path) as file:
        pages = [page for page in file.pages if not page.keyframe.is_reduced]
        images = sum(int(np.prod(level.shape)) for level in file.series[:1]) // max(int(np.prod(pages[0].shape)), 1)
        if len(pages) > 1 or images > 1:
            raise Unreadable(path, f"holds {max(len(pages), images)} pages; save one image per file")
        page = pages[0].keyframe
        if page.imagedepth > 1 or page.ndim not in (2, 3):
            raise Unreadable(path, f"has {page.ndim} axes; a picture has rows, columns and channels")
        bits, photometric = page.bitspersample, int(page.photometric)
        bits = max(bits) if isinstance(bits, tuple) else int(bits)
        fits(path, page.shape, max(bits // 8, 1), limits)
        orientation = int(getattr(page.tags.get(0x0112), "value", 1))
        if page.dtype is not None and page.dtype.kind == "c":
            raise Unreadable(path, "holds complex numbers; save their magnitude or their parts")
        plain = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) and bits in (8, 16, 32, 64)
        inverted = photometric == _WHITE_IS_ZERO
        if not plain or int(page.compression) not in _BOUNDED or page.dtype is None:
            if bits > 8 and not (page.samplesperpixel == 1 and bits in (16, 32) and page.dtype is not None and plain):
                raise Unreadable(
                    path,
                    f"is a TIFF of {bits} bits in {page.samplesperpixel} channels with a compression or color model "
                    "that is not read; save it uncompressed or with deflate",
                )
            if orientation in _TURNS:  # Pillow does not turn all of them in the same way
                raise Unreadable(path, f"is a compressed TIFF with orientation {orientation}: save it upright")
            return _pillow(path, b"", limits, inverted and bits > 8)
        if int(page.compression) in _DEFLATE:
            _inflates_to_its_size(path, file, page)
        array = page.asarray()
        if page.axes[:1] == "S":
            array = np.moveaxis(array, 0, -1)
        array = _without_alpha(array, page)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    scale = float(2**bits - 1) if array.dtype.kind == "u" else None
    if inverted and scale is not None:
        array = (int(scale) - array.astype(np.uint64)).astype(array.dtype)
    return Pixels(array, scale, orientation if orientation in _TURNS else 1)


def _without_alpha(array: np.ndarray[Any, Any], page: Any) -> np.ndarray[Any, Any]:
    """Return the array without channels that the file declares to be transparency."""
    alpha = sum(int(kind) in (1, 2) for kind in page.extrasamples)
    return array[..., : array.shape[-1] - alpha] if alpha and array.ndim == 3 else array


def _inflates_to_its_size(path: Path, file: Any, page: Any) -> None:
    """Refuse a deflated segment that would inflate to more than its part of the picture."""
    rows = page.tile[0] * page.tile[1] if page.is_tiled else page.rowsperstrip * page.imagewidth
    channels = page.samplesperpixel if page.axes[-1:] == "S" else 1
    most = int(rows * channels * page.dtype.itemsize)
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.filehandle.seek(start)
        inflate(path, file.filehandle.read(length), most, 15)
