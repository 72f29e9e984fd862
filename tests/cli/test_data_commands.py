"""A data steward's commands: a plan is written, edited, used, and compared with later data."""

import json
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli.data import app
from polyclinic.data.examples import DataError
from polyclinic.errors import ConfigError
from tests.studies.run.test_planning import registry

STUDY = """
name = "registry"
rounds = 1
seeds = [0, 1]

[data]
kind = "table"
path = "t.csv"
label = "y"
categories = ["kind"]
{more}
[task]
network = "mlp"

[[methods]]
name = "fedavg"
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``polyclinic data ...`` in ``tmp_path``: its exit code and its output."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            app(list(words), result_action="return_value")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    return call


def test_from_a_study_to_its_plan_and_to_an_alarm(tmp_path: Path, command: Any) -> None:
    registry(tmp_path, 240)
    (tmp_path / "s.toml").write_text(STUDY.format(more=""))
    code, told = command("plan", "s.toml", "--by-site")
    assert code == 0
    assert "✓ s.plan.toml" in told
    assert "training rows of seed 0" in told
    with pytest.raises(ConfigError, match="--force replaces it"):
        command("plan", "s.toml")
    (tmp_path / "planned.toml").write_text(STUDY.format(more='plan = "s.plan.toml"'))
    code, told = command("drift", "s.plan.toml", "planned.toml")
    assert code == 0, told
    assert told.count("as before") >= 3
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()]
    new = [rows[0], *([site, str(float(age) + 15), *rest] for site, age, *rest in rows[1:])]
    (tmp_path / "new.csv").write_text("\n".join(",".join(row) for row in new))
    code, told = command("drift", "s.plan.toml", "s.toml", "--set", "data.path=new.csv", "--json")
    assert code == 1
    for site in json.loads(told):
        assert site["alarm"]
        assert [one["name"] for one in site["found"] if one["level"] == "moved"] == ["age"]


def test_mistakes_are_told_in_words(tmp_path: Path, command: Any) -> None:
    (tmp_path / "s.toml").write_text(STUDY.format(more=""))
    with pytest.raises(ConfigError, match="nowhere"):  # which the program tells without a traceback
        command("plan", "nowhere.toml")
    with pytest.raises(DataError, match="there is nothing at"):
        command("plan", "s.toml")
    with pytest.raises(DataError, match="is not a plan of this version"):
        command("drift", "s.toml", "s.toml")
