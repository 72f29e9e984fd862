"""The comparison with other frameworks: it ends what it starts, names what is missing, and compares the same work.

Each test calls it in a process of its own, because it adopts and ends all processes below its own.
"""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
RESULT = '{"loop_cpu_s": null, "process_cpu_s": 0.0, "peak_mb": 1.0}'

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")


def stand_in(folder: Path, script: str, name: str = "fluke") -> None:
    """Write an environment whose Python is the shell script ``script``."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def attempt(folder: Path, timeout: float = 20.0, left: float = 1.0) -> str:
    """Run the stand-in once and return what it measured, or the error."""
    code = (
        "import sys, pathlib, compare\n"
        "compare.adopt_orphans()\n"
        "compare.LEFT, folder = float(sys.argv[3]), pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    print(compare.run('fluke', 'large', folder, folder, float(sys.argv[2])))\n"
        "except RuntimeError as error:\n"
        "    print('error:', error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PEERS)}
    words = [sys.executable, "-c", code, str(folder), str(timeout), str(left)]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment, timeout=60).stdout.strip()


def runs(pid: str) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid.strip()}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_missing_environment_is_named_with_the_command_that_creates_it(tmp_path: Path) -> None:
    assert attempt(tmp_path) == f"error: no environment: python {PEERS / 'environments.py'} {tmp_path} fluke"


def test_a_run_without_a_result_is_ended_with_processes_in_other_sessions(tmp_path: Path) -> None:
    stand_in(tmp_path, "setsid sleep 300 & echo $! > other\nsleep 300 & echo $! > child\nwait")
    begun = time.monotonic()
    assert attempt(tmp_path, 1.0) == "error: no result within 1 s; its processes were ended"
    assert time.monotonic() - begun < 20
    assert not runs((tmp_path / "other").read_text())
    assert not runs((tmp_path / "child").read_text())


def test_processes_that_a_framework_leaves_are_ended_and_counted(tmp_path: Path) -> None:
    stand_in(tmp_path, f"setsid sleep 300 & echo $! > other\necho '{RESULT}'")
    assert attempt(tmp_path) == "error: 1 of its processes still ran 1 s after its result, and were ended"
    assert not runs((tmp_path / "other").read_text())


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Traceback' >&2; echo 'ModuleNotFoundError: fluke' >&2; exit 1", "error: ModuleNotFoundError: fluke"),
        ("exit 3", "error: exit code 3"),
    ],
)
def test_a_failed_run_says_why(tmp_path: Path, script: str, says: str) -> None:
    stand_in(tmp_path, script)
    assert attempt(tmp_path) == says


def test_cpu_time_of_all_processes_counts(tmp_path: Path) -> None:
    """A detached process that computes for a while after the first one ended."""
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    stand_in(tmp_path, f"echo '{RESULT}'\nsetsid {sys.executable} -S -c \"{busy}\" &")
    measured = ast.literal_eval(attempt(tmp_path, left=30.0))
    assert measured["process_cpu_s"] > 0.5
    assert measured["peak_mb"] == 1.0


def compare(folder: Path, *words: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Call the command."""
    command = [sys.executable, str(PEERS / "compare.py"), str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()][1:]


def test_without_the_bare_loop_there_is_no_ratio(tmp_path: Path) -> None:
    stand_in(tmp_path, f"echo '{RESULT}'")
    done = compare(tmp_path, "--peer", "fluke", "--times", "3", "--work", "large", "--timeout", "0.01")
    assert done.returncode == 0, done.stderr
    assert [line["framework"] for line in lines(done)] == ["bare"] * 3
    assert all(line["failed"].startswith("no result within 0.01 s") for line in lines(done))


def test_an_unknown_peer_is_refused(tmp_path: Path) -> None:
    done = compare(tmp_path, "--peer", "flake")
    assert done.returncode == 2
    assert "invalid choice: 'flake'" in done.stderr
    words = [sys.executable, str(PEERS / "environments.py"), str(tmp_path), "flake"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no peer flake: known are pfl, fluke, flower, flare" in done.stderr


def test_weights_that_are_no_numbers_are_not_equal(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(tmp_path / "fluke.npz", a=np.array([0.0, 0.5]), b=np.array([0.0, np.nan]))
    np.savez(tmp_path / "pfl.npz", a=np.array([0.0, 0.5]), b=np.zeros(2))
    code = f"import compare, pathlib; print(*(compare.difference(n, pathlib.Path({str(tmp_path)!r})) for n in ('fluke', 'pfl')))"
    environment = os.environ | {"PYTHONPATH": str(PEERS)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, timeout=60)
    assert done.stdout.split() == ["nan", "0.5"]


@pytest.mark.slow
@pytest.mark.deploy
def test_frameworks_that_are_installed_here_do_the_same_work(tmp_path: Path) -> None:
    """Polyclinic, a loop with a model for each client, and FLARE's simulator, which starts a process for each site."""
    pytest.importorskip("nvflare")
    stand_in(tmp_path, f'exec {sys.executable} "$@"', "flare")
    done = compare(tmp_path, "--peer", "polyclinic", "pflib_style", "flare", "--times", "1", "--work", "large")
    measured = {line["framework"]: line for line in lines(done) if "repetition" in line}
    assert list(measured) == ["bare", "polyclinic", "pflib_style", "flare"]
    assert all(line["apart"] < 1e-6 for line in measured.values()), measured
    assert measured["flare"]["process_cpu_s"] > 2 * measured["polyclinic"]["process_cpu_s"]
    assert not [line for line in lines(done) if line["framework"] == "flare" and line.get("ratio_of") == "loop_cpu_s"]
