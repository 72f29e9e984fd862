"""The command that a stopped run prints continues the run, with all options that were given."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli import app
from polyclinic.studies.run import scheduler
from polyclinic.studies.run.run_directory import Stopped
from tests.support.small_runs import npz

STUDY = """
name = "{name}"
rounds = {rounds}
seeds = [0]
[data]
path = "small.npz"
kind = "npz"
sites = "site"
[task]
network = "mlp"
options = {{ width = 4, depth = 1 }}
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""


def hint_in(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if "To continue: " in line]
    words = shlex.split(line.partition("To continue: ")[2])
    assert words[0] == "polyclinic"
    return words[1:]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "a b.toml", "--set", "training.lr=0.01", "--set", "title='x y'", "--out", "there", "--workers", "2"],
        ["demo", "--out", "there", "--workers", "2"],
        ["demo", "--study", "nodules", "--out", "there"],
        ["panel", "run", "a b.toml", "--set", "rounds=1", "--out", "there", "--quiet", "--log-file", "log.txt"],
        ["run", "a b.toml", "--log-file", "log.jsonl", "--log-format", "json", "--log-level", "info"],
        ["study", "run", "a b.toml", "--fresh", "--json"],
    ],
)
def test_the_hint_repeats_the_options_and_resumes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    npz(tmp_path)
    (tmp_path / "a b.toml").write_text(STUDY.format(name="small", rounds=3))
    calls: list[tuple[Any, ...]] = []

    def stopped(
        study: Any, text: str, path: Path, resume: bool, fresh: bool, folder: Any, profile: bool
    ) -> Iterator[Any]:
        calls.append((study.hash, path, study.engine.workers, resume))
        raise Stopped("stop")
        yield

    monkeypatch.setattr(scheduler, "run", stopped)
    again: list[str] = []
    for given in (words, None):
        monkeypatch.setattr(sys, "argv", ["polyclinic", *(given or again)])
        with pytest.raises(SystemExit) as end:
            app.main()
        assert end.value.code == 3
        again = hint_in(capsys.readouterr().err)
    first, second = calls
    assert first[:3] == second[:3]
    assert (first[3], second[3]) == (False, True)
    assert again == [word for word in words if word != "--fresh"] + ["--resume"]


@pytest.mark.slow
def test_a_run_that_a_signal_stopped_is_resumed_by_the_printed_command(tmp_path: Path) -> None:
    npz(tmp_path)
    (tmp_path / "s.toml").write_text(STUDY.format(name="small", rounds=4000))
    command = [sys.executable, "-m", "polyclinic", "run", "s.toml", "--set", "training.lr=0.02", "--out", "there"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "round 3/4000" in line:
                process.terminate()
                break
        _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    again = hint_in(err)
    assert again == ["run", "s.toml", "--set", "training.lr=0.02", "--out", "there", "--resume"]
    (folder,) = (tmp_path / "there").glob("small-*")
    before = (folder / "journal.jsonl").read_text().count('"begun"')
    with subprocess.Popen(
        [sys.executable, "-m", "polyclinic", *again],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        assert process.stdout is not None
        first = next(line for line in process.stdout if "round " in line and "/4000" in line)
        process.terminate()
        process.communicate(timeout=300)
    assert int(first.split("/4000")[0].split()[-1]) > 3
    assert (folder / "journal.jsonl").read_text().count('"begun"') == before
    assert '"resumed"' in (folder / "journal.jsonl").read_text()
