"""The drivers: one bad site never poisons or stops a round, and the journal cannot be rewritten unseen."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias
from weakref import ref

import pytest
import torch

from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.audit_log import Broken, Journal, verify
from polyclinic.core.execution import sample_sites
from polyclinic.core.method import Method, Request
from polyclinic.core.reply_validation import ReplyValidator
from polyclinic.core.rounds import Arrival, TooFewReplies, _buffered, train, train_async
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal
from tests.conftest import little_sites

Change: TypeAlias = Callable[[Arrival], Sequence[Arrival]]
"""What becomes of an arrival."""


class Tampered(InProcess):
    """An engine in which what one site sends is replaced on its way."""

    def __init__(self, method: Method[Any], sites: Mapping[str, Site], victim: str, change: Change) -> None:
        super().__init__(method, sites)
        self.victim, self.change = victim, change

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        for arrival in super().replies(deadline):
            if arrival.site == self.victim:
                yield from self.change(arrival)
            else:
                yield arrival


def received(arrival: Arrival) -> Reply:
    assert arrival.reply is not None
    return arrival.reply


def poison(value: float) -> Change:
    def change(arrival: Arrival) -> Sequence[Arrival]:
        mean = received(arrival).mean("update")
        total = {**mean.total, "head.bias": torch.full_like(mean.total["head.bias"], value)}
        return [arrival._replace(reply=Reply({"update": WeightedMean(total, mean.weight)}))]

    return change


def reweighted(weight: float) -> Change:
    return lambda a: [a._replace(reply=Reply({"update": WeightedMean(received(a).mean("update").total, weight)}))]


def edited(edit: Callable[[dict[str, torch.Tensor]], Tree]) -> Change:
    return lambda a: [
        a._replace(reply=Reply({"update": WeightedMean(edit(dict(received(a).mean("update").total)), 10.0)}))
    ]


BAD = {
    "nan": (poison(float("nan")), "NaN"),
    "infinity": (poison(float("inf")), "NaN or infinity"),
    "shape": (edited(lambda t: {**t, "head.bias": torch.zeros(7)}), r"head.bias is \(\(7,\)"),
    "dtype": (edited(lambda t: {**t, "head.bias": t["head.bias"].double()}), "float64"),
    "missing": (edited(lambda t: {k: v for k, v in t.items() if k != "head.bias"}), "missing"),
    "extra": (edited(lambda t: {**t, "more": torch.zeros(1)}), "not in the replies of the other sites"),
    "renamed": (edited(lambda t: {k.replace("head", "tail"): v for k, v in t.items()}), "missing"),
    "no reply": (lambda a: [], "no answer"),
    "empty reply": (lambda a: [a._replace(reply=Reply())], "missing"),
    "negative weight": (reweighted(-3.0), "weight -3"),
    "nan weight": (reweighted(math.nan), "weight nan"),
    "another round": (lambda a: [a._replace(round=a.round + 1)], "no answer"),
    "a gather": (
        lambda a: [a._replace(reply=Reply({"update": PerSite({a.site: received(a).mean("update").total})}))],
        "update",
    ),
    "speaking for another": (
        lambda a: [a._replace(reply=Reply({"update": PerSite({"site-2": received(a).mean("update").total})}))],
        "contains values of",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_changes_no_bit_of_the_others(name: str, task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    change, reason = BAD[name]
    start = method.init(task.first(0))
    (step,) = train(method, Tampered(method, sites, "site-1", change), start, rounds=1)
    without = {k: v for k, v in sites.items() if k != "site-1"}
    (expected,) = train(method, InProcess(method, without), start, rounds=1)
    assert equal(step.state, expected.state)
    assert list(step.lost) == ["site-1"]
    import re

    assert re.search(reason, step.lost["site-1"])


def test_an_answer_counts_once(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    start = method.init(task.first(0))
    (step,) = train(method, Tampered(method, sites, "site-1", lambda a: [a, a]), start, rounds=1)
    (expected,) = train(method, InProcess(method, sites), start, rounds=1)
    assert equal(step.state, expected.state)


class Disordered(InProcess):
    """An engine whose answers arrive in another order, of which it counts those that are in memory.

    Attributes:
        most: The largest number of replies that were in memory when the next site began to train.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    most = 0

    def send(self, request: Request, to: Sequence[str]) -> None:
        super().send(request, [to[i] for i in self.order])

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        alive: list[ref[Any]] = []
        for arrival in super().replies(deadline):
            alive.append(ref(received(arrival)))
            yield arrival
            del arrival
            self.most = max(self.most, sum(one() is not None for one in alive))


