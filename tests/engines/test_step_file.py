"""Progress within local training: counted while somebody watches, written seldom, and without effect on a result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.engines import step_file
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.engines.site_runtime import work
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.step_progress import counted, watched
from tests.conftest import little_sites
from tests.support.local_deployment import order


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_file, "INTERVAL", -1.0)


def method() -> Any:
    plan = {
        "training": {"epochs": 2, "batch_size": 4, "lr": 0.05},
        "network_options": {"width": 4, "depth": 2, "norm": "group"},
    }
    return order(plan=plan).build_plan().build_method()


def test_nothing_is_counted_while_nobody_watches() -> None:
    seen: list[tuple[int, int]] = []
    assert list(counted("abc", 3)) == ["a", "b", "c"]
    with watched(lambda done, total: seen.append((done, total))):
        assert list(counted("abc", 3)) == ["a", "b", "c"]
    assert list(counted("abc", 3)) == ["a", "b", "c"]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_watched_training_has_the_same_bits_and_counts_every_minibatch(tmp_path: Path, always: None) -> None:
    fedavg, site = method(), little_sites(count=1)["site-0"]
    request = fedavg.request(fedavg.init(fedavg.task.first(0)))
    plain = work(fedavg, request, {}, site)
    seen = work(fedavg, request, {}, site, None, tmp_path, 3)
    assert plain.reply is not None
    assert seen.reply is not None
    ours, theirs = seen.reply.parts["update"].trees[0], plain.reply.parts["update"].trees[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    total = LocalTraining(epochs=2, batch_size=4).count(site.data["train"])
    facts = {"site": "site-0", "round": 1, "job": "train", "done": total, "total": total}
    assert step_file.read(tmp_path) == [facts]
    assert (tmp_path / "steps-3.json").is_file()


@pytest.mark.slow
def test_private_training_is_counted_too() -> None:
    seen, site = list[tuple[int, int]](), little_sites(count=1)["site-0"]
    task, private = method().task, DPSGD(batch_size=4, unit="record")
    with watched(lambda done, total: seen.append((done, total))):
        private.fit(task, task.first(0), site, 0)
    assert seen[-1] == (private.count(site.data["train"]),) * 2


@pytest.mark.parametrize("engine", [InProcess, Workers])
def test_engines_record_the_progress_of_their_sites(engine: Any, tmp_path: Path, always: None) -> None:
    fedavg, sites = method(), little_sites(count=2)
    used = engine(fedavg, sites, progress=tmp_path)
    try:
        used.send(fedavg.request(fedavg.init(fedavg.task.first(0))), list(sites))
        assert all(arrival.reply is not None for arrival in used.replies())
    finally:
        used.close()
    found = step_file.read(tmp_path)
    assert {one["site"] for one in found} <= {"site-0", "site-1"}
    assert found
    step_file.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    steps = step_file.StepFile(tmp_path, 0, "oslo", 0, "train")
    for done in range(1000):
        steps(done, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_no_training(tmp_path: Path, always: None) -> None:
    step_file.StepFile(tmp_path / "missing", 0, "oslo", 0, "train")(1, 2)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"site":"a"}', json.dumps({"site": "a", "job": "b", "round": "x"})])
def test_strange_files_are_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "steps-0.json").write_text(text)
    (tmp_path / "steps-1.json").mkdir()
    (tmp_path / "steps-2.json").symlink_to("/dev/zero")
    assert step_file.read(tmp_path) == []
