"""Tiles of whole-slide images as examples: where tissue is, and the patches that are read from there.

A slide is divided into a grid of equal tiles. Tissue is found on an overview: a pixel counts as tissue if its largest
and its smallest color value differ by at least ``TISSUE_CHROMA`` of 255. Glass is colorless, and the usual stains are
not. The rule does not tell tissue from pen marks; a mask, drawn by hand or by another program, replaces it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.core.serialization import Place
from polyclinic.data.cases.case_file import CaseFile
from polyclinic.data.formats.pictures import read_picture
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable
from polyclinic.data.formats.slides import FINER, Slide, describe, overview, region
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.formats.volume import Volume
from polyclinic.data.preprocessing.pipeline_config import apply
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.source import digest
from polyclinic.errors import DataError

VERSION = 1
TISSUE_CHROMA = 15
MOST_TILES = 2**24
"""Tiles of the grid of one slide, at most, with or without tissue."""
WHITE = 255.0


@dataclass(frozen=True)
class Tiling:
    """How slides are divided into tiles.

    Attributes:
        size: Pixels along each side of a tile.
        mpp: Micrometers per pixel. The tiles of all slides then show areas of one size.
        level: Instead of ``mpp``: the level of the slide's pyramid, 0 for full resolution.
        count: Tiles of one slide, at most, drawn at random from those that show tissue, the same ones at each reading;
            0 for all.
        tissue: Share of a tile that must be tissue.
        mask: The picture in which all pixels above 0 are tissue, such as ``"masks/{name}.png"``, in place of the rule;
            relative to the slide's folder. ``{name}`` is the slide's file name without suffix. It shows the whole slide
            at any resolution.
    """

    size: int = 256
    mpp: float | None = None
    level: int | None = None
    count: int = 256
    tissue: float = 0.5
    mask: str = ""

    def __post_init__(self) -> None:
        problems = []
        if not 16 <= self.size <= 4096:
            problems.append(f"size = {self.size}: give 16 to 4096 pixels")
        if (self.mpp is None) == (self.level is None):
            problems.append("give either mpp, micrometers per pixel such as 0.5, or level, such as 0")
        if self.mpp is not None and not 0.01 <= self.mpp <= 100:
            problems.append(f"mpp = {self.mpp}: give micrometers per pixel, such as 0.5")
        if self.level is not None and self.level < 0:
            problems.append(f"level = {self.level}: give 0 for full resolution, or a higher number")
        if self.count < 0:
            problems.append(f"count = {self.count}: give a number of tiles, or 0 for all")
        if not 0 <= self.tissue <= 1:
            problems.append(f"tissue = {self.tissue}: give a share from 0 to 1")
        if self.mask and (PurePosixPath(self.mask).is_absolute() or ".." in PurePosixPath(self.mask).parts):
            problems.append(f"mask = {self.mask}: give a path within the slide's folder")
        if problems:
            raise DataError(problems)

    def tiles(self, path: Path, limits: Limits = LIMITS) -> "tuple[Tile, ...]":
        """Return the tiles of one slide, row by row.

        Raises:
            Unreadable: If the slide or its mask cannot be read, if the resolution is not known or finer than that of
                the slide, or if no tile shows enough tissue.
        """
        slide = describe(path, limits)
        scale = self._scale(path, slide)
        step = self.size * scale
        rows, columns = (int(n / step) for n in slide.size)
        if rows * columns > MOST_TILES:
            raise Unreadable(path, f"has {rows} x {columns} tiles; the limit is {MOST_TILES}: choose larger ones")
        shares = _shares(self._map(path, slide, limits), slide.size, step, (rows, columns))
        chosen = np.flatnonzero(shares.reshape(-1) >= max(self.tissue, 1e-9))
        if not len(chosen):
            says = f"has no tile with {self.tissue:.0%} of tissue among {rows * columns}"
            raise Unreadable(path, f"{says}: choose smaller tiles, a smaller share tissue = ..., or give a mask")
        if self.count and len(chosen) > self.count:
            seed = int(digest("tiles", VERSION, slide.size, chosen.tolist())[:15], 16)
            chosen = np.sort(np.random.default_rng(seed).choice(chosen, self.count, replace=False))
        mm = None if slide.mpp is None else slide.mpp * scale / 1000
        corners = ((round(i % columns * step), round(i // columns * step)) for i in chosen.tolist())
        return tuple(Tile(x, y, scale, self.size, mm) for x, y in corners)

    def _scale(self, path: Path, slide: Slide) -> float:
        """Return the pixels of full resolution per pixel of a tile, along one axis."""
        if self.level is not None:
            if self.level >= len(slide.downsamples):
                raise Unreadable(path, f"has {len(slide.downsamples)} levels, and level = {self.level} is not one")
            return slide.downsamples[self.level]
        assert self.mpp is not None
        if slide.mpp is None:
            raise Unreadable(path, "does not state its resolution: give level = ... in place of mpp")
        if self.mpp * FINER < slide.mpp:
            raise Unreadable(path, f"has {slide.mpp:.4g} micrometers per pixel, and mpp = {self.mpp:g} is finer")
        return max(self.mpp / slide.mpp, 1.0)

    def mask_of(self, path: Path) -> Path | None:
        """Return the file of a slide's mask; None if the rule finds tissue."""
        return path.parent / self.mask.replace("{name}", path.stem) if self.mask else None

    def _map(self, path: Path, slide: Slide, limits: Limits) -> "np.ndarray[Any, Any]":
        """Return where tissue is, on the whole slide at low resolution: bool [rows, columns]."""
        drawn = self.mask_of(path)
        if drawn is None:
            red, green, blue = np.moveaxis(overview(path, slide), -1, 0)
            high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
            found: np.ndarray[Any, Any] = high - low >= TISSUE_CHROMA
            return found
        values = read_picture(drawn, limits).upright
        marked: np.ndarray[Any, Any] = np.asarray(np.atleast_3d(values > 0).any(-1))
        ratio = marked.shape[0] / marked.shape[1] / (slide.size[0] / slide.size[1])
        if abs(math.log(ratio)) > math.log1p(2 / min(marked.shape)) + 0.01:
            raise Unreadable(drawn, f"has {marked.shape[0]} x {marked.shape[1]} pixels, another shape than its slide")
        return marked


