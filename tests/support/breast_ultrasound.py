"""Breast ultrasound images at three simulated sites: BUSI (Al-Dhabyani et al., Data in Brief 2020), drawn by group.

BUSI names no patients. Images that are nearly equal by a perceptual hash form a group, which is never divided.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from polyclinic.core.site import Site
from polyclinic.data.formats.volume import Volume
from polyclinic.data.quality.image_hashes import content_hash, equal, nearly_equal, small_picture
from tests.conftest import Rows

FILE = Path("busi") / "busi_128.npz"
CLASSES = ("normal", "benign", "malignant")
SITES = 3


def groups_of(images: np.ndarray) -> list[int]:
    """Return a number for each image; copies and nearly equal images, perhaps of one patient, have the same."""
    volumes = [torch.from_numpy(image)[None].float() for image in images]
    hashes = [content_hash(volume) for volume in volumes]
    pictures = [small_picture(Volume(volume, torch.eye(4, dtype=torch.float64))) for volume in volumes]
    pairs = [*nearly_equal(pictures, hashes), *((group[0], other) for group in equal(hashes) for other in group[1:])]
    group = list(range(len(images)))
    for one, other in pairs:
        old, new = group[other], group[one]
        group = [new if number == old else number for number in group]
    return group


def thirds(folder: Path, side: int) -> tuple[dict[str, TensorDataset], dict[str, list[int]]]:
    """Return three sites with a third of the groups each, drawn at random, and the group of each of their images.

    Args:
        folder: The folder with ``FILE``.
        side: Pixels along each axis, to which the images [1, side, side] with values in [0, 1] are averaged.
    """
    archive = np.load(folder / FILE)
    group = np.array(groups_of(archive["images"]))
    images = torch.from_numpy(archive["images"])[:, None].float() / 255
    images, labels = F.interpolate(images, (side, side), mode="area"), torch.from_numpy(archive["labels"]).long()
    names = np.random.default_rng(0).permutation(np.unique(group))
    rows = {f"site-{k + 1}": np.flatnonzero(np.isin(group, names[k::SITES])) for k in range(SITES)}
    sites = {site: TensorDataset(images[at], labels[at]) for site, at in rows.items()}
    return sites, {site: group[at].tolist() for site, at in rows.items()}


def hospitals_of(folder: Path, side: int, seed: int = 0) -> dict[str, Site]:
    """Return the three sites with their groups divided: 60 % train, 15 % validate, 25 % test."""
    sites = dict[str, Site]()
    images, groups = thirds(folder, side)
    for site, data in images.items():
        x, y = data.tensors
        group = np.array(groups[site])
        names = np.random.default_rng(seed).permutation(np.unique(group))
        first, second = round(0.6 * len(names)), round(0.75 * len(names))
        parts = {"train": names[:first], "val": names[first:second], "test": names[second:]}
        at = {role: torch.from_numpy(np.flatnonzero(np.isin(group, part))) for role, part in parts.items()}
        sites[site] = Site(site, {role: Rows(x[rows], y[rows]) for role, rows in at.items()})
    return sites
