"""What Ray costs for each site and round, and how much faster a sweep is on two workers than on one.

Both parts start Ray on this machine. Lines are JSON objects.

``sites``: FedAvg on an MLP, 20 sites of 40 rows, in process and with the sites at two Ray workers, in alternation. The
training takes less than a millisecond, so that the difference is what a request and a reply cost: wall time, and CPU
time of the process that starts the run.

``arms``: a study of 24 method runs (FedAvg on a small CNN, 24 seeds), whole, on one worker and on two, in alternation,
on a cluster that runs already. Two cores of this machine may be threads of one core: ``threads`` says what two
processes without Ray gain on them, with convolutions.

    python benchmarks/cluster.py [sites] [arms] [--times 3]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import Examples
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan, build_method
from polyclinic.engines.ray import cluster
from polyclinic.engines.ray.site_actors import RaySites
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run as run_study

SITES, ROWS, ROUNDS, ARMS, IMAGES = 20, 40, 10, 24, 1_200
STUDY = """\
name = "sweep"
rounds = 30
seeds = {seeds}

[data]
path = "{path}"
kind = "npz"
sites = "site"

[task]
kind = "classification"
network = "cnn"

[engine]
kind = "ray"
address = "local"
workers = {workers}
parallel = "arms"

[[methods]]
name = "fedavg"
"""


def site(name: str, seed: int) -> Site:
    """Return a site with random rows."""
    rng = torch.Generator().manual_seed(seed)
    names = tuple(f"{name}-{i}" for i in range(ROWS))
    x, y = torch.randn(ROWS, 16, generator=rng), torch.randint(0, 2, (ROWS,), generator=rng)
    return Site(name, {"train": Examples(x, y, names, names)})


def rounds(plan: Plan, sites: Mapping[str, Site], workers: int) -> dict[str, float]:
    """Run all rounds in process, or with ``workers`` at Ray, and return seconds of each site and round."""
    method = plan.build_method()
    state = method.init(method.task.first(0))
    with (
        closing(RaySites(build_method, plan.to_json(), sites, workers=workers))
        if workers
        else nullcontext(InProcess(method, sites)) as engine
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        for step in train(method, engine, state, rounds=ROUNDS):
            if step.lost:
                raise SystemExit(f"sites failed: {step.lost}")
        spent = time.perf_counter() - wall, time.process_time() - cpu
    return dict(zip(("wall_ms", "cpu_ms"), (1000 * s / ROUNDS / len(sites) for s in spent), strict=True))


def measure_sites(times: int) -> dict[str, object]:
    """Return what a site and round costs in process and with two workers: median, least and most."""
    sites = {f"site-{k:02}": site(f"site-{k:02}", k) for k in range(SITES)}
    plan = Plan("classification", "mlp", (16,), 2, "fedavg", tuple(sites), ROUNDS, training={"batch_size": ROWS})
    found: dict[str, list[float]] = {}
    with cluster.connected("local", 2):
        for _ in range(times + 1):  # the first warms up
            for name, workers in (("in process", 0), ("two workers", 2)):
                for unit, value in rounds(plan, sites, workers).items():
                    found.setdefault(f"{name}, {unit}", []).append(value)
    return {name: spread(values[1:]) for name, values in found.items()}


def measure_arms(times: int) -> dict[str, object]:
    """Return the wall time of the sweep on one worker over that on two, and what two processes gain without Ray."""
    found: dict[str, list[float]] = {"one": [], "two": [], "ratio": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        labels = np.arange(IMAGES) % 2
        images = rng.normal(100, 30, (IMAGES, 28, 28)).clip(0, 255).astype(np.uint8)
        where = np.repeat(["north", "south", "east", "west"], IMAGES // 4)
        np.savez(folder / "images.npz", images=images, labels=labels, site=where)
        with cluster.connected("local", 2):
            for time_ in range(times):
                for key, workers in (("one", 1), ("two", 2)):
                    text = STUDY.format(path=folder / "images.npz", seeds=list(range(ARMS)), workers=workers)
                    begun = time.perf_counter()
                    for _ in run_study(parse(text, folder / "sweep.toml"), text, folder / f"{key}-{time_}"):
                        pass
                    found[key].append(time.perf_counter() - begun)
                found["ratio"].append(found["one"][-1] / found["two"][-1])
    return {key: spread(values) for key, values in found.items()} | {"threads": spread(threads(times))}


def multiply() -> None:
    """Work as one process: the convolutions of the sweep."""
    torch.set_num_threads(1)
    images, kernel = torch.randn(32, 16, 28, 28), torch.randn(32, 16, 3, 3)
    for _ in range(600):
        torch.nn.functional.conv2d(images, kernel, padding=1)


def threads(times: int) -> list[float]:
    """Return the gain of two processes without Ray: the time of twice the work in turn, over that side by side."""
    context, gains = multiprocessing.get_context("spawn"), []
    for _ in range(times):

        def spent(count: int) -> float:
            processes = [context.Process(target=multiply) for _ in range(count)]
            begun = time.perf_counter()
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            return time.perf_counter() - begun

        gains.append(2 * spent(1) / spent(2))
    return gains


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


PARTS: dict[str, Callable[[int], dict[str, object]]] = {"sites": measure_sites, "arms": measure_arms}


def main() -> None:
    """Measure the parts that were asked for, by default both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{' or '.join(PARTS)}; by default both")
    parser.add_argument("--times", type=int, default=3, help="repetitions (default 3)")
    given = parser.parse_args()
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in given.parts or PARTS:
        print(json.dumps({"part": name, "cores": os.cpu_count(), **PARTS[name](given.times)}), flush=True)


if __name__ == "__main__":
    main()
