"""Patches per second with nnU-Net's augmentation, against nnU-Net's own loader, in one process with one thread.

    python benchmarks/nnunet_loader.py [--draws 40] [--side 128]

Both programs read patches of the same generated volumes of 128 x 256 x 256 voxels, each from the files that it writes
itself (nnU-Net: Blosc2, float32; Polyclinic: two bytes per voxel), with a third of them around foreground, and apply
nnU-Net's list of augmentations. Minibatches of both alternate, and CPU time counts, so that other processes disturb the
comparison less. Needs nnunetv2 2.8.1 with batchgeneratorsv2 0.3.6, without their network part:
``pip install --no-deps nnunetv2 batchgeneratorsv2 batchgenerators acvl-utils dynamic-network-architectures blosc2``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from polyclinic.data.cases import case_file
from polyclinic.data.cases.case_file import Prepared
from polyclinic.data.cases.cases import Cases
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.learning.training.image_augmentation import RECIPES
from polyclinic.learning.training.minibatches import Sampler

SIZE, BATCH, FOREGROUND = (128, 256, 256), 2, 0.33


def volume(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a smooth image with noise, and labels 0, 1 and 2 in blobs."""
    rng = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(1, 1, 6, 12, 12, generator=rng), SIZE, mode="trilinear")[0]
    mask = (coarse[0] > 0.7).long() + (coarse[0] > 1.1).long()
    return (100 * coarse + 10 * torch.randn(coarse.shape, generator=rng)).round(), mask


def ours(folder: Path, volumes: int, side: int) -> Callable[[int], object]:
    """Return Polyclinic's loader of one minibatch."""
    files = []
    for i in range(volumes):
        image, mask = volume(i)
        limits = (int(image.min()), int(image.max()))
        case_file.write(
            folder / f"{i}.safetensors", Prepared(Picture(image, mask), ValueRange("", False, None, *limits), (0, 1, 2))
        )
        opened = case_file.opened(folder / f"{i}.safetensors")
        assert opened is not None
        files.append(opened)
    names = tuple(map(str, range(volumes)))
    sampler = Sampler(Cases(tuple(files), (side,) * 3, 1, names, names), RECIPES["nnunet"], FOREGROUND)
    return lambda k: torch.stack([sampler((BATCH * k + j) % volumes, BATCH * k + j)[0] for j in range(BATCH)])


def nnunets(folder: Path, volumes: int, side: int) -> Callable[[int], object]:
    """Return nnU-Net's loader of one minibatch."""
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    patch, angle = (side,) * 3, (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)
    initial = get_patch_size(patch, angle, angle, angle, (0.85, 1.25))
    for i in range(volumes):
        image, mask = volume(i)
        pixels, labels = image.float().numpy(), mask[None].numpy().astype(np.int16)
        places = {k: np.argwhere(labels == k)[:: max(1, int((labels == k).sum()) // 10_000)] for k in (1, 2)}
        about = {"class_locations": places}
        block, chunk = comp_blosc2_params(pixels.shape, patch, pixels.itemsize)
        nnUNetDatasetBlosc2.save_case(pixels, labels, about, str(folder / str(i)), chunk, block)
    transforms = nnUNetTrainer.get_training_transforms(patch, angle, None, (0, 1, 2), False, foreground_labels=(1, 2))
    known: Any = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=False)
    data = nnUNetDatasetBlosc2(str(folder))
    loader = nnUNetDataLoader(data, BATCH, initial, patch, known, FOREGROUND, transforms=transforms)
    return lambda k: loader.generate_train_batch()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--volumes", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        loaders = {}
        for name, make in (("polyclinic", ours), ("nnU-Net", nnunets)):
            (folder := Path(root) / name).mkdir()
            loaders[name] = make(folder, given.volumes, given.side)
            loaders[name](0)  # imports and the page cache
        spent = dict.fromkeys(loaders, 0.0)
        for k in range(1, given.draws // BATCH + 1):
            for name, load in loaders.items():
                begun = time.process_time()
                load(k)
                spent[name] += time.process_time() - begun
    patches = given.draws // BATCH * BATCH
    for name, seconds in spent.items():
        print(f"{name:<11} {1e3 * seconds / patches:7.1f} ms CPU a patch of {given.side}^3")
    print(f"throughput of Polyclinic / nnU-Net: {spent['nnU-Net'] / spent['polyclinic']:.2f}")


if __name__ == "__main__":
    main()
