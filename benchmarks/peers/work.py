"""The work that every framework does: federated averaging of given sites, networks and orders of examples.

A runner is called as ``python run_NAME.py WORK FOLDER``. It trains, writes the final weights to ``FOLDER/NAME.npz``, and
prints one JSON line: the CPU seconds of its training loop, where it can measure them, of its process and the processes
that it started, and its peak memory. Only this module and PyTorch are common to all runners.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(1)
LR, BATCH = 0.05, 16


@dataclass(frozen=True)
class Work:
    """Sites with ``rows`` examples on average, of which ``asked`` train in a round (all if None), and their network."""

    sites: int
    rows: int
    shape: tuple[int, ...]
    rounds: int
    network: Callable[[], nn.Module]
    asked: int | None = None

    def names(self) -> list[str]:
        """The sites, in the order of their names."""
        return [f"site-{i:0{max(len(str(self.sites - 1)), 2)}}" for i in range(self.sites)]

    def cohort(self, round: int) -> list[str]:
        """The sites that train in a round, in the order of their names."""
        if self.asked is None:
            return self.names()
        drawn = torch.randperm(self.sites, generator=torch.Generator().manual_seed(round))[: self.asked]
        names = self.names()
        return [names[i] for i in sorted(drawn.tolist())]

    @property
    def site_rounds(self) -> int:
        """How often a site trains, over all sites and rounds."""
        return self.rounds * (self.asked or self.sites)

    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and classes of every site."""
        found = {}
        for i, name in enumerate(self.names()):
            rng = torch.Generator().manual_seed(i)
            n = self.rows // 2 + i * self.rows // max(self.sites - 1, 1)
            n += n % BATCH == 1  # a minibatch of one is left out by some
            y = torch.randint(0, 2, (n,), generator=rng)
            x = torch.randn(n, *self.shape, generator=rng) + 0.3 * y.view(-1, *(1 for _ in self.shape))
            found[name] = x, y
        return found

    def model(self) -> nn.Module:
        """The network with its initial weights."""
        torch.manual_seed(7)
        return self.network()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))


def _cnn(width: int = 16) -> nn.Module:
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * 7 * 7, 2))


def _large() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2800), nn.ReLU(), nn.Linear(2800, 3200), nn.ReLU(), nn.Linear(3200, 2)
    )


WORKS = {
    "many-small": Work(23, 60, (20,), 20, _mlp),
    "cnn": Work(8, 300, (1, 28, 28), 3, _cnn),
    "cohort": Work(1000, 40, (1, 28, 28), 6, partial(_cnn, 8), asked=50),
    "large": Work(4, 16, (1, 28, 28), 6, _large),
    "large-long": Work(4, 16, (1, 28, 28), 30, _large),
}
"""Many small sites; a small CNN; 50 of 1,000 sites, a smaller CNN; 11.2 million parameters and about one step a site, so that copies are all that shows; the same for 30 rounds, so that memory that is touched for the first time counts less."""

Orders = Mapping[tuple[str, int], Tensor]


def orders(work: Work) -> Orders:
    """The order of examples by site and round, the same for every framework."""
    found, sizes = {}, {name: len(y) for name, (_, y) in work.data().items()}
    for r in range(work.rounds):
        for name in work.cohort(r):
            seed = int.from_bytes(f"{name}/{r}".encode()[-7:], "big")
            found[name, r] = torch.randperm(sizes[name], generator=torch.Generator().manual_seed(seed))
    return found


def train_epoch(model: nn.Module, x: Tensor, y: Tensor, order: Tensor) -> None:
    """One epoch as anyone would write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for chunk in order.split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[chunk]), y[chunk]).backward()
        optimizer.step()


def main(name: str, run: Callable[[Work], tuple[Mapping[str, np.ndarray], float | None]]) -> None:
    """Run a framework, whose ``run`` returns the final weights and the CPU seconds of its loop, and report."""
    work, folder = WORKS[sys.argv[1]], Path(sys.argv[2])
    train_epoch(nn.Linear(2, 2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), torch.arange(2))  # late imports
    weights, loop = run(work)
    np.savez(folder / f"{name}.npz", **weights)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    print(json.dumps({"loop_cpu_s": loop, "process_cpu_s": cpu, "peak_mb": own.ru_maxrss / 1024}), flush=True)
    os._exit(0)  # some frameworks leave threads


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a model by name."""
    return {name: leaf.detach().numpy() for name, leaf in model.state_dict().items()}


def timed(loop: Callable[[], None]) -> float:
    """The CPU seconds of this process during ``loop``."""
    begun = time.process_time()
    loop()
    return time.process_time() - begun
