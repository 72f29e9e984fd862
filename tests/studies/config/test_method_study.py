"""A new study with one method: published settings are valid, sources are named, and mistakes leave no file."""

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_valid_and_have_a_source(name: str) -> None:
    text = with_method(STUDY, name)
    study = parse(text)
    assert [m.called for m in study.methods] == [*(b for b in ("local", "pooled", "fedavg") if b != name), name]
    method = study.methods[-1]
    assert method.options == PUBLISHED[name].options
    assert study.training_of(method).items() >= dict(PUBLISHED[name].training).items()
    assert study.methods[0].training == {}
    assert PUBLISHED[name].source in text


def test_every_method_has_a_study() -> None:
    """Of each method a study for its kind of task; options without published values are comments."""
    for name, entry in METHODS.items():
        kind = entry.tasks[0] if entry.tasks else "classification"
        head, _, rest = STUDY.partition("[[")
        network = entry.network or ("unet" if kind == "segmentation" else "cnn")
        task = f'[task]\nkind = "{kind}"\nnetwork = "{network}"\n'
        text = with_method(f"{head}{task}[[{rest}", name)
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
