"""Equal and nearly equal images: by content hash, and by a perceptual hash confirmed on a small picture.

The perceptual hash is the sign of the low frequencies of a discrete cosine transform (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1), here 16 x 16 of a 32 x 32 picture, without the
constant term. Medical images of one kind have similar hashes, so every candidate is confirmed by the correlation of the
small pictures after subtraction of their mean picture. Mirrored or rotated copies are not detected.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from polyclinic.data.formats.volume import Volume
from polyclinic.learning import image_labels
from polyclinic.learning.image_labels import SIDE, exact_label, low_frequencies

_LOW = 16
_HASH = 0.60  # correlation of the signs: at most 1 in 5 differs; smooth images have few reliable signs
_SAME = 0.985  # correlation of the small pictures
_MOST = 20_000


def content_hash(array: Tensor) -> str:
    """Return 32 hexadecimal digits that identify the voxels and the shape of an image, independent of its file
    format.
    """
    return exact_label(array).hex()


def small_picture(volume: Volume, side: int = SIDE) -> np.ndarray:  # type: ignore[type-arg]
    """Return the middle slice along the axis with the fewest voxels, averaged over channels, as [side, side]
    float32.
    """
    return image_labels.small_picture(volume.array if volume.array.ndim == 4 else volume.array[None], side)


def equal(hashes: Sequence[str]) -> list[list[int]]:
    """Return positions with the same content, in groups of two or more."""
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(hashes):
        groups.setdefault(name, []).append(at)
    return [members for members in groups.values() if len(members) > 1]


def nearly_equal(pictures: Sequence[np.ndarray], hashes: Sequence[str]) -> list[tuple[int, int]]:  # type: ignore[type-arg]
    """Return pairs of different content that look the same, among the first 20,000 images.

    Args:
        pictures: From ``small_picture``, each [32, 32].
        hashes: From ``content_hash``; equal pairs are excluded (see ``equal``).
    """
    count = min(len(pictures), _MOST)
    if count < 2:
        return []
    stack = np.stack(pictures[:count]).reshape(count, -1)
    flat = stack.std(1) < 1e-6 * (np.abs(stack).max(1) + 1e-12)  # constant pictures look alike
    signs = _signs(stack.reshape(count, SIDE, SIDE))
    centered = _unit(stack)
    if count >= 16:  # what all images of this kind share does not distinguish pairs
        centered = _unit(centered - centered.mean(0))
    found: list[tuple[int, int]] = []
    step = 512
    for start in range(0, count, step):
        alike = signs[start : start + step] @ signs[start:].T / signs.shape[1]
        same = centered[start : start + step] @ centered[start:].T
        rows, columns = np.nonzero((alike >= _HASH) & (same >= _SAME))
        for i, j in zip((rows + start).tolist(), (columns + start).tolist(), strict=True):
            if i < j and hashes[i] != hashes[j] and not flat[i] and not flat[j]:
                found.append((i, j))
    return found


def _unit(rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Return rows with mean 0 and length 1."""
    rows = rows - rows.mean(1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    out: np.ndarray = rows / np.where(lengths == 0, 1, lengths)  # type: ignore[type-arg]
    return out


def _signs(pictures: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Return the hash as +1 and -1 per frequency. Shape [n, 255]."""
    low = low_frequencies(pictures, _LOW)
    middle = np.median(low, axis=1, keepdims=True)
    return np.where(low > middle, 1.0, -1.0).astype(np.float32)
