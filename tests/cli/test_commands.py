"""The command line: quick start, clear messages, and no traceback for a user's mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from polyclinic.cli import app
from polyclinic.studies.config.study_config import read
from tests.support.small_runs import npz, study

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def polyclinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in ``tmp_path``, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["polyclinic", *args])
        capsys.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "args", [["--help"], ["run", "--help"], ["methods"], ["methods", "--json"], ["study", "--help"], ["--version"]]
)
def test_looking_around_imports_no_numerical_library(args: list[str]) -> None:
    script = f"""
import sys
from polyclinic.cli import app
sys.argv = ["polyclinic", *{args!r}]
try:
    app.main()
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "monai", "numpy", "scipy", "matplotlib") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_torchvision_comes_along() -> None:
    from importlib.metadata import PackageNotFoundError, version

    with pytest.raises(PackageNotFoundError):
        version("torchvision")


def test_a_study_from_the_first_line_to_the_report(polyclinic: Command, tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path).split("[[methods]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    (tmp_path / "s.toml").write_text(text + '[[methods]]\nname = "local"\n\n[[methods]]\nname = "fedavg"\n')
    changes = ("--set", "training.lr=0.2", "--set", "rounds=2")
    done = polyclinic("run", "s.toml", *changes, "--profile")
    assert done.code == 0, done.err
    assert "✓ fedavg" in done.out
    (folder,) = (tmp_path / "runs").glob("small-*")
    profile = json.loads((folder / "profile.json").read_text())
    inside = sum(sum(one["phases"].values()) for one in profile["method_runs"])
    assert 0 < profile["reading"] < profile["seconds"]
    assert 0 < profile["report"] < profile["seconds"]
    assert 0.5 * profile["seconds"] < inside + profile["reading"] + profile["report"] <= 1.05 * profile["seconds"]
    assert " s: reading " in done.out
    assert "slowest sites in training" in done.out
    page = (folder / "report" / "report.html").read_text()
    assert "Where the time went." in page
    times = (folder / "report" / "tables" / "times.csv").read_text().splitlines()
    assert [row.split(",")[0].strip('"') for row in times[1:]] == ["FedAvg", "Local"]
    assert "fedavg (seed 0)" in done.out
    assert list(folder.rglob("report.html"))
    as_run = (folder / "study.toml").read_text()
    assert "changed by --set training.lr=0.2 --set rounds=2" in as_run
    assert read(folder / "study.toml").training.lr == 0.2
    again = polyclinic("run", "s.toml", *changes)
    assert again.code == 2
    assert "--resume continues it" in again.err
    assert "Traceback" not in again.err
    shown = polyclinic("status", str(folder))
    assert "fedavg               seed 0    tested" in shown.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "none.toml"], "there is no such study file. `polyclinic new none.toml` writes one"),
        (["status", "."], "this is not a run folder"),
        (["report", "."], "run.json"),
        (["methods", "show", "fedproxx"], 'Did you mean "fedprox"?'),
    ],
)
def test_mistakes_are_told_in_words(args: list[str], words: str, polyclinic: Command) -> None:
    done = polyclinic(*args)
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_mistyped_command_is_answered_with_a_near_one(polyclinic: Command) -> None:
    done = polyclinic("reprot")
    assert done.code != 0
    assert "report" in done.out + done.err


def test_lists_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    from polyclinic.cli import catalog

    def said(command: Any, *args: str) -> dict[str, Any]:
        command(*args, json_=True)
        return json.loads(capsys.readouterr().out)

    assert "fedavg" in {entry["name"] for entry in said(catalog.methods)["Federated optimization"]}
    assert said(catalog.show, "fedprox")["options"]["mu"]["default"] == 0.01
    assert said(catalog.transforms)["clip"]["options"]["bound"] == "required"
    assert "unet" in said(catalog.networks)


def test_a_new_study_is_not_written_over(polyclinic: Command, tmp_path: Path) -> None:
    assert polyclinic("new").code == 0
    (tmp_path / "study.toml").write_text("mine")
    assert polyclinic("new").code == 2
    assert (tmp_path / "study.toml").read_text() == "mine"
    assert polyclinic("new", "--force").code == 0
