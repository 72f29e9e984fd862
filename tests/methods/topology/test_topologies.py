"""Learning without a central server: what equals what, and what happens when a site dies."""

import dataclasses
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.topology.cyclic import Cyclic
from polyclinic.methods.topology.gossip import Gossip, around
from polyclinic.methods.topology.network_chain import Piece, length
from polyclinic.methods.topology.split_learning import Split
from polyclinic.methods.topology.swarm import Swarm
from polyclinic.testing import close, equal
from tests.conftest import little_sites


def run(method: Any, task: Any, sites: Any, rounds: Any = 2, engine: Any = InProcess, **options: Any) -> Any:
    federation, state = engine(method, sites), method.init(task.first(0))
    for step in train(method, federation, state, rounds=rounds, **options):
        state = step.state
    return state, federation


class Deadly(InProcess):
    """Kills every site that ``dies`` names for a job, round by round."""

    dies = staticmethod(lambda ask, site: False)

    def replies(self, deadline: Any = None) -> Iterator[Any]:
        while self._queue:
            request, site = self._queue[0]
            arrivals = super().replies(deadline)
            assert isinstance(arrivals, Generator)
            arrival = next(arrivals)
            arrivals.close()
            yield arrival._replace(reply=None, lost="killed") if self.dies(request, site) else arrival


