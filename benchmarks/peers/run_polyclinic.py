"""Polyclinic from Python, in process; with ``workers`` as third argument, in two worker processes."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does, before PyTorch allocates

import torch
from torch.nn import functional as F
from work import BATCH, LR, WORKS, Work, main, orders, timed

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.model_tree import changes_of
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg

WORKERS = sys.argv[3:] == ["workers"]


class Rows:
    """Examples in memory."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class Task:
    """The work's network and its loss."""

    name: str

    def model(self) -> torch.nn.Module:
        return WORKS[self.name].model()

    def loss(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class GivenOrder(LocalTraining):
    """Local training with the work's order of examples instead of one from the site's generator."""

    work: str = ""

    def change(self, task, start, site, round, **how):
        _current.append(_orders[site.name, round])
        return self.fit(task, start, site, round, **how, result=partial(changes_of, start=start))

    def _order(self, data, rng):
        yield from _current.pop().split(self.batch_size)


_current: list[torch.Tensor] = []
_orders = orders(WORKS[sys.argv[1]])


def run(work: Work):
    sites = {name: Site(name, {"train": Rows(x, y)}) for name, (x, y) in work.data().items()}
    method = FedAvg(Task(sys.argv[1]), GivenOrder(batch_size=BATCH, lr=LR))
    state = method.init({name: leaf.clone() for name, leaf in work.model().state_dict().items()})

    def loop() -> None:
        nonlocal state
        for step in train(method, engine, state, rounds=work.rounds, sampler=lambda _, r: work.cohort(r)):
            state = step.state

    engine = Workers(method, sites, workers=2) if WORKERS else InProcess(method, sites)
    pids = engine.pids if isinstance(engine, Workers) else []
    before = sum(map(cpu_of, pids))
    loop_cpu = timed(loop) + sum(map(cpu_of, pids)) - before
    engine.close()
    return {name: leaf.numpy() for name, leaf in state.params.items()}, loop_cpu


def cpu_of(pid: int) -> float:
    """The CPU seconds of a running process (Linux)."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main("polyclinic_workers" if WORKERS else "polyclinic", run)
