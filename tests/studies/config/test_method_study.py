"""A new study with one method: published settings are valid, sources are named, and mistakes leave no file."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from polyclinic.cli.app import app
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.published_settings import PUBLISHED
from polyclinic.methods.registry import UnknownMethod
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.method_study import with_method
from polyclinic.studies.config.study_config import parse, read

STUDY = """name = "s"
rounds = 2
[data]
path = "x.npz"
kind = "npz"
[[methods]]
name = "krum"
"""


def for_method(name: str) -> str:
    """The study for the kind of task of the method called ``name``."""
    entry = METHODS[name]
    kind = entry.tasks[0] if entry.tasks else "classification"
    network = entry.network or ("unet" if kind == "segmentation" else "cnn")
    head, _, rest = STUDY.partition("[[")
    return f'{head}[task]\nkind = "{kind}"\nnetwork = "{network}"\n[[{rest}'


READ: Mapping[str, tuple[int, dict[str, float], float, int]] = {
    "lc-fed": (300, {"head_steps": 10}, 0.001, 6),
    "fediic": (200, {"within_weight": 2, "across_weight": 2, "difficulty": 0.25}, 0.0003, 2),
    "fedcorr": (405, {"beta": 5, "ratio": 0.5, "confidence": 0.5, "clean": 0.1}, 0.03, 10),
    "feda3i": (100, {"warmup": 0.1, "enlarging": 0.5}, 0.005, 8),
    "fedmlp": (500, {"warmup": 0.1, "without": 0.005, "having": 0.01}, 0.00003, 32),
    "harmofl": (100, {"alpha": 0.05}, 0.001, 128),
    "feddg": (100, {"step": 0.001, "boundary": 0.1}, 0.001, 5),
    "iop-fl": (500, {"alpha": 0.1}, 0.001, 5),
    "fedirm": (200, {"consistency": 15, "growth": 0.15, "confidence": 0.3}, 0.0002, 48),
    "fednoro": (100, {"warmup": 0.1, "growth": 0.4, "most": 0.8}, 0.0003, 16),
    "scaffold": (9, {"lr": 1}, 0.01, 64),
    "fedprox": (9, {"mu": 0.001}, 0.01, 64),
    "fedbn": (100, {}, 0.01, 32),
}
"""Rounds, options, learning rate and minibatch size as the authors' code or the benchmark's configuration has them."""


@pytest.mark.parametrize("name", READ)
def test_a_new_study_has_the_settings_of_the_published_code(name: str) -> None:
    study = parse(with_method(for_method(name), name))
    rounds, options, rate, size = READ[name]
    method = study.methods[-1]
    training = study.training_of(method)
    assert f"{rounds} rounds there" in with_method(for_method(name), name)
    assert {key: method.options[key] for key in options} == options
    assert (training["lr"], training["batch_size"]) == (rate, size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_valid_and_have_a_source(name: str) -> None:
    text = with_method(for_method(name), name)
    study = parse(text)
    assert [m.called for m in study.methods] == [*(b for b in ("local", "pooled", "fedavg") if b != name), name]
    method = study.methods[-1]
    assert method.options == PUBLISHED[name].options
    assert study.training_of(method).items() >= dict(PUBLISHED[name].training).items()
    assert study.methods[0].training == {}
    assert PUBLISHED[name].source in text


def test_every_method_has_a_study() -> None:
    """Of each method a study for its kind of task; options without published values are comments."""
    for name in METHODS:
        text = with_method(for_method(name), name)
        assert ("Published settings are not recorded" in text) == (name not in PUBLISHED)


def test_the_command_writes_it_and_a_mistake_leaves_the_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app(["new", "s.toml", "--method", "moon"], result_action="return_value")
    assert [m.called for m in read(Path("s.toml")).methods] == ["local", "pooled", "fedavg", "moon"]
    with pytest.raises(UnknownMethod, match='no method is called "mon"'):
        app(["new", "t.toml", "--method", "mon"], result_action="return_value")
    with pytest.raises(BadStudy, match="lc-fed is for segmentation"):
        app(["new", "t.toml", "--method", "lc-fed"], result_action="return_value")
    with pytest.raises(BadStudy, match='histofl is for network = "attention-mil"'):
        app(["new", "t.toml", "--method", "histofl"], result_action="return_value")
    assert not Path("t.toml").exists()
