"""Where the time of a run went: phases do not overlap, and measuring them changes nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records import time_profile
from polyclinic.studies.records.time_profile import NAME, PHASES, Stopwatch
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import npz, same, study


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its only number."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_an_inner_phase_does_not_count_for_the_outer_one(clock: list[float], tmp_path: Path) -> None:
    watch = Stopwatch()
    clock[0] += 1
    with watch.phase("merging"):
        clock[0] += 2
        with watch.phase("training"):
            clock[0] += 4
        clock[0] += 8
    with pytest.raises(ValueError), watch.phase("saving"):  # noqa: PT012
        clock[0] += 16
        raise ValueError
    clock[0] += 32
    watch.sites.update({"b": 3.0, "a": 1.0})
    watch.write(tmp_path, {"method": "fedavg", "seed": 0})
    assert json.loads((tmp_path / NAME).read_text()) == {
        "method": "fedavg",
        "seed": 0,
        "phases": {"training": 4.0, "merging": 10.0, "evaluation": 0.0, "saving": 16.0, "other": 33.0},
        "sites": {"a": 1.0, "b": 3.0},
    }


def test_the_table_names_method_runs_and_the_slowest_sites() -> None:
    phases = dict.fromkeys(PHASES, 1.25) | {"training": 123.4}
    one = {"method": "fedavg", "seed": 1, "phases": phases, "sites": {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}}
    two = {**one, "method": "local", "fold": 2, "sites": {}}
    top, head, first, second = time_profile.table(
        {"seconds": 9.96, "reading": 1.0, "report": 2.0, "method_runs": [one, two]}, most=3
    )
    assert top == "10.0 s: reading 1.0, report 2.0"
    assert head.split()[:5] == list(PHASES)
    assert first.split() == ["fedavg", "(seed", "1)", "123.4", *["1.2"] * 4, "b", "3.0,", "d", "3.0,", "c", "2.0"]
    assert second.startswith("local (seed 1, fold 2)")
    assert len(time_profile.table({"seconds": 1.0, "reading": 1.0, "report": 0.0, "method_runs": []})) == 1


def small(folder: Path, engine: str) -> str:
    head = study(folder, engine).split("[[methods]]")[0].replace("rounds = 4", "rounds = 2")
    return head + '[[methods]]\nname = "local"\n\n[[methods]]\nname = "fedavg"\n'


@pytest.mark.parametrize("engine", ["in-process", "workers"])
def test_every_method_run_is_measured_and_the_results_are_the_same(engine: str, tmp_path: Path) -> None:
    """With worker processes, whole method runs are computed in processes of their own."""
    npz(tmp_path)
    text = small(tmp_path, engine)
    list(run(parse(text), text, tmp_path / "plain"))
    assert not list((tmp_path / "plain").rglob(NAME))
    list(run(parse(text), text, tmp_path / "measured", profile=True))
    assert same(tmp_path / "plain", tmp_path / "measured")
    found = time_profile.collect(tmp_path / "measured", 10.0, 1.0, 2.0)
    assert json.loads((tmp_path / "measured" / NAME).read_text()) == found
    assert [file.parent.name for file in (tmp_path / "measured").rglob(NAME)] == ["measured"]
    runs: dict[Any, Any] = {(one["method"], one["seed"]): one for one in found["method_runs"]}
    assert sorted(runs) == [(m, s) for m in ("fedavg", "local") for s in (0, 1)]
    for one in runs.values():
        assert set(one["phases"]) == set(PHASES)
        assert all(one["phases"][phase] > 0 for phase in PHASES)
        assert list(one["sites"]) == ["a", "b", "c"]
        # the sites train one after another here, within the phase of training
        assert 0 < sum(one["sites"].values()) < one["phases"]["training"] + 0.001  # of values that are rounded
