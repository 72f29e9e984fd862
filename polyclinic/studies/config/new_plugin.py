"""The skeleton of a package that provides a network, a loss, a metric and an augmentation to studies."""

import re
from pathlib import Path

from polyclinic.core import atomic
from polyclinic.errors import ConfigError

NAME = re.compile(r"[a-z][a-z0-9-]{0,40}")
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "A network, a loss, a metric and an augmentation for Polyclinic."
requires-python = ">=3.11"
dependencies = ["polyclinic"]

# The names by which studies call them. Other groups: polyclinic.methods, polyclinic.sources, polyclinic.transforms.
[project.entry-points."polyclinic.networks"]
{name}-net = "{module}.networks:NET"

[project.entry-points."polyclinic.losses"]
{name}-focal = "{module}.losses:focal"

[project.entry-points."polyclinic.metrics"]
{name}-kappa = "{module}.metrics:KAPPA"

[project.entry-points."polyclinic.augmentations"]
{name}-speckle = "{module}.augmentations:speckle"
"""
NETWORKS = '''\
"""Networks."""

from typing import Any

from polyclinic.learning.networks.architectures import Architecture
from torch import Tensor, nn


class Net(nn.Module):
    """A small convolutional network for images [b, C, y, x]."""

    def __init__(self, channels: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, y, x] to [b, outputs]."""
        prediction: Tensor = self.head(self.body(x))
        return prediction


def build(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    """Build the network for examples of the shape ``inputs``: (channels, y, x)."""
    return Net(inputs[0], outputs, **options)


NET = Architecture(build, head=("head.",), summary="a small convolutional network", options={"width": 16})
'''
LOSSES = '''\
"""Losses: functions of predictions [b, ...] and targets [b, ...] that return the mean over the examples."""

from torch import Tensor
from torch.nn import functional as F


def focal(scores: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss (Lin et al., ICCV 2017, https://arxiv.org/abs/1708.02002)."""
    loss = F.cross_entropy(scores, target, reduction="none")
    return ((1 - (-loss).exp()) ** gamma * loss).mean()
'''
METRICS = '''\
"""Metrics: functions of the predictions and targets of a site, NumPy arrays, that return one number."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from polyclinic.learning.tasks.own_metrics import OwnMetric


def kappa(scores: NDArray[Any], target: NDArray[Any]) -> float:
    """Return Cohen's kappa of class scores [n, C] and classes [n]; NaN if chance alone would always agree."""
    predicted, classes = scores.argmax(1), np.arange(scores.shape[1])
    agreement = float(np.mean(predicted == target))
    chance = float(sum(np.mean(predicted == k) * np.mean(target == k) for k in classes))
    return (agreement - chance) / (1 - chance) if chance < 1 else float("nan")


KAPPA = OwnMetric(kappa, "Cohen's kappa")
'''
AUGMENTATIONS = '''\
"""Augmentations: functions of an image [C, *spatial], its target and a generator that return image and target."""

import torch
from torch import Tensor


def speckle(image: Tensor, target: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multiply an image by noise with a standard deviation of up to a tenth, as in ultrasound."""
    size = 0.1 * torch.rand((), generator=rng)
    return image * (1 + size * torch.randn(image.shape, generator=rng)), target
'''
TESTS = '''\
"""The package fulfills the contract of a plug-in."""

import numpy as np
from polyclinic.testing import check_augmentation, check_metric, check_network

from {module}.augmentations import speckle
from {module}.metrics import KAPPA
from {module}.networks import NET


def test_the_network() -> None:
    check_network(NET, (1, 32, 32), outputs=3)


def test_the_metric() -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    check_metric(KAPPA, scores, np.arange(20) % 3)


def test_the_augmentation() -> None:
    check_augmentation(speckle, (1, 32, 32))
'''
README = """\
# {name}

A network, a loss, a metric and an augmentation for Polyclinic. Install it wherever a study runs that names them:

```console
$ pip install -e . && pytest
```

```toml
[task]
network = "{name}-net"
loss = "{name}-focal"

[evaluation]
metrics = ["{name}-kappa"]

[augmentation]
own = ["{name}-speckle"]
```

Between hospitals, every site installs the package and allows it in `policy.toml` (`[allow] packages`); `polyclinic site
review` shows its hash. No site runs code that it has not allowed, and a changed file changes the hash.
"""


def write_plugin(folder: Path) -> list[Path]:
    """Write the package into ``folder``, which must not exist, and return its files.

    Raises:
        ConfigError: If the folder exists, or its name cannot be that of a package.
    """
    name = folder.name
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{folder}: the name of a package has lowercase letters, digits and hyphens, and begins with a letter"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists already: name a folder that does not exist")
    module = name.replace("-", "_")
    texts = {
        "pyproject.toml": PROJECT,
        "README.md": README,
        f"{module}/__init__.py": '"""A network, a loss, a metric and an augmentation for Polyclinic."""\n',
        f"{module}/networks.py": NETWORKS,
        f"{module}/losses.py": LOSSES,
        f"{module}/metrics.py": METRICS,
        f"{module}/augmentations.py": AUGMENTATIONS,
        "tests/test_plugin.py": TESTS,
    }
    files = []
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, text.replace("{name}", name).replace("{module}", module))
        files.append(file)
    return files
