"""What all tests share: small sites, and one thread, so that two workers do not fight over cores."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from polyclinic.core import plugin_packages
from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining

torch.set_num_threads(1)
# "dev", the default, tries the same inputs in every run. "ci" (pytest --hypothesis-profile=ci) tries five times as many, other ones
# each time; on a failure it prints how to repeat them. A test that sets its own number of examples keeps it.
TOO_SLOW = [HealthCheck.too_slow]
settings.register_profile("dev", deadline=None, derandomize=True, suppress_health_check=TOO_SLOW)
settings.register_profile("ci", deadline=None, max_examples=500, print_blob=True, suppress_health_check=TOO_SLOW)
settings.load_profile("dev")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all modules and tests, which last, again and again."""
    gc.collect()
    gc.freeze()


class Rows:
    """Inputs and targets in memory, the least that a site's data must be, as slices of a volume and frames of videos."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y
        self.positions: Any = torch.arange(len(y)) / max(len(y), 1)
        self.videos: Any = torch.arange(len(y)) // 4

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def blobs(seed: int, n: int, shape: tuple[int, ...], shift: float = 0.0, classes: int = 2) -> Rows:
    """Two classes that differ in brightness, seen through a scanner that adds ``shift``."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=rng)
    y[:classes] = torch.arange(classes)
    x = torch.randn(n, *shape, generator=rng) + y.view(-1, *[1] * len(shape)) + shift
    return Rows(x, y)


def little_sites(shape: tuple[int, ...] = (1, 8, 8), count: int = 3, classes: int = 2) -> dict[str, Site]:
    """``count`` sites of unequal size, the same every time. All hold the same ``public`` data."""
    public = {"public": blobs(999, 12, shape, 0.25, classes)}
    return {
        f"site-{k}": Site(
            f"site-{k}",
            {
                role: blobs(10 * k + i, (12 + 5 * k) if role == "train" else 12, shape, 0.5 * k, classes)
                for i, role in enumerate(("train", "val", "test", "unlabeled"))
            }
            | public,
        )
        for k in range(count)
    }


@pytest.fixture(scope="session", autouse=True)
def no_forced_writes() -> Iterator[None]:
    """Nothing waits for the disk: what a killed process wrote is read from memory, and no test cuts the power.

    Tests of forced writes replace ``os.fsync`` themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses a closed file, as the original does
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_listed_once() -> Iterator[None]:
    """The installed packages are listed once, since no test installs one in the environment that runs the tests.

    They are listed anew whenever a test has changed ``sys.path``, which is how tests provide packages of their own.
    """
    usual, listed = list(sys.path), tuple(plugin_packages._entry_point_files())
    anew = plugin_packages._entry_point_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin_packages, "_entry_point_files", lambda: listed if sys.path == usual else anew())
        yield


@pytest.fixture
def sites() -> dict[str, Site]:
    """Three sites with images of 8 x 8 pixels."""
    return little_sites()


@pytest.fixture
def task() -> Classification:
    """A small convolutional network with batch normalization, two classes."""
    return Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))


@pytest.fixture
def local() -> LocalTraining:
    """Two epochs of plain SGD."""
    return LocalTraining(epochs=2, batch_size=8, lr=0.1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    folder = os.environ.get("POLYCLINIC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("POLYCLINIC_DATA names no folder of real data")
    return Path(folder)


def segmentation_sites(count: int = 3, dims: int = 2) -> dict[str, Site]:
    """``count`` sites with noisy images of 16 pixels along each axis that hold a bright disc or ball, and its mask."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(16)] * dims, indexing="ij")).float()

    def discs(seed: int, n: int, shift: float) -> Rows:
        rng = torch.Generator().manual_seed(seed)
        center = 4 + 8 * torch.rand(n, dims, *[1] * dims, generator=rng)
        radius = 2 + 2 * torch.rand(n, *[1] * dims, generator=rng)
        mask = ((grid - center).square().sum(1) < radius**2).long()
        return Rows((mask + 0.3 * torch.randn(n, *[16] * dims, generator=rng) + shift)[:, None], mask)

    roles = {"train": 10, "val": 4, "test": 4, "unlabeled": 8}
    public = {"public": discs(999, 8, 0.2)}
    return {
        f"site-{k}": Site(
            f"site-{k}",
            {role: discs(10 * k + i, n + 2 * k, 0.3 * k) for i, (role, n) in enumerate(roles.items())} | public,
        )
        for k in range(count)
    }


def finding_sites(count: int = 3) -> dict[str, Site]:
    """``count`` sites with three findings of each image, of which each site labels all but one in its training images."""

    def labeled(data: Any, missing: int | None) -> Rows:
        y = torch.stack([data.y == 0, data.y == 1, data.x.flatten(1).mean(1) > 0.5], 1).float()
        if missing is not None:
            y[:, missing] = torch.nan
        return Rows(data.x, y)

    return {
        name: Site(name, {role: labeled(d, k % 3 if role == "train" else None) for role, d in site.data.items()})
        for k, (name, site) in enumerate(little_sites(count=count).items())
    }
