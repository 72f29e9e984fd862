"""Unequal machines: the reference's bits, virtual time by arithmetic, failures by chance."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train, train_async
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.virtual_time import Machine, Unequal
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.fedbuff import FedBuff
from polyclinic.methods.heterogeneity.fednova import FedNova
from polyclinic.methods.heterogeneity.semi_sync import SemiSync
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.testing import check_engine, equal
from tests.conftest import little_sites

LOCAL = LocalTraining(epochs=2, batch_size=4, lr=0.05)  # 12, 17 and 22 examples: 6, 8 and 12 minibatches
SLOW = {"site-0": Machine(1.0), "site-1": Machine(0.5), "site-2": Machine(5.0)}


@pytest.mark.parametrize(
    "make", [FedAvg, lambda task, local: fedbn(task, local), lambda task, local: Scaffold(task, 3, local)]
)
@pytest.mark.parametrize("machines", [{}, SLOW])
def test_slow_machines_change_no_bit(task: Classification, make: Any, machines: Any) -> None:
    check_engine(lambda m, sites: Unequal(m, sites, machines), make(task, LOCAL), task.first(0), little_sites())


def test_time_is_bytes_and_batches(task: Classification) -> None:
    machines = {
        "site-0": Machine(1.0, up=100.0, down=200.0),
        "site-1": Machine(0.5),
        "site-2": Machine(0.25, down=50.0),
    }
    engine = Unequal(method := FedAvg(task, LOCAL), little_sites(), machines)
    step = next(train(method, engine, method.init(task.first(0)), rounds=1))
    size = step.bytes_down["site-0"]
    assert step.bytes_up["site-0"] == size > 1000
    wanted = {"site-0": 6 * 1.0 + size / 100 + size / 200, "site-1": 8 * 0.5, "site-2": 12 * 0.25 + size / 50}
    assert step.seconds == pytest.approx(wanted)
    assert engine.clock == pytest.approx(max(wanted.values()))


def test_a_deadline_loses_slow_sites_and_what_they_kept(task: Classification) -> None:
    method = fedbn(task, LOCAL)
    engine = Unequal(method, little_sites(), SLOW)  # 6, 4 and 60 s
    for step in train(method, engine, method.init(task.first(0)), rounds=3, deadline=10.0):
        assert step.lost == {"site-2": "no answer within 10 s"}
    assert engine.clock == 30.0
    assert engine.memory["site-2"] == {}
    sites = little_sites()
    del sites["site-2"]
    alone = InProcess(method, sites)
    *_, last = train(method, alone, method.init(task.first(0)), rounds=3)
    assert equal(last.state, step.state)


def test_nothing_sleeps(task: Classification) -> None:
    method = FedAvg(task, LOCAL)
    engine = Unequal(method, little_sites(), {"site-0": Machine(3600.0)})
    begun = time.perf_counter()
    list(train(method, engine, method.init(task.first(0)), rounds=2))
    assert engine.clock == 2 * 6 * 3600
    assert time.perf_counter() - begun < 60


def run(task: Any, machines: Any, rounds: Any, seed: Any = 0, state: Any = None, memory: Any = None) -> Any:
    method = fedbn(task, LocalTraining(steps=1, batch_size=4))
    engine = Unequal(method, little_sites(), machines, memory, seed=seed)
    lost = []
    state = state or method.init(task.first(0))
    for step in train(method, engine, state, rounds=rounds):
        lost.append(tuple(step.lost))
        assert set(step.lost.values()) <= {"dropped out"}
    return step.state, dict(engine.memory), lost


def test_drop_outs_are_as_often_as_said_the_same_every_time_and_on_resuming(task: Classification) -> None:
    machines = {"site-1": Machine(drop_out=0.3)}
    state, memory, lost = run(task, machines, 24)
    share = sum("site-1" in names for names in lost) / 24
    assert 0.15 < share < 0.45
    assert run(task, machines, 24)[2] == lost
    assert run(task, machines, 24, seed=1)[2] != lost
    half, kept, early = run(task, machines, 15)
    end, memory_end, late = run(task, machines, 24, state=half, memory=kept)
    assert early + late == lost
    assert equal((end, memory_end), (state, memory))


def test_fast_sites_answer_more_often_when_nobody_waits(task: Classification) -> None:
    method = FedAvg(task, LocalTraining(steps=1, batch_size=4, lr=0.05))
    machines = {"site-0": Machine(1.0), "site-1": Machine(4.0), "site-2": Machine(10.0)}
    engine = Unequal(method, little_sites(), machines)
    steps = list(train_async(method, engine, method.init(task.first(0)), updates=13))
    heard = [name for step in steps for name in step.asked]
    assert [heard.count(f"site-{i}") for i in range(3)] == [10, 2, 1]
    assert engine.clock == 10.0
    waiting = Unequal(method, little_sites(), machines)
    list(train(method, waiting, method.init(task.first(0)), rounds=13))
    assert waiting.clock == 130.0


def test_a_buffer_holds_answers_and_a_fast_site_counts_once_for_each_model(task: Classification) -> None:
    """FedBuff, Algorithm 1: Δ̄ = 1/K Σ Δ_k over K answers; counting sites gave the fast one a weight of 4.5 for K = 2."""
    sites, local = little_sites(count=2), LocalTraining(lr=0.05, batch_size=8)
    method = FedBuff(task, local, buffer=2)
    engine = Unequal(method, sites, {"site-0": Machine(1.0), "site-1": Machine(10.0)})
    start = method.init(task.first(0))
    step = next(train_async(method, engine, start, updates=1, buffer=2, discount=method.discount))
    assert step.reply.mean("update").weight == 2.0
    alone = FedAvg(task, local, uniform=True)
    deltas = [alone.site_update(alone.request(start), {}, site)[0].mean("update").value for site in sites.values()]
    mean = tree.scale(tree.add(deltas[0], deltas[1]), 0.5)
    assert tree.norm(tree.sub(tree.sub(step.state.params, start.params), mean)) < 1e-5 * tree.norm(mean)


def test_a_fast_site_answers_again_as_soon_as_there_is_a_new_model(task: Classification) -> None:
    """With room for two of three, the two fast sites fill the buffer, and the slow one comes in when it is done."""
    method = FedAvg(task, LocalTraining(steps=1, batch_size=4, lr=0.05))
    engine = Unequal(method, little_sites(), {"site-0": Machine(1.0), "site-1": Machine(2.0), "site-2": Machine(5.0)})
    steps = list(train_async(method, engine, method.init(task.first(0)), updates=4, buffer=2))
    assert [step.asked for step in steps] == [
        ["site-0", "site-1"],
        ["site-0", "site-1"],
        ["site-0", "site-2"],
        ["site-0", "site-1"],
    ]
    assert engine.clock == 6.0


def test_semi_synchronous_sites_finish_together(task: Classification) -> None:
    seconds = (("site-0", 1.0), ("site-1", 0.5), ("site-2", 5.0))
    method = SemiSync(FedNova(task, replace(LOCAL, epochs=1)), seconds)
    engine = Unequal(method, little_sites(), SLOW)
    *_, last = train(method, engine, method.init(task.first(0)), rounds=1)
    assert last.seconds == pytest.approx({"site-0": 30.0, "site-1": 30.0, "site-2": 30.0})


def test_evaluation_takes_no_time_and_never_fails(task: Classification) -> None:
    method = Evaluated(FedAvg(task, LOCAL), task)
    engine = Unequal(method, little_sites(), {name: Machine(5.0, 1.0, 1.0, 1.0) for name in little_sites()})
    scores = evaluate(method, engine, method.init(task.first(0)), engine.sites)
    assert len(scores) == 3
    assert engine.clock == 0


def test_judging_a_model_leaves_alone_whoever_is_training(task: Classification) -> None:
    method = Evaluated(FedAvg(task, LOCAL), task)
    judged, plain = Unequal(method, little_sites(), SLOW), Unequal(method, little_sites(), SLOW)
    for step in train_async(method, judged, method.init(task.first(0)), updates=9):
        assert len(evaluate(method, judged, step.state, judged.sites)) == 3
    *_, last = train_async(method, plain, method.init(task.first(0)), updates=9)
    assert equal(step.state, last.state)
    assert judged.clock == plain.clock


def test_only_those_named_are_asked_when_nobody_waits(task: Classification) -> None:
    method = FedAvg(task, LOCAL)
    engine = Unequal(method, little_sites(), SLOW)
    steps = list(train_async(method, engine, method.init(task.first(0)), updates=5, among=["site-1", "site-0"]))
    assert {name for step in steps for name in step.asked} == {"site-0", "site-1"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seconds_per_batch": -1.0}, "seconds_per_batch is -1, but must be 0 or more"),
        ({"up": 0.0, "drop_out": 2.0}, "up is 0, but must be more than 0 bytes a second; drop_out is 2"),
        ({"seconds_per_batch": float("nan")}, "seconds_per_batch is nan"),
        ({"down": float("nan")}, "down is nan"),
    ],
)
def test_impossible_machines_are_refused_with_every_reason(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Machine(**given)


def test_a_machine_without_a_site_is_refused(task: Classification) -> None:
    with pytest.raises(ValueError, match=r"machines name unknown sites \['nowhere'\]"):
        Unequal(FedAvg(task), little_sites(), {"nowhere": Machine()})


def test_data_keeps_its_other_attributes(task: Classification) -> None:
    sites = little_sites()
    sites["site-0"].data["val"].patients = torch.arange(12).tolist()
    method = Evaluated(FedAvg(task, LOCAL), task)
    said = evaluate(method, Unequal(method, sites, SLOW), method.init(task.first(0)), ["site-0"], "predict/val")
    assert said["site-0"]["patient"].tolist() == list(range(12))