def _shares(
    tissue: "np.ndarray[Any, Any]", size: tuple[int, int], step: float, grid: tuple[int, int]
) -> "np.ndarray[Any, Any]":
    """Return the share of tissue in each tile: [rows, columns]."""
    total = np.pad(tissue.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    bounds = []
    for side, pixels, count in zip(size, tissue.shape, grid, strict=True):
        low = np.floor(np.arange(count) * step * pixels / side).astype(int).clip(0, pixels - 1)
        high = np.ceil((np.arange(count) + 1) * step * pixels / side - 1e-9).astype(int).clip(1, pixels)
        bounds.append((low, np.maximum(high, low + 1)))
    (top, bottom), (left, right) = bounds
    inside = total[bottom][:, right] - total[top][:, right] - total[bottom][:, left] + total[top][:, left]
    shares: np.ndarray[Any, Any] = inside / ((bottom - top)[:, None] * (right - left)[None])
    return shares


@dataclass(frozen=True)
class Tile:
    """One tile of a slide.

    Attributes:
        x: Column of its upper left corner, in pixels of full resolution.
        y: Row of its upper left corner.
        scale: Pixels of full resolution per pixel of the tile, along one axis.
        size: Pixels along each side.
        mm: Millimeters per pixel, if the slide states its resolution.
    """

    x: int
    y: int
    scale: float
    size: int
    mm: float | None = None

    @property
    def name(self) -> str:
        """Name of the tile within its slide."""
        return f"x{self.x:07d}-y{self.y:07d}"

    @property
    def columns(self) -> dict[str, str]:
        """Metadata of the example."""
        return {"tile_x": str(self.x), "tile_y": str(self.y)}

    def read(self, path: Path, limits: Limits = LIMITS) -> Volume:
        """Read the tile: uint8 [3, 1, size, size]."""
        array = torch.from_numpy(region(path, self.x, self.y, self.scale, (self.size, self.size)))
        affine = torch.eye(4, dtype=torch.float64)
        if self.mm is not None:
            affine[0, 0] = affine[1, 1] = self.mm
        pixels = array.movedim(-1, 0).unsqueeze(1).contiguous()
        known = self.mm is not None
        return Volume(pixels, affine, "SM", "RGB", known, positioned=False, full_scale=WHITE)


@dataclass(frozen=True)
class SlideTile(CaseFile):
    """A tile that is read from its slide at each access, and prepared.

    Attributes:
        tile: The tile.
        steps: Preprocessing.
        changed: Size and time of the last change of the slide.
    """

    tile: Tile | None = None
    steps: tuple[Step, ...] = ()
    changed: tuple[int, int] = (0, 0)

    def image(self, low: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the pixels of the box of ``size`` that begins at ``low``: float32 [C, *size].

        Raises:
            DataError: If the slide has changed since it was examined, or cannot be read.
        """
        assert self.tile is not None
        if _state(self.path) != self.changed:
            raise DataError(f"the slide {self.path} changed while the study ran. Start the study again")
        colors = self.tile.read(self.path).array[:, 0].float().div_(255)
        pixels = apply(self.steps, Picture(colors, spacing_mm=self.spacing_mm)).pixels
        (top, left), (high, wide) = low, size
        return pixels[:, top : top + high, left : left + wide].contiguous()


def lazy_tiles(
    ids: Sequence[str], paths: Sequence[Path], tiles: Sequence[Tile], contents: Sequence[str], steps: tuple[Step, ...]
) -> list[SlideTile]:
    """Return tiles that are read when they are used.

    Args:
        ids: Name of each tile.
        paths: Slide of each tile.
        tiles: The tiles.
        contents: Hash of each tile's slide and place.
        steps: Preprocessing, which must keep the size of a tile.

    Raises:
        DataError: If ``steps`` change the size.
    """
    side = tiles[0].size
    probe = apply(steps, Picture(torch.zeros(3, side, side), spacing_mm=(1.0, 1.0))).pixels
    if tuple(probe.shape[1:]) != (side, side):
        shape = " x ".join(map(str, probe.shape[1:]))
        raise DataError(f"steps = [...]: tiles become {shape} pixels; set their size with tiles = {{size = ...}}")
    channels, states = len(probe), {path: _state(path) for path in dict.fromkeys(paths)}
    pixels = Place(torch.float32, (channels, side, side), 0)
    out = []
    for name, path, tile, content in zip(ids, paths, tiles, contents, strict=True):
        spacing = None if tile.mm is None else (tile.mm, tile.mm)
        key = digest("tile", VERSION, content, tile, [(s.name, s.version, sorted(vars(s).items())) for s in steps])
        out.append(
            SlideTile(
                path,
                pixels,
                mask=None,
                places={},
                divisor=(1.0,) * channels,
                shift=(0.0,) * channels,
                labels=(),
                box=(),
                spacing_mm=spacing,
                values=ValueRange(name, True, WHITE, 0.0, WHITE),
                notes=(),
                geometry=None,
                truth=None,
                hashes=(key, ""),
                tile=tile,
                steps=steps,
                changed=states[path],
            )
        )
    return out


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"the slide {path} cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns
