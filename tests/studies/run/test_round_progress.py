"""Progress within a round: who was asked and has answered; nothing of it changes what a run computes."""

import json
from pathlib import Path

import pytest
import torch

from polyclinic.core import atomic
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.studies.records.time_profile import Stopwatch
from polyclinic.studies.run import round_progress
from polyclinic.studies.run.round_progress import WatchedFederation
from tests.conftest import little_sites
from tests.support.local_deployment import order


def final(watched: Path | None) -> dict[str, torch.Tensor]:
    method = order(rounds=3).build_plan().build_method()
    engine = InProcess(method, little_sites(count=3))
    federation = engine if watched is None else WatchedFederation(engine, watched, Stopwatch())
    state = method.init(method.task.first(0))
    for step in train(method, federation, state, rounds=3):
        state = step.state
    request = method.request(state)
    return dict(request.trees["params"]) if request else dict(state.params)


def test_a_watched_run_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_progress, "INTERVAL", 0.0)
    plain, watched = final(None), final(tmp_path / "now.json")
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    now = json.loads((tmp_path / "now.json").read_text())
    assert now["round"] == 3
    assert now["asked"] == ["site-0", "site-1", "site-2"]
    assert set(now["arrived"]) == {"site-0", "site-1", "site-2"}


def test_the_file_is_written_at_most_twice_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(atomic, "write", lambda path, *_, **__: written.append(path))
    federation = WatchedFederation(
        InProcess(order().build_plan().build_method(), little_sites()), tmp_path / "x", Stopwatch()
    )
    for _ in range(50):
        federation._write()
    assert len(written) == 1


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_progress, "INTERVAL", 0.0)
    assert final(tmp_path / "no" / "such" / "folder")
