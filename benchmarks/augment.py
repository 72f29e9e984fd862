"""Time of nnU-Net's augmentation of one patch, by change, on one core. ``python benchmarks/augment.py [SIDE] [DRAWS]``.

The patch is a smooth image with noise; its mask has two labels in blobs, on a sixth of the voxels. CPU times, not wall
times, so that other processes disturb them less.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.training import image_transforms as transforms
from polyclinic.learning.training.image_augmentation import INTENSITIES, RECIPES, Placement


def volume(side: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return an image [1, side, side, side] and its labels 0, 1 and 2 [side, side, side]."""
    coarse = F.interpolate(torch.randn(1, 1, 8, 8, 8, generator=rng), (side,) * 3, mode="trilinear")[0]
    mask = (coarse[0] > 0.5).long() + (coarse[0] > 0.9).long()
    return coarse + 0.1 * torch.randn(coarse.shape, generator=rng), mask


def read(x: Tensor, y: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the central ``size`` of an image and its mask, padded with zeros."""
    x, y = transforms.center_crop(x, size), transforms.center_crop(y, size)
    pad = [side for n, have in zip(reversed(size), reversed(y.shape), strict=True) for side in (0, n - have)]
    return F.pad(x, pad).contiguous(), F.pad(y, pad).contiguous()


def milliseconds(work: Callable[[int], object], times: int) -> float:
    """Return the mean CPU time of ``work(i)``."""
    begun = time.process_time()
    for i in range(times):
        work(i)
    return 1e3 * (time.process_time() - begun) / times


def resampled(how: Any, x: Tensor, matrix: Tensor, shift: Tensor, size: tuple[int, ...], _: int) -> None:
    """Resample once."""
    how(x, matrix, shift, size, False)


def changed(change: Any, x: Tensor, seed: int) -> None:
    """Change a copy of an image once."""
    change(x.clone(), torch.Generator().manual_seed(seed))


def main(side: int = 128, draws: int = 60) -> None:
    """Print the mean over ``draws`` samples, and of each change alone."""
    torch.set_num_threads(1)
    recipe, size = RECIPES["nnunet"], (side,) * 3
    x, y = volume(int(1.65 * side), torch.Generator().manual_seed(0))

    def sample(seed: int, place: Placement | None = None) -> None:
        rng = torch.Generator().manual_seed(seed)
        where = place or recipe.place(size, rng)
        recipe(*read(x, y, where.source), where, size, rng)

    sample(0)
    print(f"nnunet, {side}^3, mean of {draws} samples, with reading from memory: {milliseconds(sample, draws):6.1f} ms")
    reading = milliseconds(lambda i: read(x, y, recipe.place(size, torch.Generator().manual_seed(i)).source), draws)
    print(f"    of which reading: {reading:6.1f} ms")
    matrix = transforms.turn_matrix(size, 30.0, torch.Generator().manual_seed(3))
    nowhere = torch.zeros(3, dtype=torch.float64)
    source = tuple(int(1.5 * side) for _ in size)
    own, labels = read(x, y, source)
    for name, m in (("rotation", matrix), ("scaling", 1.2 * torch.eye(3, dtype=torch.float64))):
        image = milliseconds(partial(resampled, transforms.resample, own, m, nowhere, size), 4)
        mask = milliseconds(partial(resampled, transforms.resample_mask, labels, m, nowhere, size), 4)
        print(f"    {name:<15} image {image:6.1f} ms, mask {mask:6.1f} ms")
    patch, _ = read(x, y, size)
    for name in INTENSITIES:
        if (change := getattr(recipe, name)) is not None:
            took = milliseconds(partial(changed, change, patch), 6)
            print(f"    {name:<15} {took:6.1f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
