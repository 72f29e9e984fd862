"""The skeleton of a package that provides a network and a loss to studies, at one's own machine and at hospitals."""

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
description = "A network and a loss for Polyclinic."
requires-python = ">=3.11"
dependencies = ["polyclinic"]

# The names by which studies call them. Other groups: polyclinic.methods, polyclinic.sources, polyclinic.transforms.
[project.entry-points."polyclinic.networks"]
{name}-net = "{module}.networks:NET"

[project.entry-points."polyclinic.losses"]
{name}-focal = "{module}.losses:focal"
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
TESTS = '''\
"""The package fulfills the contract of a plug-in."""

from polyclinic.testing import check_network

from {module}.networks import NET


def test_the_network() -> None:
    check_network(NET, (1, 32, 32), outputs=3)
'''
README = """\
# {name}

A network and a loss for Polyclinic. Install it wherever a study runs that names them:

```console
$ pip install -e . && pytest
```

```toml
[task]
network = "{name}-net"
loss = "{name}-focal"
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
        f"{module}/__init__.py": '"""A network and a loss for Polyclinic."""\n',
        f"{module}/networks.py": NETWORKS,
        f"{module}/losses.py": LOSSES,
        "tests/test_plugin.py": TESTS,
    }
    files = []
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, text.replace("{name}", name).replace("{module}", module))
        files.append(file)
    return files
