"""``polyclinic new --data`` recognizes data, says why, asks only what it cannot know, and writes a study that runs."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyclinic.cli.app import app
from polyclinic.cli.run import _asked
from polyclinic.data.quality.recognition import Question
from polyclinic.errors import ConfigError, PolyclinicError
from polyclinic.studies.config import study_config
from polyclinic.studies.config.new_study import questions_text

Run = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder and return what it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*words: str) -> str:
        app(list(words), result_action="return_value")
        return capsys.readouterr().out

    return run


SETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "uci_heart_4hospitals": ("classification", "mlp", {"label": "num", "sites": "natural"}),
    "brain_roi_tables_by_site/fcon1000_roi_23sites.csv.gz": (
        "classification",
        "mlp",
        {"patient": "sub_id", "label": "sex"},
    ),
    "brain_roi_tables_by_site/openneuro_roi_6sites.csv.gz": ("classification", "mlp", {"site": "site"}),
    "pneumoniamnist": ("classification", "cnn", {"kind": "npz", "split": "official"}),
    "busi": ("classification", "cnn", {"kind": "npz"}),
    "adrenalmnist3d": ("classification", "cnn", {"split": "official"}),
    "retina_vessels_3sites/vessels_256.npz": ("segmentation", "unet", {"sites": "natural"}),
    "msd_hippocampus/examples": ("segmentation", "unet", {"kind": "patterns", "mask": "label_{case}.nii.gz"}),
    "msd_hippocampus/msd_task04_hippocampus_260.zip": ("segmentation", "unet", {"kind": "pairs"}),
    "pyradiomics_nrrd": ("segmentation", "unet", {"images": ["{case}_image.nrrd"]}),
}


@pytest.mark.parametrize("name", SETS)
def test_real_sets_become_studies(name: str, command: Run, real_data: Path) -> None:
    task, network, options = SETS[name]
    said = command("new", "s.toml", "--data", str(real_data / name), "--yes")
    assert "wrote s.toml" in said
    study = study_config.read(Path("s.toml"))
    assert (study.task.kind, study.task.network) == (task, network)
    values = study.data.model_dump(mode="json")
    assert {key: values[key] for key in options} == options
    text = Path("s.toml").read_text()
    assert text.count("\n# - ") >= 2  # the reasons


@pytest.mark.parametrize("name", ["uci_heart_4hospitals", "busi/busi_28_breastmnist_like.npz"])
def test_a_study_of_real_data_runs(name: str, command: Run, real_data: Path) -> None:
    command("new", "s.toml", "--data", str(real_data / name), "--yes", "--rounds", "1", "--name", "mine")
    less = ("data.max_patients=24", "engine.kind=in-process")
    said = command("run", "s.toml", *(word for one in less for word in ("--set", one)), "--json")
    assert {m["method"] for m in json.loads(said)[0]["methods"]} == {"local", "pooled", "fedavg"}


def images(root: Path, pattern: str = "{site}/{label}/{i}.png") -> Path:
    for i in range(24):
        path = root / pattern.format(site=("Nord", "Sud")[i % 2], label=("a", "b")[i // 2 % 2], i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (20 + i % 3, 24)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def test_what_the_data_does_not_say_is_asked(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(images(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"take the defaults with --yes:\n  --levels: what the folders name"):
        command("new", "--data", root)
    assert not Path("study.toml").exists()
    said = command("new", "--data", root, "--levels", "site,class", "--json")
    assert json.loads(said)["assumed"] == {}
    study = study_config.read(Path("study.toml"))
    assert study.data.options["levels"] == ["site", "class"]
    assert study.data.options["steps"] == [{"step": "resize", "size": 32}] or study.data.options["steps"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("polyclinic.cli.run.console.input", lambda text: "ward,class")
    command("new", "asked.toml", "--data", root)
    assert study_config.read(Path("asked.toml")).data.options["levels"] == ["ward", "class"]
    with pytest.raises(ConfigError, match="exists already"):
        command("new", "--data", root, "--yes")
    with pytest.raises(ConfigError, match="--label needs --data"):
        command("new", "x.toml", "--label", "y")


@pytest.mark.parametrize(
    ("default", "typed", "answer"),
    [
        ({"size": 256}, "", {"size": 256}),
        ({"size": 256}, "{size = 64, level = 0}", {"size": 64, "level": 0}),
        (True, "", True),
        (True, "no", "no"),
        (["a"], "b,c", ["b", "c"]),
        (0, "1", 1.0),
    ],
)
def test_answers_have_the_type_of_the_default(
    monkeypatch: pytest.MonkeyPatch, default: object, typed: str, answer: object
) -> None:
    monkeypatch.setattr("polyclinic.cli.run.console.input", lambda text: typed)
    assert _asked([Question("tiles", "what", default)]) == {"tiles": answer}


def test_questions_name_the_option_that_answers_them() -> None:
    first, second = questions_text([Question("tiles", "what", {"size": 256}), Question("ordered", "what", True)])
    assert first == "--set data.tiles=...: what; default [{ size = 256 }]"
    assert second.startswith("--ordered: ")


def test_what_cannot_be_a_study_is_refused_with_the_remedy(command: Run, tmp_path: Path) -> None:
    with pytest.raises(PolyclinicError, match="sort them into folders named by class"):
        command("new", "--data", str(images(tmp_path / "loose", "{i}.png")), "--yes")
    with pytest.raises(PolyclinicError, match="there is no such folder or file"):
        command("new", "--data", str(tmp_path / "nothing"), "--yes")
    (tmp_path / "t.csv").write_text("hospital,id,age,group\n" + "".join(f"h{i % 2},{i},{i},g\n" for i in range(12)))
    with pytest.raises(PolyclinicError, match="Did you mean 'group'"):
        command("new", "--data", str(tmp_path / "t.csv"), "--label", "groups")
    command("new", "--data", str(tmp_path / "t.csv"), "--label", "age")
    options = study_config.read(Path("study.toml")).data.options
    assert (options["site"], options["patient"], options["regression"]) == ("hospital", "id", True)


def test_keys_of_data_can_be_set(command: Run, tmp_path: Path) -> None:
    root = str(images(tmp_path / "data"))
    command("new", "--data", root, "--yes", "--set", "data.fill=0", "--set", 'data.classes=["b", "a"]')
    options = study_config.read(Path("study.toml")).data.options
    assert (options["fill"], options["classes"]) == (0, ["b", "a"])
    said = command("data", "check", root, "--set", "data.fill=0", "--json")
    assert json.loads(said)["data"]["fill"] == 0
    with pytest.raises(ConfigError, match=r"give a key of \[data\], such as data.fill=0"):
        command("data", "check", root, "--set", "fill=0")
    with pytest.raises(ConfigError, match=r"--set task\.fill: give a key of"):
        command("data", "check", root, "--set", "task.fill=0")
    with pytest.raises(ConfigError, match="--set needs --data"):
        command("new", "x.toml", "--set", "data.fill=0")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_study_file_of_windows_is_read(encoding: str, command: Run) -> None:
    command("new", "plain.toml")
    text = Path("plain.toml").read_text(encoding="utf-8").replace('"my-study"', '"my-study"  # für alle')
    Path("s.toml").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert study_config.read(Path("s.toml")) == study_config.read(Path("plain.toml"))
