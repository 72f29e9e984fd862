"""Runs the same work in each framework, in alternation, and prints one JSON line for each run and each ratio.

    python benchmarks/peers/environments.py FOLDER          # once; skips nothing silently
    python benchmarks/peers/compare.py FOLDER [--times 5] [--work many-small ...] [--peer pfl ...]

A ratio is the CPU time of a framework over that of the bare loop in the same repetition: of the training loop, where it
can be measured, and of whole processes, with imports, data and all processes that were started (Linux: this process
adopts those that a framework leaves). Peak memory is that of the first process of each framework. Final weights are
compared with the bare loop's; a framework that did other work is reported as such and has no ratio. A run without a
result after ``--timeout`` seconds is ended with all processes that it started, and reported. ``extra_ms`` is the
difference of the training loops, in CPU milliseconds for each time that a site trains. ``--large-pages`` sets whether
PyTorch asks for pages of 2 MB, for all frameworks; by default only Polyclinic's runner does. Run it on a quiet machine,
and read the spread.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from work import WORKS

HERE = Path(__file__).parent
TIMEOUT = 600.0
LEFT = 60.0
"""Seconds in which the processes that a framework leaves must end."""
SAME = 1e-4
"""Largest difference of a final weight from the bare loop's, from sums in another order and what training makes of it."""
RUNNERS = {
    "bare": "",
    "pflib_style": "",
    "polyclinic": "",
    "polyclinic_workers": "",
    "pfl": "pfl",
    "fluke": "fluke",
    "flower": "flower",
    "flare": "flare",
}
"""Runners, and the environment that each needs; none for that of Polyclinic."""


def run(name: str, work: str, environments: Path, folder: Path, timeout: float = TIMEOUT) -> dict[str, float | None]:
    """Run one framework once, and return what it measured.

    Raises:
        RuntimeError: If its environment is missing, or it failed, with its last words, or it has no result after
            ``timeout`` seconds. None of its processes remains.
    """
    place = RUNNERS[name]
    python = environments / place / "bin" / "python" if place else Path(sys.executable)
    if not python.is_file():
        raise RuntimeError(f"no environment: python {HERE / 'environments.py'} {environments} {place}")
    script = "polyclinic" if name == "polyclinic_workers" else name
    words = [python, HERE / f"run_{script}.py", work, folder, *(["workers"] if name == "polyclinic_workers" else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [env.get("PYTHONPATH")])])
    env["MPLCONFIGDIR"] = str(environments / "matplotlib")  # for all runs, since its first import lists the fonts
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # the modules of installed packages are compiled too
    (folder / f"{name}.npz").unlink(missing_ok=True)
    before = cpu_of_children()
    # files, since a process that is left over would keep a pipe open
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=out, stderr=errors, env=env, cwd=folder)
        try:
            process.wait(timeout)
            left = wait_for_orphans()
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no result within {timeout:g} s; its processes were ended") from None
        finally:
            end_descendants()
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out if line.startswith('{"loop_cpu_s"')]
        if not lines:
            raise RuntimeError((errors.read().strip() or f"exit code {process.returncode}").splitlines()[-1])
    if left:
        raise RuntimeError(f"{left} of its processes still ran {LEFT:g} s after its result, and were ended")
    measured: dict[str, float | None] = json.loads(lines[-1])
    return measured | {"process_cpu_s": cpu_of_children() - before}


def cpu_of_children() -> float:
    """Return the CPU seconds of all descendants that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parents end, so that their CPU time is counted."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def wait_for_orphans() -> int:
    """Wait until all children of this process have ended, or for ``LEFT`` seconds; return how many have not."""
    until = time.monotonic() + LEFT
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.2)
        except ChildProcessError:
            return 0
    return len(descendants())


def descendants() -> list[int]:
    """Return the processes that this one and its descendants started, and that have not been waited for."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def end_descendants() -> None:
    """Kill all processes that this one and its descendants started, also those that they start meanwhile."""
    while pids := descendants():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.05)


def difference(name: str, folder: Path) -> float:
    """Return the largest difference of a final weight from the bare loop's."""
    ours, bare = np.load(folder / f"{name}.npz"), np.load(folder / "bare.npz")
    return float(np.max([np.abs(ours[key] - bare[key]).max() for key in bare.files]))  # not a number if one is not


def compare(
    work: str, names: list[str], times: int, environments: Path, folder: Path, timeout: float = TIMEOUT
) -> None:
    """Compare the frameworks ``names`` on one work."""
    ratios: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, float] = {}
    for i in range(times):
        order = ["bare", *(names[i % len(names) :] + names[: i % len(names)])] if names else ["bare"]
        bare: dict[str, float | None] = {}
        for name in order:
            line: dict[str, object] = {"work": work, "framework": name, "repetition": i, "load": os.getloadavg()[0]}
            try:
                measured = run(name, work, environments, folder, timeout)
                apart = difference(name, folder)
            except (RuntimeError, OSError, KeyError, ValueError) as error:
                print(json.dumps(line | {"failed": str(error)}), flush=True)
                if name == "bare":
                    break  # nothing to compare with
                continue
            bare = measured if name == "bare" else bare
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
    peers = [name for name in RUNNERS if name != "bare"]
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--peer", nargs="+", default=peers, choices=peers)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each run")
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
            compare(one, given.peer, given.times, given.environments, Path(temporary), given.timeout)
