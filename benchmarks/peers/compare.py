"""Runs the same work in each framework, in alternation, and prints one JSON line for each run and each ratio.

    python benchmarks/peers/environments.py FOLDER          # once; skips nothing silently
    python benchmarks/peers/compare.py FOLDER [--times 5] [--work many-small ...] [--peer pfl ...]

A ratio is the CPU time of a framework over that of the bare loop in the same repetition: of the training loop, where it
can be measured, and of whole processes, with imports, data and all processes that were started (Linux: this process
adopts those that a framework leaves). Peak memory is that of the first process of each framework. Final weights are
compared with the bare loop's; a framework that did other work is reported as such and has no ratio. ``extra_ms`` is
the difference of the training loops, in CPU milliseconds for each time that a site trains. ``--large-pages`` sets
whether PyTorch asks for pages of 2 MB, for all frameworks; by default only Polyclinic's runner does. Run it on a
quiet machine, and read the spread.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from work import WORKS

HERE = Path(__file__).parent
TIMEOUT = 900
SAME = 1e-4
"""Largest difference of a final weight from the bare loop's, from sums in another order and what training makes of it."""
RUNNERS = {
    "bare": "",
    "pflib_style": "",
    "polyclinic": "",
    "polyclinic_workers": "",
    "pfl": "pfl",
    "flower": "flower",
}
"""Runners, and the environment that each needs; none for that of Polyclinic."""


def run(name: str, work: str, environments: Path, folder: Path) -> dict[str, float | None]:
    """Run one framework once, and return what it measured.

    Raises:
        RuntimeError: If it failed, with its last words.
    """
    place = RUNNERS[name]
    python = environments / place / "bin" / "python" if place else Path(sys.executable)
    script = "polyclinic" if name == "polyclinic_workers" else name
    words = [python, HERE / f"run_{script}.py", work, folder, *(["workers"] if name == "polyclinic_workers" else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [env.get("PYTHONPATH")])])
    before = cpu_of_children()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=TIMEOUT, cwd=folder)
    wait_for_orphans()
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"loop_cpu_s"')]
    if not lines:
        raise RuntimeError((done.stderr.strip() or "no result").splitlines()[-1])
    measured: dict[str, float | None] = json.loads(lines[-1])
    return measured | {"process_cpu_s": cpu_of_children() - before}


def cpu_of_children() -> float:
    """Return the CPU seconds of all descendants that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parents end, so that their CPU time is counted."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def wait_for_orphans(seconds: float = 60.0) -> None:
    """Wait until all children of this process have ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.2)
        except ChildProcessError:
            return
    raise RuntimeError("processes of the framework still run")


def difference(name: str, folder: Path) -> float:
    """Return the largest difference of a final weight from the bare loop's."""
    ours, bare = np.load(folder / f"{name}.npz"), np.load(folder / "bare.npz")
    return max(float(np.abs(ours[key] - bare[key]).max()) for key in bare.files)


def compare(work: str, names: list[str], times: int, environments: Path, folder: Path) -> None:
    """Compare the frameworks ``names`` on one work."""
    ratios: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, float] = {}
    for i in range(times):
        order = ["bare", *(names[i % len(names) :] + names[: i % len(names)])] if names else ["bare"]
        bare: dict[str, float | None] = {}
        for name in order:
            line: dict[str, object] = {"work": work, "framework": name, "repetition": i, "load": os.getloadavg()[0]}
            try:
                measured = run(name, work, environments, folder)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                print(json.dumps(line | {"failed": str(error)}), flush=True)
                continue
            bare = measured if name == "bare" else bare
            apart = difference(name, folder)
            print(json.dumps(line | measured | {"apart": apart}), flush=True)
            peaks[name] = max(peaks.get(name, 0.0), measured["peak_mb"] or 0.0)
            for kind in ("loop_cpu_s", "process_cpu_s"):
                mine, floor = measured[kind], bare.get(kind)
                if apart <= SAME and mine and floor:
                    ratios.setdefault((name, kind), []).append(mine / floor)
                    if kind == "loop_cpu_s":
                        extra = (mine - floor) * 1000 / WORKS[work].site_rounds
                        ratios.setdefault((name, "extra_ms"), []).append(extra)
    for (name, kind), found in ratios.items():
        summary = {"median": statistics.median(found), "least": min(found), "most": max(found), "runs": len(found)}
        rounded = {key: round(value, 3) for key, value in summary.items()}
        print(json.dumps({"work": work, "framework": name, "ratio_of": kind, "peak_mb": round(peaks[name])} | rounded))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--peer", nargs="+", default=[name for name in RUNNERS if name != "bare"])
    parser.add_argument(
        "--large-pages", choices=["0", "1"], help="for all frameworks, whether PyTorch asks for pages of 2 MB"
    )
    given = parser.parse_args()
    if given.large_pages is not None:
        os.environ["THP_MEM_ALLOC_ENABLE"] = given.large_pages
    given.environments = given.environments.absolute()
    adopt_orphans()
    cores = os.cpu_count()
    print(json.dumps({"machine": platform.machine(), "cores": cores, "python": platform.python_version()}), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for one in given.work:
            compare(one, given.peer, given.times, given.environments, Path(temporary))