def test_swarm_is_fedavg_to_the_bit(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    state, _ = run(Swarm(task, local), task, sites, 3)
    assert equal(state.params, run(FedAvg(task, local), task, sites, 3)[0].params)
    assert set(state.merged) <= set(sites)
    assert len(state.merged) == 3


def test_every_site_comes_to_merge(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    state, _ = run(Swarm(task, LocalTraining(steps=1)), task, sites, 15)
    assert set(state.merged) == set(sites)


def test_a_killed_merger_is_replaced_and_changes_no_bit(task: Classification) -> None:
    sites, local = little_sites(count=5), LocalTraining(steps=1)
    expected, _ = run(FedAvg(task, local), task, sites, 6)
    rng = torch.Generator().manual_seed(0)

    class Killing(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return request.job == "merge" and bool(torch.rand((), generator=rng) < 0.6)

    for deputies in (0, 1, 4):
        state, _ = run(Swarm(task, local, deputies), task, sites, 6, Killing, min_replies=0)
        if "" not in state.merged:  # with so many deaths a round may find nobody, and is then left out
            assert equal(state.params, expected.params)
        assert len(state.merged) == 6


def test_the_elected_dies_and_the_deputy_merges_under_the_usual_settings(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    class First(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return request.job == "merge" and site == request.recipients[0]

    state, _ = run(Swarm(task, local), task, sites, 3, First)
    assert equal(state.params, run(FedAvg(task, local), task, sites, 3)[0].params)


def test_nobody_left_to_merge_leaves_the_model_as_it_was(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    class All(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return request.job == "merge"

    state, _ = run(Swarm(task, local), task, sites, 2, All, min_replies=0)
    assert state.merged == ("", "")
    assert equal(state.params, task.first(0))
    with pytest.raises(TooFewReplies):
        run(Swarm(task, local), task, sites, 2, All)


def test_gossip_with_everybody_is_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    for neighbors in (0, 2):  # of three sites two others are all
        state, _ = run(Gossip(task, local, neighbors), task, sites, 3)
        assert close(state.params, run(FedAvg(task, local, uniform=True), task, sites, 3)[0].params)


def test_gossip_keeps_the_mean_and_brings_sites_together(task: Classification) -> None:
    """Without learning the mean never moves, and what sites disagree on shrinks (doubly stochastic mixing)."""
    sites, still = little_sites(count=7), LocalTraining(steps=1, lr=0.0)
    task = dataclasses.replace(
        task, network=Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "none")))
    )
    for graph in ("ring", "random"):
        method = Gossip(task, still, 2, graph)
        state = method.init(task.first(0))._replace(models={name: task.first(k) for k, name in enumerate(sites)})
        state = state._replace(circle=tuple(sites))
        memory = {name: {"own": task.first(k)} for k, name in enumerate(sites)}
        engine, spread, means = InProcess(method, sites, memory), [], []
        for step in train(method, engine, state, rounds=12):
            models = list(step.state.models.values())
            means.append(step.state.params)
            spread.append(sum(tree.norm(tree.sub(model, step.state.params)) ** 2 for model in models))
        assert close(means[0], means[-1])
        assert spread[-1] < 0.05 * spread[0]
        assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(spread))


def test_who_stands_beside_whom() -> None:
    circle = ("d", "a", "c", "b", "e")
    assert around("d", circle, 2) == ["a", "e"]
    assert around("c", circle, 4) == ["a", "b", "d", "e"]
    assert around("a", circle, 0) == ["b", "c", "d", "e"]
    assert around("a", ("a",), 2) == []
    with pytest.raises(ValueError, match="half on each side"):
        Gossip(None, neighbors=3)  # type: ignore[arg-type]


def test_gossip_goes_on_without_a_site(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=5)

    class Lost(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return site == "site-2" and request.round in (1, 2)

    state, _ = run(Gossip(task, local), task, sites, 4, Lost)
    assert state.models.keys() == sites.keys()  # it came back
    request = Gossip(task, local).request(state)
    assert Gossip(task, local).site_model(request.for_site("new"), {}) is state.params


def test_cyclic_is_training_at_one_site_after_another(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    names = ("site-2", "site-0", "site-1")
    state, _ = run(Cyclic(task, names, local), task, sites, 2)
    params = task.first(0)
    for round in range(2):
        for name in names:
            end = local.fit(task, params, sites[name], round)
            params = tree.shift(params, tree.sub(end, params))
    assert close(state.params, params)
    alone = {"site-1": sites["site-1"]}
    assert close(
        run(Cyclic(task, ("site-1",), local), task, alone)[0].params, run(FedAvg(task, local), task, alone)[0].params
    )


def test_the_order_of_a_cycle_matters_and_can_be_drawn(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    forth, _ = run(Cyclic(task, tuple(sorted(sites)), local), task, sites)
    back, _ = run(Cyclic(task, tuple(sorted(sites, reverse=True)), local), task, sites)
    assert not close(forth.params, back.params)
    drawn, _ = run(Cyclic(task, tuple(sites), local, shuffle=True), task, sites, 3)
    assert sorted(drawn.order) == sorted(sites)
    with pytest.raises(ValueError, match="every site once: site-0, site-1, site-2; not site-0"):
        Cyclic(task, tuple(sites), local, order=("site-0",))


def test_cyclic_passes_over_a_site_that_died(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    class Lost(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return site == "site-1"

    state, _ = run(Cyclic(task, tuple(sorted(sites)), local), task, sites, 2, Lost, min_replies=0)
    left = {name: site for name, site in sites.items() if name != "site-1"}
    assert close(state.params, run(Cyclic(task, ("site-0", "site-2"), local), task, left)[0].params)


MLP = Classification(Network("mlp", (6,), 2, (("width", 8), ("depth", 3))))
CNN = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))


def joint(task: Any, local: Any, sites: Any, order: Any, rounds: Any) -> Any:
    """One model in one place; plain PyTorch over the same minibatches in the same order."""
    model = load(task.model(), task.first(0)).train()
    optimizer = torch.optim.SGD(model.parameters(), local.lr, weight_decay=local.weight_decay)
    for round in range(rounds):
        for name in order:
            for x, y in local.batches(sites[name].data["train"], sites[name].rng(round, "split")):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return params_of(model)


@pytest.mark.parametrize("u_shaped", [False, True])
@pytest.mark.parametrize(("task", "cut"), [(MLP, 0), (MLP, 1), (MLP, 11), (CNN, 6)])
@pytest.mark.parametrize("count", [1, 3])
def test_split_learning_is_joint_training_to_the_bit(
    u_shaped: bool, task: Classification, cut: int, count: int
) -> None:
    sites, local = little_sites(task.network.inputs, count), LocalTraining(batch_size=8, lr=0.1, weight_decay=1e-3)
    order = tuple(sorted(sites, reverse=True))
    state, _ = run(Split(task, order, local, cut, u_shaped), task, sites, 2)
    assert equal(state.params, joint(task, local, sites, order, 2))


def test_labels_stay_home_in_the_u_shape(local: LocalTraining, sites: dict[str, Site]) -> None:
    for u_shaped in (False, True):
        method = Split(CNN, tuple(sorted(sites)), local, 0, u_shaped)
        sent, state = set(), method.init(CNN.first(0))
        for step in train(method, InProcess(method, sites), state, rounds=1):
            for part, stat in step.reply.parts.items():
                assert isinstance(stat, PerSite)
                sent |= {(part, name) for leaves in stat.items.values() for name in leaves if part == "sent"}
            held = {name for name in method.body.of(step.state.params) if name.startswith("head")}
        assert (("sent", "y") in sent) is not u_shaped
        assert (("sent", "gradient") in sent) is u_shaped
        assert bool(held) is not u_shaped


def test_split_learning_with_dropout_uses_the_same_dice_both_ways() -> None:
    """What is sent and what is learned from drop the same units; and without a gradient nothing moves."""
    task = Classification(Network("mlp", (6,), 2, (("width", 8), ("depth", 2), ("dropout", 0.5))))
    sites, local = little_sites((6,), 1), LocalTraining(epochs=1, batch_size=8, lr=0.1)
    for u_shaped in (False, True):
        one, _ = run(Split(task, ("site-0",), local, 5, u_shaped), task, sites)
        two, _ = run(Split(task, ("site-0",), local, 5, u_shaped), task, sites)
        assert equal(one.params, two.params)
    method = Split(task, ("site-0",), local, 5)
    state = method.init(task.first(0))
    request = method.request(state)
    sent, memory = method.site_update(request, {}, sites["site-0"])
    again, _ = method.site_update(request, {}, sites["site-0"])
    h = sent.gather("sent")["site-0"]["h"]
    assert torch.equal(h, again.gather("sent")["site-0"]["h"])
    back = dataclasses.replace(request, trees={"gradient": {"h": torch.zeros_like(h)}})
    _, after = method.site_update(back, memory, sites["site-0"])
    assert equal(after["ends"], memory["ends"])  # no gradient, no step


def test_a_site_lost_in_its_turn_is_passed_over(local: LocalTraining, sites: dict[str, Site]) -> None:
    class Lost(Deadly):
        def dies(self, request: Any, site: Any) -> Any:
            return site == "site-1" and "gradient" in request.trees

    state, _ = run(Split(CNN, tuple(sorted(sites)), local), CNN, sites, 2, Lost, min_replies=0)
    assert state.round == 2
    assert tree.finite(state.params)


def test_what_cannot_be_split_is_refused() -> None:
    class Branching(Network):
        def __call__(self) -> Any:
            return torch.nn.Bilinear(2, 2, 2)

    names = ("a",)
    with pytest.raises(ValueError, match="choose mlp or cnn, not densenet121"):
        Split(Classification(Branching("densenet121", (1, 32, 32), 2)), names)
    with pytest.raises(ValueError, match=r"plain sgd.*cut must leave the server a layer: 1 to 12"):
        Split(MLP, names, LocalTraining(momentum=0.9), cut=13)
    assert length(MLP) == 14
    assert Piece(MLP, 0, length(MLP)).of(MLP.first(0)).keys() == MLP.first(0).keys()
