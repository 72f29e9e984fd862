"""CPU seconds and memory of the robust rules, compared with numpy: ``python benchmarks/robust.py [--quick]``.

16 updates of 25 million float32 each (1.6 GB), or a tenth of that. Every case runs in a process of its own, on one
thread. Memory is what a case takes at its highest beyond the updates themselves, in trees (the size of one update); the
target is two at most. numpy holds its updates as one [16, n] array; its rules are written as one would write them.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from polyclinic.methods.robust.rules.aggregation_rule import Average, Updates
from polyclinic.methods.robust.rules.bulyan import Bulyan
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.geometric_median import GeometricMedian
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum

SITES, F = 16, 3


def numpy_krum(x: np.ndarray) -> np.ndarray:
    squares = np.array([[float(np.dot(a - b, a - b)) for b in x] for a in x])
    return x[np.sort(squares, 1)[:, 1 : SITES - F - 1].sum(1).argmin()].copy()


OURS: dict[str, Any] = {
    "mean": Average(weighted=False),
    "median": Median(),
    "trimmed mean": TrimmedMean(F / SITES),
    "krum": Krum(F / SITES),
    "multi-krum": MultiKrum(F / SITES),
    "bulyan": Bulyan(F / SITES),
    "geometric median": GeometricMedian(),
}
THEIRS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x: x.mean(0),
    "median": lambda x: np.median(x, 0),
    "trimmed mean": lambda x: np.sort(x, 0)[F : SITES - F].mean(0),
    "krum": numpy_krum,
}


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held() -> int:
    """The memory that it holds now, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def case(line: Connection, whose: str, rule: str, size: int) -> None:
    """Runs one rule and sends CPU seconds and trees of memory."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    if whose == "ours":
        leaves = {f"layer.{i}": size // 25 for i in range(25)}
        trees = {f"site-{k:02}": {n: torch.randn(s, generator=rng) for n, s in leaves.items()} for k in range(SITES)}
        updates = Updates.of(trees)
        start, before = time.process_time(), held()
        result: Any = OURS[rule].aggregate(updates, {})
    else:
        x = np.empty((SITES, size), np.float32)
        for row in x:
            torch.from_numpy(row).normal_(generator=rng)
        start, before = time.process_time(), held()
        result = THEIRS[rule](x)
    seconds = time.process_time() - start
    line.send((seconds, max(0, peak() - before) / (4 * size), type(result).__name__))


def measure(whose: str, rule: str, size: int) -> tuple[float, float]:
    """CPU seconds, and trees of memory beyond the updates."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=case, args=(theirs, whose, rule, size))
    process.start()
    theirs.close()
    seconds, trees, _ = ours.recv()
    process.join()
    return seconds, trees


def main() -> None:
    """Prints one line a rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the numbers")
    size = 2_500_000 if parser.parse_args().quick else 25_000_000
    print(
        f"{SITES} updates of {size:,} float32, {F} presumed corrupt; CPU seconds and trees of memory beyond the updates"
    )
    print(f"{'':18}{'seconds':>9}{'trees':>7}{'numpy s':>10}{'trees':>7}")
    for rule in OURS:
        seconds, trees = measure("ours", rule, size)
        line = f"{rule:18}{seconds:9.2f}{trees:7.2f}"
        if rule in THEIRS:
            seconds, trees = measure("numpy", rule, size)
            line += f"{seconds:10.2f}{trees:7.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
