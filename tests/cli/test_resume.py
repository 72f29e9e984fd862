"""The command that a stopped run prints continues the run, with all options that were given."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli import app, rendering
from polyclinic.studies.run import scheduler
from polyclinic.studies.run.run_directory import Stopped
from tests.studies.run.test_scheduler import npz

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


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    rendering.progress.quiet = rendering.progress.stderr = False
    rendering.note_invocation([])


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
        ["panel", "run", "a b.toml", "--set", "rounds=1", "--out", "there", "--quiet", "--log-file", "log.txt"],
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

    def stopped(study: Any, text: str, path: Path, resume: bool, fresh: bool, folder: Any) -> Iterator[Any]:
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
