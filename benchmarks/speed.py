"""What the framework costs beyond the arithmetic of training.

Every figure is a ratio of two things measured in alternation within one run, because machines are shared and noisy:
ours, and a floor without any framework. One JSON object a line: name, value, goal, met. ``--quick`` takes fewer and
smaller repetitions; a name as argument runs that benchmark alone.

    python benchmarks/speed.py [--quick] [NAME...]
"""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.core.aggregates import Reply, WeightedMean, merge
from polyclinic.core.execution import sample_sites
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg

torch.set_num_threads(1)
QUICK = "--quick" in sys.argv


class Rows:
    """Images and labels in memory."""

    def __init__(self, n: int, shape: tuple[int, ...], seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(n, *shape, generator=rng), torch.randint(0, 2, (n,), generator=rng)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def sites_of(count: int, n: int, shape: tuple[int, ...], device: str = "cpu") -> dict[str, Site]:
    return {f"site-{i:04}": Site(f"site-{i:04}", {"train": Rows(n, shape, i)}, device) for i in range(count)}


def bare(model: nn.Module, data: Rows, batch_size: int, lr: float, rng: torch.Generator, device: str = "cpu") -> None:
    """One epoch as anyone would write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for chunk in torch.randperm(len(data), generator=rng).split(batch_size):
        x, y = (part.to(device) for part in data[chunk])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def bare_rounds(task: Classification, sites: list[Site], rounds: int, batch_size: int) -> None:
    """Federated averaging without a framework: train each site from the same start, average."""
    device = sites[0].device
    model, first = task.model().to(device).train(), task.first(0)
    state = {name: leaf.to(device, copy=True) for name, leaf in first.items()}
    for r in range(rounds):
        total = {name: torch.zeros_like(leaf) for name, leaf in state.items()}
        weight = sum(len(site.data["train"]) for site in sites)
        for site in sites:
            model.load_state_dict(state, strict=False)
            bare(model, site.data["train"], batch_size, 0.05, torch.Generator().manual_seed(r), device)
            own = model.state_dict()
            for name, leaf in total.items():
                leaf.add_(own[name], alpha=len(site.data["train"]) / weight)
        state = total


def ours(task: Classification, sites: dict[str, Site], rounds: int, batch_size: int, engine: Any = InProcess) -> Any:
    method = FedAvg(task, LocalTraining(batch_size=batch_size))
    here = engine(method, sites)
    try:
        state = method.init(task.first(0))
        for step in train(method, here, state, rounds=rounds):
            state = step.state
    finally:
        here.close()
    return state


def alternate(first: Callable[[], Any], second: Callable[[], Any], times: int, clock: Callable[[], float]) -> float:
    """The median of first/second over ``times`` pairs, after one of each to warm up; the order changes each time."""
    first(), second()
    ratios = []
    for i in range(times):
        spent = {}
        for f in ((first, second), (second, first))[i % 2]:
            begun = clock()
            f()
            spent[f] = clock() - begun
        ratios.append(spent[first] / spent[second])
    return statistics.median(ratios)


def tell(name: str, value: float, goal: float, at_most: bool = True, **more: Any) -> None:
    met = value <= goal if at_most else value >= goal
    print(json.dumps({"name": name, "value": round(value, 4), "goal": goal, "met": met, **more}), flush=True)


def small_cnn() -> None:
    """CPU time in process over a bare loop: small CNN, 28 x 28, 8 sites x 600 images."""
    task = Classification(Network("cnn", (1, 28, 28), 2, (("width", 32), ("norm", "batch"))))
    sites = sites_of(8, 600, (1, 28, 28))
    rounds, times = (1, 9) if QUICK else (2, 15)
    ratio = alternate(
        lambda: ours(task, sites, rounds, 16),
        lambda: bare_rounds(task, list(sites.values()), rounds, 16),
        times,
        time.process_time,
    )
    tell("in process / bare loop, small CNN, CPU time", ratio, 1.05)


def resnet() -> None:
    """CPU time in process over a bare loop: ResNet-18, 3 x 128 x 128, 4 sites."""
    task = Classification(Network("resnet18", (3, 128, 128), 2))
    n = 16 if QUICK else 32
    sites = sites_of(4, n, (3, 128, 128))
    ratio = alternate(
        lambda: ours(task, sites, 1, 16),
        lambda: bare_rounds(task, list(sites.values()), 1, 16),
        3 if QUICK else 7,
        time.process_time,
    )
    tell("in process / bare loop, ResNet-18, CPU time", ratio, 1.02)


def _half(task: Classification, sites: list[Site], rounds: int, line: Any) -> None:
    torch.set_num_threads(1)
    bare_rounds(task, sites, rounds, 16)
    line.send(1)


def gpu() -> None:
    """Wall time on a GPU over a bare loop there, ResNet-18 at 3 x 128 x 128; None without a GPU."""
    if not torch.cuda.is_available():
        return
    task = Classification(Network("resnet18", (3, 128, 128), 2))
    sites = sites_of(4, 256 if QUICK else 1024, (3, 128, 128), "cuda")

    def synchronized(f: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            f()
            torch.cuda.synchronize()

        return run

    ratio = alternate(
        synchronized(lambda: ours(task, sites, 1, 32)),
        synchronized(lambda: bare_rounds(task, list(sites.values()), 1, 32)),
        7,
        time.perf_counter,
    )
    tell("in process / bare loop on a GPU, ResNet-18, wall time", ratio, 1.1, gpu=torch.cuda.get_device_name())


def workers() -> None:
    """Wall time of two workers over two bare processes that share the sites, and over in process."""
    task = Classification(Network("cnn", (1, 28, 28), 2, (("width", 32), ("norm", "batch"))))
    sites = sites_of(8, 600, (1, 28, 28))
    rounds, times = (4, 3) if QUICK else (6, 7)
    context = multiprocessing.get_context("fork")

    def two_bare() -> None:
        names, jobs = sorted(sites), []
        for half in (names[::2], names[1::2]):
            here, there = context.Pipe()
            process = context.Process(target=_half, args=(task, [sites[n] for n in half], rounds, there))
            process.start()
            jobs.append((process, here))
        for process, here in jobs:
            here.recv()
            process.join()

    def two_workers() -> None:
        ours(task, sites, rounds, 16, lambda method, given: Workers(method, given, workers=2))

    ratio = alternate(two_workers, two_bare, times, time.perf_counter)
    tell("two workers / two bare processes, wall time", ratio, 1.1)
    ratio = alternate(two_workers, lambda: ours(task, sites, rounds, 16), times, time.perf_counter)
    tell("two workers / in process, wall time", ratio, 1.0)


def merging() -> None:
    """Speed of merging 16 trees of 25 M float32, relative to ``out.add_(tree, alpha=w)`` in a loop."""
    size, count = (25_000_000, 16) if not QUICK else (5_000_000, 16)
    leaves = {f"layer-{i}": torch.randn(size // 10) for i in range(10)}
    replies = [Reply({"update": WeightedMean({n: leaf + i for n, leaf in leaves.items()}, 1.0)}) for i in range(count)]
    trees: list[Tree] = [reply.mean("update").total for reply in replies]

    def floor() -> None:
        out = {name: torch.zeros_like(leaf) for name, leaf in trees[0].items()}
        for tree in trees:
            for name, leaf in out.items():
                leaf.add_(tree[name], alpha=1 / count)

    slowness = alternate(lambda: merge(replies), floor, 7, time.perf_counter)
    tell("merging 16 trees, speed / add_ loop", 1 / slowness, 0.7, at_most=False, numbers=size)


def memory() -> None:
    """Peak memory of the server per site in flight, in models. Measured in a process of its own."""
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_peak, args=(there,))
    process.start()
    value = here.recv()
    process.join()
    tell("server's peak memory, models per site in flight", value, 3.0)


def _peak(line: Any) -> None:
    task = Classification(Network("mlp", (1000,), 2, (("width", 20_000),)))  # 20 M numbers, 80 MB
    sites = sites_of(6, 4, (1000,))
    method = FedAvg(task, LocalTraining(batch_size=4))
    first = task.first(0)
    bytes_ = sum(leaf.numel() * 4 for leaf in first.values())
    with Workers(method, sites, workers=2) as engine:
        state = method.init(first)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for step in train(method, engine, state, rounds=2):
            state = step.state
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line.send((after - before) / bytes_ / len(sites))


def many_sites() -> None:
    """Time per asked site with 1,000 sites over that with 100, 50 asked a round."""
    task = Classification(Network("cnn", (1, 28, 28), 2, (("width", 8), ("depth", 2))))
    method = FedAvg(task, LocalTraining(batch_size=20))
    few, many = sites_of(100, 40, (1, 28, 28)), sites_of(1000, 40, (1, 28, 28))

    def some(sites: dict[str, Site]) -> Callable[[], None]:
        def run() -> None:
            state = method.init(task.first(0))

            def cohort(names: Sequence[str], r: int) -> Sequence[str]:
                return sample_sites(names, 50, r)

            for step in train(method, InProcess(method, sites), state, rounds=2 if QUICK else 6, sampler=cohort):
                state = step.state

        return run

    ratio = alternate(some(many), some(few), 5 if QUICK else 11, time.process_time)
    tell("time per asked site, 1,000 sites / 100 sites", ratio, 1.05)


BENCHMARKS = {f.__name__: f for f in (small_cnn, resnet, gpu, workers, merging, memory, many_sites)}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in [arg for arg in sys.argv[1:] if not arg.startswith("-")] or BENCHMARKS:
        BENCHMARKS[name]()
