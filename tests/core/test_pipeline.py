"""Pipelines: what is sent, what is kept, what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from polyclinic.core import serialization as saved
from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean, merge
from polyclinic.core.execution import execute
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.pipeline import (
    Packed,
    SentState,
    Transform,
    UnsuitableTransforms,
    UplinkPipeline,
    send_through,
)
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.testing import equal


@savable("tests.SumState", 1)
class SumState(NamedTuple):
    round: int
    params: Tree
    seen: Any = None


@dataclass(frozen=True)
class Told(Method[SumState]):
    """Sends the given values; the server moves by the mean. Counts at the site how often it was asked."""

    sends: Mapping[str, Tree] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("mean",)

    def init(self, params: Tree) -> SumState:
        return SumState(0, params)

    def request(self, state: SumState) -> Request:
        return Request(state.round, {"params": state.params}, per_site={"a": {"mine": {"x": torch.ones(1)}}})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        value, weight = self.sends[site.name], self.weights.get(site.name, 1.0)
        count = memory.get("count", {"n": torch.zeros(1)})["n"] + 1
        parts: dict[str, Any] = {}
        if "mean" in self.kinds:
            parts["update"] = WeightedMean.of(value, weight)
        if "second" in self.kinds:
            parts["second"] = WeightedMean.of(tree.scale(value, 2), weight * 3)
        if "leaf" in self.kinds:
            parts["fisher"] = ElementwiseMean.of(value, tree.scale(value, 0.5))
        if "gather" in self.kinds:
            parts["whole"] = PerSite({site.name: tree.scale(value, 5)})
        if "empty" in self.kinds:
            parts["none"] = WeightedMean({}, weight)
        assert set(request.trees) == ({"params", "mine"} if site.name == "a" else {"params"})
        return Reply(parts), {"count": {"n": count}}

    def server_update(self, state: SumState, reply: Reply, server: Site) -> SumState:
        return SumState(state.round + 1, tree.add(state.params, reply.mean("update").value), reply)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return {"count": memory["count"]["n"]} if memory else request.trees["params"]


@dataclass(frozen=True)
class Doubled(Transform):
    """Doubles at the site and halves at the server; counts in its memory and state."""

    def init(self, params: Tree) -> Trees:
        return {"n": {"x": torch.zeros(1)}}

    def describe(self, state: Trees) -> Trees:
        return {"n": state["n"]}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        assert float(notes["n"]["x"]) == round
        before = memory.get("n", {"x": torch.zeros(1)})["x"]
        assert float(before) == round
        return WeightedMean(tree.scale(sent.total, 2), sent.weight), {"n": {"x": before + 1}}

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        return WeightedMean(tree.scale(received.total, 0.5), received.weight), {"n": {"x": state["n"]["x"] + 1}}


@dataclass(frozen=True)
class Squared(Transform):
    """Does not add up."""

    @property
    def additive(self) -> bool:
        return False

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        return WeightedMean({k: v.sign() * v.square() for k, v in sent.total.items()}, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        return WeightedMean({k: v.sign() * v.abs().sqrt() for k, v in received.total.items()}, received.weight), state


@dataclass(frozen=True)
class OnlySums(Transform):
    secure: ClassVar[bool] = True


SENDS = {"a": {"w": torch.tensor([1.0, -2.0])}, "b": {"w": torch.tensor([3.0, 5.0])}}
WEIGHTS = {"a": 1.0, "b": 3.0}


def asked(method: Method[Any], state: Any) -> Request:
    """The request of ``state``, which has one."""
    request = method.request(state)
    assert request is not None
    return request


def run(method: Method[Any], rounds: int = 1, discount: float = 1.0) -> tuple[Any, dict[str, Trees], list[Reply]]:
    state, sent = method.init({"w": torch.zeros(2)}), []
    memory: dict[str, Trees] = {name: {} for name in SENDS}
    for _ in range(rounds):
        request, replies = asked(method, state), {}
        for name in sorted(SENDS):
            replies[name], memory[name] = execute(method, request, memory[name], Site(name))
        sent = list(replies.values())
        state = method.server_update(
            state, merge(r * (discount if n == "b" else 1) for n, r in replies.items()), Site("server")
        )
        state = saved.decode(saved.encode(state))  # anything a state holds can be saved
    return state, memory, sent


ALL = ("mean", "second", "leaf", "empty")


@pytest.mark.parametrize("kinds", [("mean",), ALL, ("leaf", "second", "mean")])
@pytest.mark.parametrize("transforms", [(), (Doubled(),), (Squared(),), (Doubled(), Squared(), Doubled())])
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_transforms_that_undo_themselves_change_nothing(kinds: Any, transforms: Any, discount: float) -> None:
    plain, _, _ = run(Told(SENDS, WEIGHTS, kinds), 2, discount)
    sent, _, _ = run(send_through(Told(SENDS, WEIGHTS, kinds), *transforms), 2, discount)
    assert torch.allclose(sent.inner.params["w"], plain.params["w"])
    assert sent.inner.seen.parts.keys() == plain.seen.parts.keys()
    for part, stat in plain.seen.parts.items():
        for ours, theirs in zip(sent.inner.seen.parts[part].trees, stat.trees, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[k], theirs[k]) for k in theirs)
        if isinstance(stat, WeightedMean):
            assert sent.inner.seen.parts[part].weight == pytest.approx(stat.weight)


@pytest.mark.parametrize("transforms", [(), (Squared(),)])
def test_what_is_gathered_stays_apart(transforms: Any) -> None:
    plain, _, _ = run(Told(SENDS, WEIGHTS, ("mean", "gather")))
    sent, _, replies = run(send_through(Told(SENDS, WEIGHTS, ("mean", "gather")), *transforms))
    assert isinstance(replies[0].parts["sent"], Packed)
    whole = sent.inner.seen.gather("whole")
    assert list(whole) == ["a", "b"]
    assert all(torch.allclose(whole[n]["w"], plain.seen.gather("whole")[n]["w"]) for n in whole)
    assert torch.allclose(sent.params["w"], plain.params["w"])


def test_memories_do_not_collide_and_reach_the_model() -> None:
    method = send_through(Told(SENDS, WEIGHTS), Doubled(), Doubled())
    state, memory, _ = run(method, 3)
    assert set(memory["a"]) == {"inner/count", "sent/train/0/n", "sent/train/1/n"}
    assert float(memory["a"]["inner/count"]["n"]) == 3
    assert float(method.site_model(asked(method, state).for_site("a"), memory["a"])["count"]) == 3
    assert [float(t["n"]["x"]) for t in state.transforms] == [3, 3]


def test_pipelines_stand_inside_one_another() -> None:
    inside = UplinkPipeline(Told(SENDS, WEIGHTS), (Doubled(), Squared()))
    with pytest.raises(UnsuitableTransforms, match="each site's reply, and Doubled is decoded on a sum"):
        UplinkPipeline(inside, (Doubled(),))  # packed inside, decoded on a sum outside
    nested, _, _ = run(UplinkPipeline(UplinkPipeline(Told(SENDS, WEIGHTS), (Doubled(),)), (Doubled(), Squared())), 3)
    flat, _, _ = run(send_through(Told(SENDS, WEIGHTS), Doubled(), Doubled(), Squared()), 3)
    assert torch.allclose(nested.params["w"], flat.params["w"])


def test_the_trial_carries_the_notes() -> None:
    method = send_through(Told(SENDS, WEIGHTS), Doubled())
    state = method.init({"w": torch.zeros(2)})
    trial = method.evaluation_request(state)
    assert trial.trees.keys() == asked(method, state).trees.keys() == {"params", "~0/n"}
    assert isinstance(state, SentState)
    assert method.prediction_task is None


def test_wrong_combinations_are_refused_at_once_with_every_reason() -> None:
    with pytest.raises(ValueError, match=r"OnlySums reveals .* output of Squared cannot be summed: remove Squared"):
        send_through(Told(SENDS), OnlySums(), Squared())


def test_a_sum_shows_no_single_site() -> None:
    with pytest.raises(ValueError, match="needs each site's reply, and OnlySums reveals only sums"):
        run(send_through(Told(SENDS, WEIGHTS, ("mean", "gather")), OnlySums()))


def test_a_spoiled_reply_is_named_and_can_be_refused_before_it_is_merged() -> None:
    method = send_through(Told(SENDS, WEIGHTS), Squared())
    state = method.init({"w": torch.zeros(2)})
    good, _ = method.site_update(asked(method, state).for_site("a"), {}, Site("a"))
    bad = Reply({"sent": Packed({"b": {"m/update/w": torch.tensor([float("nan"), 0])}}, {"b": 1.0})})
    opened = method.opened(state, good)
    assert torch.allclose(opened.mean("").total["m/update/w"], SENDS["a"]["w"])
    with pytest.raises(ValueError, match=r"site 'b' .* not finite"):
        method.opened(state, bad)
    for weights in ({}, {"b": -1.0}, {"b": float("nan")}, {"b": float("inf")}):
        with pytest.raises(ValueError, match=r"site 'b' .* its weight is"):
            method.opened(state, Reply({"sent": Packed({"b": {"m/update/w": torch.ones(2)}}, weights)}))
    with pytest.raises(ValueError, match="site 'b'"):
        method.server_update(state, good + bad, Site("server"))


def test_weights_must_be_positive_and_parts_nameable() -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        run(send_through(Told(SENDS, {"a": 0.0}), Squared()))


def test_packed_merges_only_with_packed() -> None:
    packed = Packed({"a": {}}, {"a": 1.0})
    with pytest.raises(TypeError, match="not encoded"):
        packed + PerSite({"b": {}})
    with pytest.raises(ValueError, match="two contributions from the same site"):
        packed + packed


def test_wrappers_hand_the_inner_method_what_they_are_given() -> None:
    given: dict[str, Any] = {}

    @dataclass(frozen=True)
    class Asked(Told):
        def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
            given.update(memory=memory, site=site, role=role)
            return {"x": torch.ones(1)}

        def server_update(self, state: SumState, reply: Reply, server: Site) -> SumState:
            given.update(reply=reply, server=server)
            return state

    @dataclass(frozen=True)
    class Around(MethodWrapper[Any]):
        inner: Method[Any]

    site, server = Site("a", {}), Site("server", {})
    mine = {"inner/count": {"n": torch.ones(1)}}
    piped, around = send_through(Asked(), Doubled()), Around(Asked())
    for method, memory in ((piped, mine), (around, {"count": mine["inner/count"]})):
        given.clear()
        request = Request(0, {"params": {"x": torch.zeros(1)}})
        assert equal(method.adapted_model(request, memory, site, "val"), {"x": torch.ones(1)})
        assert (given["site"], given["role"], list(given["memory"])) == (site, "val", ["count"])
    empty = Reply()
    piped.server_update(SentState(SumState(0, {}), ()), empty, server)
    assert given["reply"] is empty
    assert given["server"] is server
