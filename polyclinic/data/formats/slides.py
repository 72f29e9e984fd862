"""Reader of whole-slide images (Aperio, Hamamatsu NDPI, Leica, Ventana, tiled TIFF): regions, at any resolution.

OpenSlide (https://openslide.org) reads the files. All formats that are read here are TIFF files; tifffile examines the
directories first, so that the sizes that a file claims are within limits before OpenSlide allocates memory. A slide is
never read as a whole: a region is read from the level whose pixels are the largest that are not larger than wanted.
"""

import importlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing, regular_file
from polyclinic.errors import MissingDependency

Result = TypeVar("Result")
SLIDES = (".svs", ".ndpi", ".scn", ".bif", ".svslide")
"""Suffixes of files that are slides; TIFF files may be slides or pictures."""
TIFF = (".tif", ".tiff")
FILE_BYTES = 2**36
"""Largest file, 64 GiB."""
SIDE = 2**20
"""Pixels of a slide along one axis, at most."""
DIRECTORIES = 4096
"""Directories (levels, labels, planes) of one file, at most."""
STORED_TILE = 2**26
"""Bytes of one stored tile after decompression, at most."""
REGION = 2**26
"""Pixels that are read at once, at most: 256 MiB in four bytes each."""
OVERVIEW = 2**22
"""Pixels of an overview, if the slide has a level with so few."""
FINER = 1.01
"""By how much pixels may be smaller than those of the slide, for rounding of the resolution that files state."""
OPEN = 16
"""Slides that one process keeps open."""


@dataclass(frozen=True)
class Slide:
    """What a slide states about itself.

    Attributes:
        size: Pixels (y, x) at full resolution.
        mpp: Micrometers per pixel at full resolution, or None if the file does not state them.
        downsamples: Pixels of full resolution per pixel of each level, along one axis.
        pictures: Names of the pictures of the glass (``"label"``, ``"macro"``), which may show a name.
    """

    size: tuple[int, int]
    mpp: float | None
    downsamples: tuple[float, ...]
    pictures: tuple[str, ...] = ()


def is_slide(path: Path) -> bool:
    """Return whether a file is a slide: by its suffix, or a TIFF file that is tiled and has reduced levels."""
    name = path.name.lower()
    if name.endswith(SLIDES):
        return True
    if not name.endswith(TIFF):
        return False
    tifffile: Any = importlib.import_module("tifffile")
    try:
        with tifffile.TiffFile(path) as file:
            first = file.pages[0]
            return bool(first.is_tiled) and any(page.is_reduced for page in file.pages[1:8])
    except Exception:  # the reader reports the problem
        return False


def describe(path: Path, limits: Limits = LIMITS) -> Slide:
    """Return what a slide states about itself, after checking the sizes that its directories claim.

    Raises:
        Unreadable: If it is damaged, or beyond the limits.
        MissingDependency: If OpenSlide is not installed.
    """
    _library(path)
    regular_file(path, replace(limits, file_bytes=FILE_BYTES))
    with refusing(path, "is not a sound slide"):
        _check_directories(path)

    def facts(slide: Any) -> Slide:
        wide, high = slide.dimensions
        return Slide(
            (high, wide),
            _mpp(path, slide.properties),
            tuple(float(n) for n in slide.level_downsamples),
            tuple(sorted({"label", "macro"} & {*slide.associated_images})),
        )

    return _with(path, facts)


