"""A run's folder belongs to one process at a time; a run stops between two rounds when it is asked to, and resumes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from polyclinic.core.audit_log import verify
from polyclinic.data.examples import DataError
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.cancellation import stopping
from polyclinic.studies.run.run_directory import Folder, RunHeld, Stopped, held
from polyclinic.studies.run.run_lock import STOP, ask_to_stop, holder
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import facts, npz, tensors

STUDY = """\
name = "stops"
rounds = 60
seeds = [0, 1]

[data]
path = "small.npz"
kind = "npz"
sites = "site"

[task]
network = "mlp"
options = { width = 4, depth = 1 }

[training]
batch_size = 8
steps = 1

[evaluation]
interval = 30

[engine]
kind = "ENGINE"
workers = 2
parallel = "arms"

[[methods]]
name = "fedavg"

[[methods]]
name = "scaffold"
"""
HOLDS = """
import sys, time
from pathlib import Path
from polyclinic.studies.run.run_directory import Folder
folder = Folder(Path(sys.argv[1]))
folder.hold()
print("held", flush=True)
time.sleep(600)
"""


def text(engine: str, rounds: int = 60) -> str:
    return STUDY.replace("ENGINE", engine).replace("rounds = 60", f"rounds = {rounds}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_lives_is_nobody_elses(here: Path) -> None:
    study = text("in-process", rounds=2)
    events = run(parse(study), study, here / "run")
    next(events)
    assert holder(here / "run") == os.getpid()
    for resume in (True, False):
        with pytest.raises(RunHeld, match=rf"process {os.getpid()} works on this run.*polyclinic stop"):
            next(run(parse(study), study, here / "run", resume=resume))
    assert sum(e["event"] == "begun" for e in verify(here / "run" / "journal.jsonl")) == 1
    events.close()
    assert holder(here / "run") == 0
    assert len(list(run(parse(study), study, here / "run", resume=True))) > 4


def test_a_killed_process_holds_nothing(here: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(here / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert holder(here / "run") == child.pid
        with pytest.raises(RunHeld, match=f"process {child.pid} "):
            Folder(here / "run").hold()
        child.kill()
    assert holder(here / "run") == 0
    folder = Folder(here / "run")
    folder.hold()
    folder.close()


def test_of_two_fresh_runs_at_once_the_second_is_refused(here: Path) -> None:
    study = text("in-process", rounds=2)
    list(run(parse(study), study, here / "run"))
    events = run(parse(study), study, here / "run", fresh=True)
    next(events)
    for fresh in (True, False):
        with pytest.raises(RunHeld, match=rf"process {os.getpid()} works on this run"):
            next(run(parse(study), study, here / "run", fresh=fresh, resume=not fresh))
    assert len(list(events)) > 4
    assert [e["event"] for e in verify(here / "run" / "journal.jsonl")].count("begun") == 1


def test_fresh_deletes_nothing_if_the_study_cannot_run(here: Path) -> None:
    study = text("in-process", rounds=2)
    list(run(parse(study), study, here / "run"))
    before = tensors(here / "run").keys()
    npz(here, labels=np.zeros(160, np.int64))
    with pytest.raises(DataError, match="one class only"):
        list(run(parse(study), study, here / "run", fresh=True))
    assert tensors(here / "run").keys() == before
    with pytest.raises(DataError, match="one class only"):
        list(run(parse(study), study, here / "new"))
    assert not (here / "new").exists()


def test_a_lock_in_a_deleted_folder_is_no_lock(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process deletes the folder between the opening and the locking of the lock's file."""
    real, calls = fcntl.flock, list[int]()

    def flock(file: IO[str], how: int) -> None:
        if not calls:
            shutil.rmtree(here / "run")
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(here / "run"):
        assert len(calls) == 2
        assert holder(here / "run") == os.getpid()
        (here / "run" / "run.json").touch()
    assert (here / "run").exists()


def test_a_signal_before_the_run_begins_ends_it_at_once(here: Path) -> None:
    study = text("in-process", rounds=2)
    with held(here / "run") as folder, stopping(folder):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not (here / "run" / STOP).exists()
    with held(here / "run") as folder, stopping(folder) as signals:
        events = run(parse(study), study, here / "run", folder=folder)
        next(events)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            list(events)
        assert signals.code == 143


@pytest.mark.parametrize("engine", ["in-process", "workers"])
def test_a_run_stops_between_rounds_and_goes_on_to_the_same_bits(engine: str, here: Path) -> None:
    """In one process, and with an arm in each of two, which both end their rounds."""
    study = text(engine, rounds=6)
    list(run(parse(study), study, here / "whole"))
    events = run(parse(study), study, here / "cut")
    while (event := next(events)).what != "round" or event.round < 3:
        pass
    assert ask_to_stop(here / "cut") == os.getpid()
    with pytest.raises(Stopped):
        list(events)
    assert not (here / "cut" / STOP).exists()
    assert [e["event"] for e in verify(here / "cut" / "journal.jsonl")][-1] == "stopped"
    assert ask_to_stop(here / "cut") == 0
    assert not (here / "cut" / STOP).exists()
    list(run(parse(study), study, here / "cut", resume=True))
    a, b = tensors(here / "whole"), tensors(here / "cut")
    assert a.keys() == b.keys()
    assert all(bool((a[name] == b[name]).all()) for name in a)
    assert facts(here / "whole") == facts(here / "cut")


def begun(here: Path) -> tuple[subprocess.Popen[str], Path]:
    """A run that a shell has put into the background, where SIGINT is ignored; in the middle of its rounds."""
    (here / "s.toml").write_text(text("in-process", rounds=4000))
    command = [sys.executable, "-m", "polyclinic", "run", "s.toml"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while child.poll() is None and not list(here.rglob("checkpoint.safetensors")):
        time.sleep(0.05)
    (folder,) = (here / "runs").glob("stops-*")
    return child, folder


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(None, 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_in_the_background_stops_when_it_is_asked_to(how: signal.Signals | None, code: int, here: Path) -> None:
    child, folder = begun(here)
    polyclinic = [sys.executable, "-m", "polyclinic"]
    if how is None:
        second = subprocess.run([*polyclinic, "run", "s.toml", "--fresh"], capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert f"process {child.pid} works on this run" in second.stderr + second.stdout
        done = subprocess.run([*polyclinic, "stop", str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    else:
        child.send_signal(how)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == code, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert holder(folder) == 0
    assert [e["event"] for e in verify(folder / "journal.jsonl")][-1] == "stopped"
