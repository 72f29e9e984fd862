"""The command line: quick start, clear messages, and no traceback for a user's mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli import app
from polyclinic.studies.config.study_config import read
from tests.studies.run.test_scheduler import npz, study

ROOT = Path(__file__).parents[2]


def polyclinic(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polyclinic", *args], capture_output=True, text=True, cwd=cwd or ROOT, timeout=120
    )


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


def test_a_study_from_the_first_line_to_the_report(tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path).split("[[methods]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    (tmp_path / "s.toml").write_text(text + '[[methods]]\nname = "local"\n\n[[methods]]\nname = "fedavg"\n')
    changes = ("--set", "training.lr=0.2", "--set", "rounds=2")
    done = polyclinic("run", "s.toml", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "✓ fedavg" in done.stdout
    (folder,) = (tmp_path / "runs").glob("small-*")
    assert list(folder.rglob("report.html"))
    as_run = (folder / "study.toml").read_text()
    assert "changed by --set training.lr=0.2 --set rounds=2" in as_run
    assert read(folder / "study.toml").training.lr == 0.2
    again = polyclinic("run", "s.toml", *changes, cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume continues it" in again.stderr
    assert "Traceback" not in again.stderr
    shown = polyclinic("status", str(folder))
    assert "fedavg               seed 0    tested" in shown.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "none.toml"], "there is no such study file. `polyclinic new none.toml` writes one"),
        (["status", "."], "this is not a run folder"),
        (["report", "."], "run.json"),
        (["methods", "show", "fedproxx"], 'Did you mean "fedprox"?'),
    ],
)
def test_mistakes_are_told_in_words(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["polyclinic", *args])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "Traceback" not in said


def test_a_mistyped_command_is_answered_with_a_near_one() -> None:
    done = polyclinic("reprot")
    assert done.returncode != 0
    assert "report" in done.stdout + done.stderr


def test_lists_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    from polyclinic.cli import catalog

    def said(command: Any, *args: str) -> dict[str, Any]:
        command(*args, json_=True)
        return json.loads(capsys.readouterr().out)

    assert "fedavg" in {entry["name"] for entry in said(catalog.methods)["Federated optimization"]}
    assert said(catalog.show, "fedprox")["options"]["mu"]["default"] == 0.01
    assert said(catalog.transforms)["clip"]["options"]["bound"] == "required"
    assert "unet" in said(catalog.networks)


def test_a_new_study_is_not_written_over(tmp_path: Path) -> None:
    assert polyclinic("new", cwd=tmp_path).returncode == 0
    (tmp_path / "study.toml").write_text("mine")
    assert polyclinic("new", cwd=tmp_path).returncode == 2
    assert (tmp_path / "study.toml").read_text() == "mine"
    assert polyclinic("new", "--force", cwd=tmp_path).returncode == 0
