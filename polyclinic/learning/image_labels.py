"""Labels of an image by its content: one that equal images share, and one that nearly equal images usually share.

The coarse label is a perceptual hash of 63 bits: which low frequencies of the discrete cosine transform of a 32 x 32
picture are above their median, 8 x 8 of them without the constant term (Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010, section 3.2.1). Labels are compared for equality, so that a copy whose
frequencies are close to the median is missed. Mirrored, rotated and cropped copies are missed, too.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

SIDE = 32
_LOW = 8
_FLAT = 1e-6


def exact_label(image: Tensor) -> bytes:
    """Return 16 bytes that identify shape and values of an image [C, *spatial] as float32."""
    numbers = np.ascontiguousarray(image.numpy().astype(np.float32, copy=False))
    name = hashlib.blake2b(repr(numbers.shape).encode(), digest_size=16)
    name.update(numbers.reshape(-1).view(np.uint8).data)
    return name.digest()


def coarse_label(image: Tensor) -> bytes | None:
    """Return 8 bytes that images [C, *spatial] of equal appearance usually share; None for one without structure."""
    picture = small_picture(image)
    if picture.std() <= _FLAT * (np.abs(picture).max() + 1e-12):
        return None
    low = low_frequencies(picture[None], _LOW)[0]
    return np.packbits(low > np.median(low)).tobytes()


def small_picture(image: Tensor, side: int = SIDE) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Return the middle slice of an image [C, *spatial] along its shortest axis, averaged over channels.

    Shape [side, side], float32.
    """
    array = image.float().mean(0)
    if array.ndim == 3:
        axis = int(np.argmin(array.shape))
        array = array.select(axis, array.shape[axis] // 2)
    flat = array[None, None]
    shrink = torch.nn.functional.adaptive_avg_pool2d if min(flat.shape[-2:]) >= side else _grow
    return shrink(flat, (side, side))[0, 0].numpy().astype(np.float32)


def _grow(flat: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(flat, size, mode="bilinear", align_corners=False)


def low_frequencies(pictures: np.ndarray, count: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return the ``count`` x ``count`` lowest frequencies of pictures [n, side, side] without the constant term.

    Shape [n, count² - 1].
    """
    from scipy.fft import dctn

    low: np.ndarray = dctn(pictures, axes=(1, 2), norm="ortho")[:, :count, :count]  # type: ignore[type-arg]
    return low.reshape(len(pictures), -1)[:, 1:]