@pytest.mark.parametrize(("order", "most"), [((0, 1, 2, 3), 0), ((3, 1, 0, 2), 2), ((3, 2, 1, 0), 3)])
def test_replies_are_summed_in_the_order_of_sites_and_released(
    order: tuple[int, ...], most: int, task: Classification, local: LocalTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that came before that of an earlier site waits for it; all others are released at once."""
    sites, method = little_sites(count=4), FedAvg(task, local)
    start = method.init(task.first(0))
    engine = Disordered(method, sites)
    engine.order = order
    (expected,) = train(method, InProcess(method, sites), start, rounds=1)
    monkeypatch.setattr("polyclinic.core.reply_validation.HELD", 0)
    (step,) = train(method, engine, start, rounds=1)
    assert equal(step.state, expected.state)
    assert equal(step.reply, expected.reply)
    assert (step.bytes_up, list(step.seconds)) == (expected.bytes_up, [f"site-{i}" for i in order])
    assert engine.most == most


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_answer_of_a_site_counts(first: int, task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    start = method.init(task.first(0))

    def twice(arrival: Arrival) -> Sequence[Arrival]:
        both = [arrival, arrival._replace(reply=None, lost="lost")]
        return both if first == 0 else both[::-1]

    (step,) = train(method, Tampered(method, sites, "site-1", twice), start, rounds=1)
    left = sites if first == 0 else {k: v for k, v in sites.items() if k != "site-1"}
    (expected,) = train(method, InProcess(method, left), start, rounds=1)
    assert equal(step.state, expected.state)
    assert step.lost == ({} if first == 0 else {"site-1": "lost"})


def test_a_stranger_counts_nothing(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    start = method.init(task.first(0))
    forged = Tampered(method, sites, "site-1", lambda a: [a, a._replace(site="stranger")])
    (step,) = train(method, forged, start, rounds=1)
    (expected,) = train(method, InProcess(method, sites), start, rounds=1)
    assert equal(step.state, expected.state)


def test_limits_on_norm_and_weight(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    start = method.init(task.first(0))
    huge = Tampered(method, sites, "site-0", poison(1e6))
    (step,) = train(method, huge, start, rounds=1, gate=ReplyValidator(max_norm=100))
    assert "norm" in step.lost["site-0"]
    heavy = Tampered(method, sites, "site-0", reweighted(1e12))
    (step,) = train(method, heavy, start, rounds=1, gate=ReplyValidator(max_weight=1000))
    assert "weight" in step.lost["site-0"]


def updates(**sites: tuple[float, float]) -> dict[str, Reply]:
    """Replies by site: each with its weight, and the length of its mean."""
    return {
        name: Reply({"update": WeightedMean.of({"w": torch.tensor([size, 0.0])}, weight)})
        for name, (weight, size) in sites.items()
    }


ASK = Request(0, {"params": {"w": torch.zeros(2)}})


def test_a_weight_out_of_proportion_is_refused() -> None:
    """One site that claims 1e12 examples would replace the model in one round."""
    honest = {"a": (12.0, 1.0), "b": (20.0, 1.0), "c": (31.0, 1.0)}
    gate = ReplyValidator(weight_ratio=10)
    assert list(gate.refuse(ASK, updates(**honest, m=(1e12, 1.0)))) == ["m"]
    assert (
        ReplyValidator().refuse(ASK, updates(**honest, m=(1e12, 1.0))) == {}
    )  # in one process nothing is bounded by default
    # No examples were counted: ten times as much as of a site with a count, and two others must be there.
    assert gate.refuse(ASK, updates(**honest, m=(20.0 * 100, 1.0))) == {}
    assert list(gate.refuse(ASK, updates(**honest, m=(20.0 * 101, 1.0)))) == ["m"]
    assert list(gate.refuse(ASK, updates(a=(12.0, 1.0), b=(20.0, 1.0), m=(1e12, 1.0)))) == ["m"]
    assert gate.refuse(ASK, updates(a=(12.0, 1.0), m=(1e12, 1.0))) == {}
    counted = ReplyValidator(weight_ratio=10, counts={"a": 12, "b": 20, "c": 31, "m": 300})
    assert list(counted.refuse(ASK, updates(**honest, m=(301.0, 1.0)))) == ["m"]
    assert counted.refuse(ASK, updates(**honest, m=(300.0, 1.0))) == {}
    assert counted.refuse(ASK, updates(**honest, m=(200.0, 1.0))) == {}  # steps or voxels, within proportion


def test_a_tiny_weight_makes_nobody_else_look_heavy() -> None:
    gate = ReplyValidator(weight_ratio=10, counts={"a": 12, "m": 12})
    assert gate.refuse(ASK, updates(a=(12.0, 1.0), m=(1e-9, 1.0))) == {}


def test_an_update_out_of_proportion_is_refused() -> None:
    honest = {"a": (12.0, 1.0), "b": (20.0, 2.0), "c": (31.0, 3.0)}
    gate = ReplyValidator(norm_ratio=100)
    found = gate.refuse(ASK, updates(**honest, m=(1.0, 201.0)))
    assert list(found) == ["m"]
    assert "exceeds 100 times the median of the other sites, 2" in found["m"]
    assert gate.refuse(ASK, updates(**honest, m=(1.0, 200.0))) == {}
    assert list(gate.refuse(ASK, updates(a=(1.0, 1.0), b=(1.0, 1.0), m=(1.0, 1e6)))) == ["m"]
    assert (
        gate.refuse(ASK, updates(a=(1.0, 1.0), b=(1.0, 1.0), m=(1.0, 0.0))) == {}
    )  # half of an honest median, at worst
    assert gate.refuse(ASK, updates(a=(1.0, 1.0), m=(1.0, 1e6))) == {}  # of two sites, neither is the measure
    assert gate.refuse(ASK, updates(a=(1.0, 0.0), b=(1.0, 0.0), c=(1.0, 0.0), m=(1.0, 1.0))) == {}


def test_weights_of_single_elements_are_compared_by_their_mean() -> None:
    def fisher(weight: float) -> Reply:
        return Reply({"update": ElementwiseMean.of({"w": torch.ones(4)}, {"w": torch.full((4,), weight)})})

    replies = {"a": fisher(1.0), "b": fisher(2.0), "c": fisher(3.0), "m": fisher(1e12)}
    assert list(ReplyValidator(weight_ratio=10).refuse(ASK, replies)) == ["m"]


def test_answers_that_come_one_by_one_are_compared_with_earlier_ones(
    task: Classification, local: LocalTraining
) -> None:
    """If no site is waited for, a round has no others; what they sent before is remembered, not the replies."""
    sites, method = little_sites(count=4), FedAvg(task, local)
    heavy = Tampered(method, sites, "site-3", reweighted(1e12))
    steps = list(
        train_async(method, heavy, method.init(task.first(0)), updates=8, gate=ReplyValidator(weight_ratio=10))
    )
    assert "site-3" not in {site for step in steps for site in step.asked}
    assert {site for step in steps for site in step.lost} == {"site-3"}


def test_two_sites_that_differ_are_decided_by_what_was_asked() -> None:
    request = Request(0, {"params": {"w": torch.zeros(2)}})
    good, bad = (
        Reply({"update": WeightedMean.of({"w": torch.ones(2)})}),
        Reply({"update": WeightedMean.of({"v": torch.ones(2)})}),
    )
    assert list(ReplyValidator().refuse(request, {"a": bad, "b": good})) == ["a"]
    assert list(ReplyValidator().refuse(request, {"a": good, "b": bad})) == ["b"]


def test_too_few_replies_stop_with_every_reason(task: Classification, local: LocalTraining) -> None:
    method, sites = FedAvg(task, local), little_sites()
    sites["site-1"] = replace(sites["site-1"], data={})
    with pytest.raises(TooFewReplies, match=r"2 of 3 required replies. site-1: failed: KeyError"):
        list(train(method, InProcess(method, sites), method.init(task.first(0)), rounds=1, min_replies=3))


def test_an_async_run_with_a_full_buffer_is_a_lockstep_run(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    start = method.init(task.first(0))
    *_, expected = train(method, InProcess(method, sites), start, rounds=1)
    (step,) = train_async(method, InProcess(method, sites), start, updates=1, buffer=3)
    assert equal(step.state, expected.state)


def test_an_async_run_gives_up_on_a_site_that_always_fails(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    sites["site-0"] = replace(sites["site-0"], data={})
    steps = list(train_async(method, InProcess(method, sites), method.init(task.first(0)), updates=6))
    assert len(steps) == 6
    assert {site for step in steps for site in step.asked} == {"site-1", "site-2"}


def test_a_site_whose_passes_are_used_up_is_not_asked_again(task: Classification, local: LocalTraining) -> None:
    sites, method = little_sites(), FedAvg(task, local)
    steps = list(train_async(method, InProcess(method, sites), method.init(task.first(0)), updates=99, passes=2))
    assert len(steps) == 6


class Counted(InProcess):
    """An engine that records the sites it was asked for, by round."""

    def __init__(self, method: Method[Any], sites: Mapping[str, Site], failing: dict[str, int] | None = None) -> None:
        super().__init__(method, sites)
        self.asked: list[tuple[int, str]] = []
        self.failing = dict(failing or {})

    def send(self, request: Request, to: Sequence[str]) -> None:
        self.asked += [(request.round, site) for site in to]
        super().send(request, to)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        for arrival in super().replies(deadline):
            if self.failing.get(arrival.site, 0) > 0:
                self.failing[arrival.site] -= 1
                yield arrival._replace(reply=None, lost="failed")
            else:
                yield arrival


@pytest.mark.parametrize("buffer", [1, 2, 3])
def test_nobody_is_asked_twice_with_one_model(buffer: int, task: Classification, local: LocalTraining) -> None:
    """The same request would bring the same bits, and a fast site would count several times."""
    method, sites = FedAvg(task, local), little_sites()
    engine = Counted(method, sites)
    steps = list(train_async(method, engine, method.init(task.first(0)), updates=5, buffer=buffer))
    assert len(set(engine.asked)) == len(engine.asked)
    assert [step.request.round for step in steps] == list(range(5))
    assert sum(len(step.asked) for step in steps) <= 5 * buffer


def test_a_buffer_that_nobody_can_fill_is_refused(task: Classification, local: LocalTraining) -> None:
    method = FedAvg(task, local)
    steps = train_async(method, InProcess(method, little_sites()), method.init(task.first(0)), updates=1, buffer=4)
    with pytest.raises(ValueError, match="an update needs 4 answers, and 3 sites"):
        next(steps)


@pytest.mark.parametrize(("fails", "lost"), [(1, False), (2, False), (3, True), (99, True)])
def test_a_site_that_fails_is_asked_again_and_then_done_without(
    fails: int, lost: bool, task: Classification, local: LocalTraining
) -> None:
    """A full buffer waits for everybody: who fails is asked again, three times in a row at most, and is then named."""
    method, sites = FedAvg(task, local), little_sites()
    start = method.init(task.first(0))
    engine = Counted(method, sites, {"site-1": fails})
    step, *more = train_async(method, engine, start, updates=3, buffer=3)
    assert len(more) == 2
    assert engine.asked.count((0, "site-1")) == min(fails, 2) + 1
    assert ("3 times in a row" in step.lost.get("site-1", "")) == lost
    there = {name: site for name, site in sites.items() if name != "site-1" or not lost}
    (expected,) = train(method, InProcess(method, there), start, rounds=1)
    assert equal(step.state, expected.state)


def test_a_full_buffer_does_not_wait_for_a_site_that_has_failed(task: Classification, local: LocalTraining) -> None:
    """The failed site is asked again with the new model, and not once more with the old one."""
    method = FedAvg(task, local)
    engine = Counted(method, little_sites(), {"site-0": 1})
    first, *_ = train_async(method, engine, method.init(task.first(0)), updates=2, buffer=2)
    assert sorted(first.asked) == ["site-1", "site-2"]
    assert first.lost == {"site-0": "failed"}
    assert engine.asked.count((0, "site-0")) == 1
    assert engine.asked.count((1, "site-0")) == 1


def test_a_step_counts_the_bytes_of_each_site(task: Classification, local: LocalTraining) -> None:
    """FedAvg sends float32 parameters in both directions."""
    method, start = FedAvg(task, local), task.first(0)
    size = 4 * sum(leaf.numel() for leaf in start.values())
    for steps in (
        train(method, InProcess(method, little_sites()), method.init(start), rounds=1),
        train_async(method, InProcess(method, little_sites()), method.init(start), updates=1, buffer=3),
    ):
        (step,) = steps
        assert step.bytes_up == step.bytes_down == dict.fromkeys(little_sites(), size)


def test_a_run_of_which_nobody_is_left_ends(task: Classification, local: LocalTraining) -> None:
    method, sites = FedAvg(task, local), little_sites()
    engine = Counted(method, sites, dict.fromkeys(sites, 99))
    assert list(train_async(method, engine, method.init(task.first(0)), updates=3, buffer=2)) == []
    assert len(engine.asked) == 9


def test_what_is_kept_apart_by_site_has_room_for_one_answer_of_each() -> None:
    def arrival(site: str, round: int, kind: type[PerSite | WeightedMean] = PerSite) -> Arrival:
        tree = {"w": torch.ones(1)}
        return Arrival(site, round, Reply({"p": PerSite({site: tree}) if kind is PerSite else WeightedMean.of(tree)}))

    kept = _buffered([arrival("a", 0), arrival("b", 0)], arrival("a", 1))
    assert [(a.site, a.round) for a in kept] == [("a", 1), ("b", 0)]
    kept = _buffered([arrival("a", 0, WeightedMean), arrival("b", 0, WeightedMean)], arrival("a", 1, WeightedMean))
    assert [(a.site, a.round) for a in kept] == [("a", 0), ("a", 1), ("b", 0)]


def test_cohorts_are_drawn_afresh_and_repeat() -> None:
    names = [f"s{i:03}" for i in range(100)]
    draws = [tuple(sample_sites(names, 10, r)) for r in range(20)]
    assert draws == [tuple(sample_sites(names, 10, r)) for r in range(20)]
    assert len(set(draws)) == 20
    assert all(len(set(draw)) == 10 and list(draw) == sorted(draw) for draw in draws)


def test_dice_depend_on_study_site_and_key_alone() -> None:
    def draw(site: Site, *key: int | str) -> list[float]:
        return torch.rand(3, generator=site.rng(*key)).tolist()

    site = Site("a", seed=1)
    assert draw(site, 0, "x") == draw(Site("a", seed=1), 0, "x")
    others = [draw(site, 1, "x"), draw(site, 0, "y"), draw(Site("b", seed=1), 0, "x"), draw(Site("a", seed=2), 0, "x")]
    assert all(other != draw(site, 0, "x") for other in others)


def test_secret_dice_are_normal_and_never_repeat() -> None:
    x, y = SecretRng().normal(200_001), SecretRng().normal(200_001)
    assert not torch.equal(x, y)
    assert x.shape == (200_001,)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert abs(float((x.abs() > 1.959964).double().mean()) - 0.05) < 0.005
    assert SecretRng().uniform(0).numel() == 0


def test_a_journal_shows_every_change(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for i in range(5):
        journal.write("round", {"round": i})
    journal.close()
    again = Journal(path)
    assert again.head == journal.head
    again.write("end")
    again.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [e["seq"] for e in verify(path)] == list(range(6))
    changed = json.loads(lines[2]) | {"round": 9}
    tampering = {
        "changed": ([*lines[:2], json.dumps(changed).encode() + b"\n", *lines[3:]], 3),
        "dropped": (lines[:2] + lines[3:], 3),
        "reordered": ([lines[0], lines[2], lines[1], *lines[3:]], 2),
        "not JSON": ([*lines[:4], b"nonsense\n", *lines[5:]], 5),
        "begun in the middle": (lines[1:], 1),
    }
    for bad, line in tampering.values():
        path.write_bytes(b"".join(bad))
        with pytest.raises(Broken, match=rf"journal.jsonl:{line}:"):
            list(verify(path))
        with pytest.raises(Broken):
            Journal(path)


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("one")
    head = journal.write("two")
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"seq": 2, "event": "thr')
    again = Journal(path)
    assert again.head == head
    again.write("three")
    again.close()
    assert [e["event"] for e in verify(path)] == ["one", "two", "three"]
