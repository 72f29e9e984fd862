"""Cost against the number of sites, rounds, method runs and parameters, with fitted exponents.

Each line is one JSON object. An exponent is the slope of log cost over log size, by least squares; costs are CPU
seconds of this process. An exponent above 1.1 is a defect. As in Polyclinic's command, large tensors are allocated in
pages of 2 MB; otherwise the kernel's work for pages of 4 KB, which small tensors do not need, is counted too.

    python benchmarks/scaling.py [--quick] [NAME...]
"""

import argparse
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does, before PyTorch allocates

import torch

from polyclinic.core.execution import UniformSampler
from polyclinic.core.rounds import train
from polyclinic.core.site import Site, SitesOnDemand
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg

torch.set_num_threads(1)
QUICK = False
ROWS, FEATURES = 20, 8


class Rows:
    """Features and labels of one site."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(ROWS, FEATURES, generator=rng), torch.randint(0, 2, (ROWS,), generator=rng)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def sites(count: int) -> SitesOnDemand:
    return SitesOnDemand(
        (f"site-{i:06}" for i in range(count)), lambda name: Site(name, {"train": Rows(int(name[5:]))})
    )


def run(count: int, asked: int, rounds: int, width: int = 16) -> None:
    task = Classification(Network("mlp", (FEATURES,), 2, (("width", width),)))
    method = FedAvg(task, LocalTraining(batch_size=ROWS))
    state, all_sites = method.init(task.first(0)), sites(count)
    sampler = UniformSampler(tuple(all_sites), asked)
    for step in train(method, InProcess(method, all_sites), state, rounds=rounds, sampler=sampler):
        state = step.state


def cpu(work: Callable[[], Any], times: int = 3) -> float:
    spent = []
    for _ in range(times):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return statistics.median(spent)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def tell(name: str, sizes: Sequence[int], costs: Sequence[float], goal: float = 1.1) -> None:
    slope = exponent(sizes, costs)
    costs = [round(cost, 3) for cost in costs]
    print(
        json.dumps({"name": name, "sizes": sizes, "cpu": costs, "exponent": round(slope, 3), "met": slope <= goal}),
        flush=True,
    )


def number_of_sites() -> None:
    """All sites train in each of three rounds."""
    sizes = [100, 400, 1600] if QUICK else [100, 400, 1600, 6400]
    tell("sites, all asked", sizes, [cpu(lambda n=n: run(n, n, 3)) for n in sizes])  # type: ignore[misc]


def number_of_rounds() -> None:
    """Fifty sites."""
    sizes = [5, 20, 80] if QUICK else [5, 20, 80, 320]
    tell("rounds", sizes, [cpu(lambda n=n: run(50, 50, n)) for n in sizes])  # type: ignore[misc]


def number_of_parameters() -> None:
    """Width of a hidden layer between layers of fixed width, at large sizes, where arithmetic and copies dominate."""
    sizes = [20_000, 80_000, 320_000] if QUICK else [20_000, 80_000, 320_000, 1_280_000]
    tell("parameters", sizes, [cpu(lambda n=n: run(8, 8, 2, n)) for n in sizes])  # type: ignore[misc]


def a_hundred_thousand_sites() -> None:
    """1,000 of 100,000 sites are asked in each of five rounds, against all of 100 sites; CPU time per asked site."""
    rounds = 2 if QUICK else 5
    few, many = cpu(lambda: run(100, 100, rounds)) / 100, cpu(lambda: run(100_000, 1_000, rounds)) / 1_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ratio = many / few
    print(
        json.dumps({"name": "100,000 sites, 1,000 asked / 100 sites", "value": round(ratio, 3), "met": ratio <= 1.3}),
        json.dumps({"name": "peak memory, MB", "value": round(peak), "met": peak < 1500}),
        sep="\n",
        flush=True,
    )


BENCHMARKS = {
    f.__name__: f for f in (number_of_sites, number_of_rounds, number_of_parameters, a_hundred_thousand_sites)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="take fewer sizes")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    QUICK = given.quick
    for name in given.names or BENCHMARKS:
        BENCHMARKS[name]()