def region(path: Path, x: int, y: int, scale: float, size: tuple[int, int]) -> "np.ndarray[Any, Any]":
    """Return a region as RGB, white where the slide has no pixels: uint8 [rows, columns, 3].

    Args:
        path: The slide.
        x: Column of its upper left corner, in pixels of full resolution.
        y: Row of its upper left corner.
        scale: Pixels of full resolution per pixel of the result, along one axis.
        size: Rows and columns of the result.

    Raises:
        Unreadable: If the region is damaged, or too many pixels would have to be read for it.
    """
    from PIL import Image

    def read(slide: Any) -> Any:
        level = slide.get_best_level_for_downsample(scale * FINER)
        ratio = scale / slide.level_downsamples[level]
        high, wide = (max(1, round(n * ratio)) for n in size)
        if high * wide > REGION:
            raise Unreadable(path, f"has no level near 1/{scale:.0f} of its resolution: save it with more levels")
        return slide.read_region((x, y), level, (wide, high))

    found = _with(path, read)
    plain = Image.new("RGB", found.size, "white")
    plain.paste(found, mask=found.getchannel("A"))
    if plain.size != size[::-1]:
        plain = plain.resize(size[::-1], Image.Resampling.BILINEAR)  # smooths before it reduces
    return np.array(plain)


def overview(path: Path, slide: Slide) -> "np.ndarray[Any, Any]":
    """Return the whole slide at low resolution, as RGB: uint8 [rows, columns, 3].

    Raises:
        Unreadable: If it cannot be read, or the slide has no level of low resolution.
    """
    scale = max(math.sqrt(slide.size[0] * slide.size[1] / OVERVIEW), 1.0)
    scale = max([n for n in slide.downsamples if n <= scale * 2], default=scale)
    high, wide = (max(1, math.floor(n / scale)) for n in slide.size)
    return region(path, 0, 0, scale, (high, wide))


def _check_directories(path: Path) -> None:
    """Refuse a file whose directories claim more than the limits, or form a loop."""
    tifffile: Any = importlib.import_module("tifffile")
    seen: set[int] = set()
    with tifffile.TiffFile(path) as file:
        for count, directory in enumerate(file.pages):
            page = directory if hasattr(directory, "tags") else directory.aspage()
            if count >= DIRECTORIES or page.offset in seen:
                raise Unreadable(path, f"has more than {DIRECTORIES} directories, or a loop of them")
            seen.add(page.offset)
            if not (0 < page.imagewidth <= SIDE and 0 < page.imagelength <= SIDE):
                raise Unreadable(path, f"claims {page.imagelength} x {page.imagewidth} pixels; the limit is {SIDE}")
            if page.is_tiled:
                depth = max(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample
                stored = page.tilewidth * page.tilelength * max(page.samplesperpixel, 1) * max(depth // 8, 1)
                if not 0 < stored <= STORED_TILE:
                    raise Unreadable(path, f"has tiles of {stored} bytes; the limit is {STORED_TILE}")


def _mpp(path: Path, properties: Any) -> float | None:
    """Return the micrometers per pixel that a slide states; None if it states none."""
    found = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    if None in found:
        return None
    try:
        x, y = (float(value) for value in found)
    except ValueError:
        return None
    if not (0.01 <= x <= 100 and 0.01 <= y <= 100):
        return None
    if abs(math.log(x / y)) > 0.05:
        raise Unreadable(path, f"has pixels that are not square: {x:g} x {y:g} micrometers")
    return math.sqrt(x * y)


_handles: "OrderedDict[tuple[int, str], Any]" = OrderedDict()
_lock = threading.Lock()


def _library(path: Path) -> Any:
    try:
        return importlib.import_module("openslide")
    except (ImportError, OSError):
        raise MissingDependency("slides", f"{path.name} is a whole-slide image: reading it needs OpenSlide") from None


def _with(path: Path, use: Callable[[Any], Result]) -> Result:
    """Return ``use`` of the open slide. Handles are of one process: forked processes would share a file position."""
    openslide, key = _library(path), (os.getpid(), str(path))
    with refusing(path, "is not a sound slide"):
        with _lock:
            slide = _handles.pop(key, None)
            if slide is None:
                slide = openslide.OpenSlide(str(path))
            _handles[key] = slide
            while len(_handles) > OPEN:
                _handles.popitem(last=False)  # closed when its last user has released it
        try:
            return use(slide)
        except Exception:
            with _lock:  # after an error OpenSlide repeats it for every region
                _handles.pop(key, None)
            raise
