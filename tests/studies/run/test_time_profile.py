"""Where the time of a run went: phases do not overlap, and measuring them changes nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records import time_profile
from polyclinic.studies.records.time_profile import NAME, NOT_SPLIT, PARTS, PHASES, RunTimes, Stopwatch
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
        "phases": {
            "starting": 0.0,
            "training": 4.0,
            "merging": 10.0,
            "evaluation": 0.0,
            "saving": 16.0,
            "other": 33.0,
        },
        "sites": {"a": 1.0, "b": 3.0},
    }


def test_the_table_names_method_runs_and_the_slowest_sites() -> None:
    phases = dict.fromkeys(PHASES, 1.25) | {"training": 123.4}
    sites = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}
    one = {"method": "fedavg", "seed": 1, "engine": "in-process", "phases": phases, "sites": sites}
    two = {**one, "method": "local", "fold": 2, "sites": {}}
    outside = {"seconds": 9.96, "cluster": 0.0, "reading": 1.0, "baselines": 0.0, "report": 2.0, "workers": []}
    top, head, first, second = time_profile.table({**outside, "method_runs": [one, two]}, most=3)
    assert top == "10.0 s: reading 1.0, report 2.0"
    assert head.split()[:6] == list(PHASES)
    assert first.split() == [
        "fedavg",
        "(seed",
        "1)",
        "1.2",
        "123.4",
        *["1.2"] * 4,
        "b",
        "3.0,",
        "d",
        "3.0,",
        "c",
        "2.0",
    ]
    assert second.startswith("local (seed 1, fold 2)")
    assert len(time_profile.table({**outside, "method_runs": []})) == 1


def test_the_table_names_the_cluster_and_what_is_not_split() -> None:
    one = {"method": "fedavg", "seed": 1, "phases": dict.fromkeys(PHASES, 1.0), "sites": {}}
    outside = {"seconds": 9.0, "cluster": 4.0, "reading": 1.0, "baselines": 0.5, "report": 2.0, "workers": []}
    top, *_, last = time_profile.table({**outside, "method_runs": [{**one, "engine": "ray"}]})
    assert top == "9.0 s: cluster 4.0, reading 1.0, baselines 0.5, report 2.0"
    assert last == NOT_SPLIT
    workers = [{"machine": "n", "starting": s, "reading": r} for s, r in ((3.0, 0.25), (2.0, 1.0))]
    *_, last = time_profile.table({**outside, "workers": workers, "method_runs": [{**one, "engine": "in-process"}]})
    assert last == (
        "2 workers of the cluster executed whole method runs at the same time, after starting (up to 3.0 s) and "
        "reading the data (up to 1.0 s)."
    )


def damaged(profile: dict[str, Any]) -> list[str]:
    """Texts of a profile that is not one."""
    one = profile["method_runs"][0]
    missing = {**one, "phases": {k: v for k, v in one["phases"].items() if k != "saving"}}
    return [
        "",
        "[]",
        json.dumps({k: v for k, v in profile.items() if k != "cluster"}),
        json.dumps({**profile, "seconds": float("nan")}),
        json.dumps({**profile, "report": -1}),
        json.dumps({**profile, "workers": [{"machine": "n"}]}),
        json.dumps({**profile, "method_runs": [{**one, "sites": {"a": "1e999"}}]}),
        json.dumps({**profile, "method_runs": [missing]}),
    ]


def test_the_parts_of_a_run_are_joined_with_its_method_runs_and_its_report(tmp_path: Path) -> None:
    (tmp_path / "arms" / "fedavg-seed0").mkdir(parents=True)
    watch = Stopwatch()
    watch.sites["a"] = 1.0  # type: ignore[assignment]
    watch.write(tmp_path / "arms" / "fedavg-seed0", {"method": "fedavg", "seed": 0, "engine": "ray"})
    workers = [{"machine": "n", "starting": 1.0, "reading": 0.5}]
    RunTimes(False, cluster=2.0, workers=workers).write(tmp_path)
    assert not (tmp_path / PARTS).exists()
    RunTimes(True, cluster=2.0, workers=workers).write(tmp_path)
    assert time_profile.read(tmp_path) is None
    found = time_profile.collect(tmp_path, 10.0, 3.0)
    assert found["reading"] == 1.0
    assert found["cluster"] == 2.0
    found = time_profile.add_report(tmp_path, found, 4.0)
    assert found["seconds"] == 14.0
    assert found["report"] == 4.0
    assert time_profile.read(tmp_path) == found
    assert not list(tmp_path.rglob(PARTS))
    for text in damaged(found):
        (tmp_path / NAME).write_text(text)
        assert time_profile.read(tmp_path) is None, text


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
    found = time_profile.collect(tmp_path / "measured", 10.0, 1.0)
    assert json.loads((tmp_path / "measured" / NAME).read_text()) == found
    assert time_profile.read(tmp_path / "measured") == found
    assert found["cluster"] == 0.0
    assert found["workers"] == []
    assert [file.parent.name for file in (tmp_path / "measured").rglob(NAME)] == ["measured"]
    runs: dict[Any, Any] = {(one["method"], one["seed"]): one for one in found["method_runs"]}
    assert sorted(runs) == [(m, s) for m in ("fedavg", "local") for s in (0, 1)]
    for one in runs.values():
        assert set(one["phases"]) == set(PHASES)
        assert all(one["phases"][phase] > 0 for phase in PHASES if phase != "starting")
        assert one["engine"] == "in-process"
        assert list(one["sites"]) == ["a", "b", "c"]
        # the sites train one after another here, within the phase of training
        assert 0 < sum(one["sites"].values()) < one["phases"]["training"] + 0.001  # of values that are rounded
