"""Slides and videos that the tests make: small, and known to the pixel."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

GLASS, TISSUE = (240, 240, 240), (200, 100, 160)


def slide_pixels(size: tuple[int, int] = (512, 640), seed: int = 0) -> np.ndarray:
    """Pixels of a slide [Y, X, 3]: a colored rectangle in its lower right quarter, with noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((*size, 3), GLASS, np.int16)
    pixels[size[0] // 2 :, size[1] // 2 :] = TISSUE
    return (pixels + rng.integers(-4, 5, (*size, 1))).clip(0, 255).astype(np.uint8)


def save_slide(
    path: Path,
    pixels: np.ndarray,
    mpp: float | None = 0.5,
    levels: Sequence[int] = (1, 4),
    description: str | None = None,
    label: bool = False,
    **options: Any,
) -> Path:
    """Writes a tiled pyramid. ``levels`` are powers of 2; each is the mean of the pixels it replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for i, level in enumerate(levels):
            high, wide = (n // level for n in pixels.shape[:2])
            parts = pixels[: high * level, : wide * level].reshape(high, level, wide, level, 3)
            resolution: dict[str, Any] = (
                {} if mpp is None else {"resolution": (1e4 / (mpp * level),) * 2, "resolutionunit": "CENTIMETER"}
            )
            file.write(
                parts.mean((1, 3)).round().astype(np.uint8),
                tile=(256, 256),
                photometric="rgb",
                subfiletype=int(i > 0),
                description=description,
                metadata=None,
                **resolution,
                **options,
            )
        if label:  # as Aperio stores the picture of the label of the glass
            file.write(
                pixels[:64, :96],
                photometric="rgb",
                subfiletype=1,
                description=f"{description}\nlabel 96x64",
                metadata=None,
            )
    return path


def save_video(
    path: Path,
    values: Sequence[int],
    size: tuple[int, int] = (48, 64),
    codec: str = "ffv1",
    pixels: str = "yuv420p",
    draw: Callable[[int], np.ndarray] | None = None,
    **options: Any,
) -> Path:
    """Writes a video whose frame k is gray with value ``values[k]``, or what ``draw`` returns: [Y, X, 3]."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        for name, value in options.items():
            setattr(stream, name, value)
        for value in values:
            frame = np.full((*size, 3), value, np.uint8) if draw is None else draw(value)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return path
