"""Workers: the same bits whatever happens to them, every site served, nothing left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.execution import Refused
from polyclinic.core.method import Request
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import DEATHS, Workers
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.testing import equal
from tests.conftest import little_sites


def run(method: Any, engine: Any, params: Any, rounds: int = 4, **how: Any) -> Any:
    state = method.init(params)
    steps = []
    for step in train(method, engine, state, rounds=rounds, **how):
        state = step.state
        steps.append(step)
    return state, steps


@dataclass(frozen=True)
class Slow(FedAvg):
    """FedAvg, but one site sleeps."""

    site: str = "site-1"
    sleeps: float = 30.0

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if site.name == self.site:
            time.sleep(self.sleeps)
        return super().site_update(request, memory, site)


@dataclass(frozen=True)
class Deadly(FedAvg):
    """FedAvg, but one site kills its process: always, or only the first time."""

    folder: str = ""
    always: bool = False

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        mark = Path(self.folder) / f"died-{request.round}"
        if site.name == "site-1" and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().site_update(request, memory, site)


@pytest.mark.parametrize("workers", [2, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 5))])
def test_more_sites_than_workers_wait_their_turn(workers: int, task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=5)
    expected = run(Scaffold(task, 5, local), InProcess(Scaffold(task, 5, local), sites), task.first(0))[0]
    with Workers(Scaffold(task, 5, local), sites, workers=workers) as engine:
        assert len(engine.pids) == workers
        assert equal(run(Scaffold(task, 5, local), engine, task.first(0))[0], expected)


def test_a_killed_worker_is_replaced_and_its_site_asked_again(
    task: Classification, local: LocalTraining, tmp_path: Path
) -> None:
    sites = little_sites()
    expected = run(FedAvg(task, local), InProcess(FedAvg(task, local), sites), task.first(0))[0]
    method = Deadly(task, local, folder=str(tmp_path))
    with Workers(method, sites) as engine:
        state, steps = run(method, engine, task.first(0))
    assert len(list(tmp_path.glob("died-*"))) == 4
    assert equal(state, expected)
    assert not any(step.lost for step in steps)


def test_workers_killed_from_outside_change_nothing(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), fedbn(task, local)
    reference = InProcess(method, sites)
    expected = run(method, reference, task.first(0), rounds=12)[0]
    with Workers(method, sites) as engine:
        stop, steps = threading.Event(), list[Any]()
        killed: Counter[int] = Counter()

        def assassin() -> None:
            while sum(killed.values()) < 6 and not stop.wait(0.02):
                pids = engine.pids  # one less while a worker is replaced
                if pids and killed[len(steps)] < DEATHS - 1:  # so often a site may lose its worker in one round
                    killed[len(steps)] += 1
                    with suppress(ProcessLookupError):
                        os.kill(pids[sum(killed.values()) % len(pids)], signal.SIGKILL)

        thread = threading.Thread(target=assassin)
        thread.start()
        state = method.init(task.first(0))
        for step in train(method, engine, state, rounds=12):
            state = step.state
            steps.append(step)
        stop.set()
        thread.join()
        assert killed
        assert [step.lost for step in steps] == [{}] * 12
        assert equal(state, expected)
        assert equal(engine.memory, reference.memory)


def test_a_site_that_always_kills_its_worker_is_lost_and_named(
    task: Classification, local: LocalTraining, tmp_path: Path
) -> None:
    method = Deadly(task, local, folder=str(tmp_path), always=True)
    with Workers(method, little_sites()) as engine:
        _, steps = run(method, engine, task.first(0), rounds=1)
    assert "the available memory" in steps[0].lost["site-1"]


def test_a_late_site_is_stopped_and_the_round_goes_on(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), Slow(task, local)
    without = {name: site for name, site in sites.items() if name != "site-1"}
    expected = run(FedAvg(task, local), InProcess(FedAvg(task, local), without), task.first(0), rounds=2)[0]
    with Workers(method, sites) as engine:
        begun = time.monotonic()
        state, steps = run(method, engine, task.first(0), rounds=2, deadline=1.0)
        assert time.monotonic() - begun < 20
    assert [list(step.lost) for step in steps] == [["site-1"], ["site-1"]]
    assert "no answer within 1 s" in steps[0].lost["site-1"]
    assert equal(state, expected)


def test_a_late_site_in_process_is_lost_too(task: Classification, local: LocalTraining) -> None:
    method = Slow(task, local, sleeps=0.3)
    _, steps = run(method, InProcess(method, little_sites()), task.first(0), rounds=1, deadline=0.25)
    assert list(steps[0].lost) == ["site-1"]


class NoSecondRound:
    """A policy that has had enough after one round."""

    def admit(self, method: Any, request: Any, site: Any) -> None:
        if request.round:
            raise Refused("one round was agreed; ask the hospital for more")

    def release(self, method: Any, request: Any, reply: Any, site: Any) -> None:
        if reply.nbytes > 10**6:
            raise Refused("too much")


@pytest.mark.parametrize("engine", [InProcess, Workers])
def test_a_policy_refuses_in_words_and_loses_only_its_own_site(
    engine: Any, task: Classification, local: LocalTraining
) -> None:
    method = FedAvg(task, local)
    here = engine(method, little_sites(), policies={"site-2": NoSecondRound()})
    _, steps = run(method, here, task.first(0), rounds=2)
    here.close()
    assert [dict(step.lost) for step in steps] == [
        {},
        {"site-2": "refused: one round was agreed; ask the hospital for more"},
    ]


@pytest.mark.parametrize("engine", [InProcess, Workers])
def test_a_failing_site_is_lost_with_its_reason_and_keeps_its_memory(
    engine: Any, task: Classification, local: LocalTraining
) -> None:
    sites = little_sites()
    sites["site-0"] = Site("site-0", {"train": sites["site-0"].data["train"]}, device="abacus")
    method = fedbn(task, local)
    here = engine(method, sites)
    _, steps = run(method, here, task.first(0), rounds=1)
    assert steps[0].lost["site-0"].startswith("failed: RuntimeError")
    assert here.memory["site-0"] == {}
    with pytest.raises(TooFewReplies):
        run(method, here, task.first(0), rounds=1, min_replies=3)
    here.close()


_models = list[tuple[Tree, Tree]]()


@dataclass(frozen=True)
class Remembering(FedAvg):
    """FedAvg, but a process keeps the models that it receives, and fails if one of them changes."""

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        params = request.trees["params"]
        _models.append((params, tree.copy(params)))
        if not all(equal(kept, copy) for kept, copy in _models):
            raise ValueError("a model that was kept has changed")
        return super().site_update(request, memory, site)


def test_what_is_kept_of_earlier_rounds_does_not_change(task: Classification, local: LocalTraining) -> None:
    """Files are written again only if nothing refers to their content, at the server and in the workers."""
    sites = dict(list(little_sites().items())[:1])  # a sum of one reply is the reply, as it was received
    expected = run(FedAvg(task, local), InProcess(FedAvg(task, local), sites), task.first(0), rounds=5)[1]
    with Workers(Remembering(task, local), sites) as engine:
        steps = run(Remembering(task, local), engine, task.first(0), rounds=5)[1]
    assert not any(step.lost for step in steps)
    assert all(equal(step.reply, other.reply) for step, other in zip(steps, expected, strict=True))


def test_nothing_is_left_behind(task: Classification, local: LocalTraining) -> None:
    method = FedAvg(task, local)
    with Workers(method, little_sites()) as engine:
        folder, pids = engine._folder, engine.pids
        run(method, engine, task.first(0), rounds=2)
        files = list(folder.iterdir())
        assert files
        run(method, engine, task.first(0), rounds=5)
        assert sorted(folder.iterdir()) == sorted(files)  # they are written again
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


OPEN = """
import os, torch
torch.set_num_threads(1)
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.networks.network_catalog import Network
from tests.conftest import little_sites
task = Classification(Network("cnn", (1, 8, 8), 2))
engine = Workers(FedAvg(task), little_sites())
print(engine._folder, *engine.pids, flush=True)
"""


def run_script(script: str) -> tuple[Path, list[int]]:
    """Run a script that prints a folder and process IDs, and return them."""
    root = Path(__file__).parents[3]
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60).stdout
    folder, *pids = said.split()
    return Path(folder), [int(pid) for pid in pids]


def test_workers_end_with_their_parent() -> None:
    _, pids = run_script(OPEN + "os.kill(os.getpid(), 9)")
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_an_engine_that_is_not_closed_ends_with_the_script(end: str) -> None:
    folder, pids = run_script(OPEN + end)  # waited for ever before: the workers ignore SIGTERM
    assert len(pids) == 2
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_engine_that_is_no_longer_used_is_closed(task: Classification) -> None:
    engine = Workers(FedAvg(task), little_sites())
    folder, pids = engine._folder, engine.pids
    del engine
    gc.collect()
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_memory_can_be_handed_to_a_new_engine(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), Scaffold(task, 3, local)
    expected = run(method, InProcess(method, sites), task.first(0), rounds=4)[0]
    first = InProcess(method, sites)
    half, _ = run(method, first, task.first(0), rounds=2)
    with Workers(method, sites, memory=first.memory) as second:
        state = half
        for step in train(method, second, state, rounds=4):
            state = step.state
    assert equal(state, expected)
