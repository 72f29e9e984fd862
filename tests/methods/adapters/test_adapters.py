"""Federated adapters: what leaves, that the aggregation is exact, and what they compose with."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.compression.powersgd import PowerSGD
from polyclinic.compression.quantization import Int8, Sign
from polyclinic.compression.topk import TopK
from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, Reply, WeightedMean, Weightless
from polyclinic.core.method import Method
from polyclinic.core.pipeline import send_through
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.adapters import LowRank, factors, is_factor, product
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.adapters.alternating import (
    A,
    B,
    Moving,
    alternating,
    fedsa_lora,
    ffa_lora,
    rolora,
)
from polyclinic.methods.adapters.flexlora import FlexLoRA
from polyclinic.methods.adapters.flora import LAYER, FLoRA, stacked
from polyclinic.methods.frozen_networks import frozen_problem
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedprox import FedProx
from polyclinic.methods.registry import Setting, build
from polyclinic.privacy.gaussian import Clip, Gaussian
from polyclinic.testing import check_method, equal
from tests.conftest import blobs, little_sites
from tests.support.start_weights import weights_of

NET = Network("cnn", (1, 8, 8), 2, (("width", 8), ("depth", 2)))
LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.2)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))


def adapted(rank: int = 2, train: tuple[str, ...] = ("adapters", "head")) -> Classification:
    return Classification(NET).with_network(FineTuned(NET, weights_of(NET), train, LowRank(rank=rank)))


WITH_LAYERS = ("adapters", "head", "*.base.weight")
"""What FLoRA needs: the layers that have adapters change, too."""


METHODS: dict[str, Any] = {
    "rolora": rolora,
    "ffa-lora": ffa_lora,
    "fedsa-lora": fedsa_lora,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "fedavg": FedAvg,
}
OTHERS = ("fedper", "ditto", "scaffold", "fedadam", "krum")
"""Methods that know nothing of adapters."""


def states(method: Method[Any], params: Tree, sites: dict[str, Site], rounds: int) -> list[Any]:
    state = method.init(params)
    found = [state]
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        assert not step.lost, dict(step.lost)
        found.append(step.state)
    return found


def replies(method: Method[Any], state: Any, sites: dict[str, Site]) -> dict[str, Any]:
    request = method.request(state)
    assert request is not None
    return {name: method.site_update(request, {}, site)[0] for name, site in sites.items()}


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_promises_with_adapters(name: str) -> None:
    task, sites = adapted(train=WITH_LAYERS if name == "flora" else ("adapters", "head")), little_sites()
    method = build(name, Setting(task, LocalTraining(batch_size=8, lr=0.05), tuple(sites), rounds=3))
    check_method(method, task.first(0), sites, rounds=3)


def aggregation_error(start: Tree, ends: dict[str, Tree], weights: dict[str, float]) -> float:
    """Return how far the product of mean factors is from the mean of products, relative to the mean change.

    ``‖Σ p_i B_i A_i − B̄ Ā‖ / ‖Σ p_i B_i A_i − B_0 A_0‖``, over all adapters together.

    Args:
        start: The model with which the sites began, with A_0 and B_0.
        ends: The model of each site after training.
        weights: The weight of each site; p_i is its share.
    """
    total = sum(weights.values())
    wrong = change = torch.zeros((), dtype=torch.float64)
    for layer, (a0, b0) in factors(start).items():
        pairs = {site: (weights[site] / total, *factors(end)[layer]) for site, end in ends.items()}
        products = sum((p * product(a.double(), b.double()) for p, a, b in pairs.values()), torch.zeros(()).double())
        a = sum((p * a.double() for p, a, _ in pairs.values()), torch.zeros(()).double())
        b = sum((p * b.double() for p, _, b in pairs.values()), torch.zeros(()).double())
        wrong = wrong + (products - product(a, b)).square().sum()
        change = change + (products - product(a0.double(), b0.double())).square().sum()
    return float((wrong / change).sqrt()) if change > 0 else 0.0


@pytest.mark.parametrize("name", ["rolora", "ffa-lora"])
def test_the_mean_of_products_is_the_product_of_means(name: str) -> None:
    """A law of each round, against sums in double precision of the sites' own products."""
    task, sites = adapted(), little_sites()
    method = METHODS[name](task, LOCAL)
    for before, after in itertools.pairwise(states(method, task.first(0), sites, 4)):
        sent = replies(method, before, sites)
        weights = {site: reply.mean("update").weight for site, reply in sent.items()}
        ends = {s: tree.shift(before.params, reply.mean("update").value) for s, reply in sent.items()}
        for layer, (down, up) in factors(after.params).items():
            pairs = {site: factors(end)[layer] for site, end in ends.items()}
            mean = sum(weights[s] * product(a.double(), b.double()) for s, (a, b) in pairs.items())
            mean = mean / sum(weights.values())  # type: ignore[operator]
            assert float((product(down.double(), up.double()) - mean).norm() / mean.norm()) < 1e-6
        assert aggregation_error(before.params, ends, weights) < 1e-5


def test_the_plain_mean_of_both_factors_is_wrong() -> None:
    task, sites = adapted(), little_sites()
    state = states(FedAvg(task, LOCAL), task.first(0), sites, 1)[-1]
    sent = replies(FedAvg(task, LOCAL), state, sites)
    ends = {s: tree.shift(state.params, reply.mean("update").value) for s, reply in sent.items()}
    assert aggregation_error(state.params, ends, {s: r.mean("update").weight for s, r in sent.items()}) > 1e-3
    assert aggregation_error(state.params, {"a": ends["site-0"]}, {"a": 3.0}) < 1e-12


def test_one_factor_leaves_in_a_round_and_the_other_keeps_its_bits() -> None:
    task, sites = adapted(), little_sites()
    method = rolora(task, LOCAL)
    run = states(method, task.first(0), sites, 4)
    for round, (before, after) in enumerate(itertools.pairwise(run)):
        moving, resting = (B, A) if round % 2 == 0 else (A, B)
        sent = replies(method, before, sites)["site-0"].mean("update").total
        assert {name for name in sent if is_factor(name)} == {n for n in before.params if n.endswith(moving)}
        assert {"head.weight", "head.bias"} <= sent.keys()
        for name, leaf in before.params.items():
            assert torch.equal(leaf, after.params[name]) == name.endswith(resting)
    fixed = states(ffa_lora(task, LOCAL), task.first(0), sites, 3)
    assert all(torch.equal(leaf, fixed[-1].params[n]) for n, leaf in fixed[0].params.items() if n.endswith(A))


def test_without_adapters_they_are_fedavg_and_fedprox() -> None:
    task, sites = Classification(NET), little_sites()
    expected = states(FedAvg(task, LOCAL), task.first(0), sites, 2)[-1]
    for make in (rolora, ffa_lora, FlexLoRA, FLoRA):
        got = states(make(task, LOCAL), task.first(0), sites, 2)[-1]
        assert all(torch.equal(leaf, got.params[name]) for name, leaf in expected.params.items())
    prox = states(FedProx(task, LOCAL, mu=0.5), task.first(0), sites, 2)[-1]
    got = states(rolora(task, LOCAL, mu=0.5), task.first(0), sites, 2)[-1]
    assert all(torch.equal(leaf, got.params[name]) for name, leaf in prox.params.items())


def test_flexlora_gives_the_mean_of_products_up_to_the_cut() -> None:
    task, sites = adapted(rank=4), dict(list(little_sites().items())[:2])
    method = FlexLoRA(task, LOCAL)
    run = states(method, task.first(0), sites, 2)
    for before, after in itertools.pairwise(run):
        sent = replies(method, before, sites)
        weights = {s: r.mean("update").weight for s, r in sent.items()}
        own = {s: factors(dict(r.gather("factors")[s])) for s, r in sent.items()}
        wrong = norm = 0.0
        for layer, (down, up) in factors(after.params).items():
            mean = sum(w / sum(weights.values()) * product(*own[s][layer]) for s, w in weights.items())
            wrong += float((product(down, up) - mean).square().sum())  # type: ignore[union-attr]
            norm += float(mean.square().sum())  # type: ignore[union-attr]
            best = torch.linalg.svdvals(mean.flatten(1))[4:]  # type: ignore[union-attr]
            assert float((product(down, up) - mean).norm()) == pytest.approx(float(best.norm()), abs=1e-4)
        assert (wrong / norm) ** 0.5 == pytest.approx(after.cut, abs=1e-4)
    assert run[1].cut < 1  # in the first round B = 0 at the start: the products have rank 4 at each site


def test_flexlora_of_one_site_keeps_its_product() -> None:
    task = adapted()
    sites = {"a": little_sites()["site-0"]}
    sites = {"a": replace(sites["a"], name="a")}
    method = FlexLoRA(task, LOCAL)
    state = states(method, task.first(0), sites, 1)
    end = LOCAL.fit(task, state[0].params, sites["a"], 0)
    for layer, (down, up) in factors(state[1].params).items():
        torch.testing.assert_close(product(down, up), product(*factors(end)[layer]), atol=1e-5, rtol=1e-4)
    assert state[1].cut < 1e-4


@pytest.mark.parametrize("ranks", [(), (1, 4, 2)])
def test_flora_adds_the_mean_of_products_to_the_layers(ranks: tuple[int, ...]) -> None:
    """Against sums in double precision, with ranks of the sites' own."""
    task, sites = adapted(rank=4, train=WITH_LAYERS), little_sites()
    method = FLoRA(task, LOCAL, tuple(sites), ranks)
    for before, after in itertools.pairwise(states(method, task.first(0), sites, 2)):
        sent = replies(method, before, sites)
        weights = {s: len(site.data["train"]) for s, site in sites.items()}
        own = {s: factors(dict(reply.gather("factors")[s])) for s, reply in sent.items()}
        assert {s: len(next(iter(pairs.values()))[0]) for s, pairs in own.items()} == dict(
            zip(sites, ranks or (4, 4, 4), strict=True)
        )
        for layer, (down, up) in factors(before.params).items():
            assert not up.any()
            mean = sum(
                w / sum(weights.values()) * product(*(f.double() for f in own[s][layer])) for s, w in weights.items()
            )
            change = after.params[layer + LAYER].double() - before.params[layer + LAYER].double()
            assert float(mean.norm()) > 1e-3  # type: ignore[union-attr]
            assert float((change - 16 / 4 * mean).norm() / (4 * mean).norm()) < 1e-5  # type: ignore[operator,union-attr]
            fresh, empty = factors(after.params)[layer]
            assert not empty.any()
            assert not torch.equal(fresh, down)
            assert float(fresh.abs().max()) <= down[0].numel() ** -0.5


def test_flora_sends_no_layer_and_a_site_trains_no_row_beyond_its_rank() -> None:
    task, sites = adapted(rank=4, train=WITH_LAYERS), little_sites()
    method = FLoRA(task, replace(LOCAL, optimizer="adamw", weight_decay=0.1), tuple(sites), (1, 4, 2))
    state = method.init(task.first(0))
    sent = replies(method, state, sites)["site-0"]
    assert set(sent.mean("update").total) == {"head.weight", "head.bias"}
    one = adapted(rank=1, train=WITH_LAYERS)
    network: Any = one.network
    one = replace(one, network=replace(network, lora=LowRank(rank=1, alpha=4.0)))  # α / r as above
    own = dict(sent.gather("factors")["site-0"])
    start = {
        n: leaf[:1] if n.endswith(A) else leaf[:, :1] if n.endswith(B) else leaf for n, leaf in state.params.items()
    }
    alone = replies(FLoRA(one, method.local), FLoRA(one, method.local).init(start), sites)["site-0"]
    for name, leaf in dict(alone.gather("factors")["site-0"]).items():
        torch.testing.assert_close(own[name], leaf, rtol=1e-3, atol=1e-6)


def test_flora_trains_as_if_the_layers_were_frozen() -> None:
    task, site = adapted(train=WITH_LAYERS), little_sites()["site-1"]
    start = task.first(0)
    sent = replies(FLoRA(task, LOCAL), FLoRA(task, LOCAL).init(start), {"site-1": site})["site-1"]
    frozen = tree.select(start, lambda name: not name.endswith(LAYER))
    end = LOCAL.fit(adapted(), frozen, site, 0)
    for name, leaf in dict(sent.gather("factors")["site-1"]).items():
        if is_factor(name):
            torch.testing.assert_close(leaf, end[name])


def test_stacked_factors_have_the_mean_of_products() -> None:
    rng = torch.Generator().manual_seed(0)
    pairs = {
        f"s{r}": (torch.randn(r, 3, 5, 5, generator=rng), torch.randn(6, r, 1, 1, generator=rng)) for r in (1, 2, 4)
    }
    shares = {"s1": 0.5, "s2": 0.2, "s4": 0.3}
    a, b = stacked(pairs, shares)
    assert (a.shape, b.shape) == ((7, 3, 5, 5), (6, 7, 1, 1))
    mean = sum(shares[name] * product(*pair) for name, pair in pairs.items())
    torch.testing.assert_close(product(a, b), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "local", "message"),
    [
        ((1, 2), LOCAL, "ranks has 2 entries, and 3 sites train"),
        ((1, 2, 5), LOCAL, r"from 1 to lora.rank = 4, not 5"),
        ((0, 2, 4), LOCAL, r"from 1 to lora.rank = 4, not 0"),
        ((1, 2, 4), DPSGD(noise=1.0, bound=1.0, unit="record"), "leave ranks out"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: tuple[int, ...], local: LocalTraining, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FLoRA(adapted(rank=4, train=WITH_LAYERS), local, ("a", "b", "c"), ranks)


@pytest.mark.parametrize("kind", ["missing", "rank", "layer", "axes"])
def test_factors_that_do_not_fit_are_refused_by_name(kind: str) -> None:
    task, sites = adapted(rank=4, train=WITH_LAYERS), little_sites()
    method = FLoRA(task, LOCAL)
    state = method.init(task.first(0))
    sent = replies(method, state, sites)
    whole = sent["site-0"] + sent["site-1"]
    own: Any = whole.parts["factors"].items["site-1"]  # type: ignore[union-attr]
    name = next(key for key in own if key.endswith(A))
    other = {"missing": None, "rank": own[name].repeat(2, 1, 1, 1), "layer": own[name][:, :, :1], "axes": own[name][0]}
    if kind == "missing":
        del own[name]
    else:
        own[name] = other[kind]
    with pytest.raises(ValueError, match=r"site-1 sent factors for .* that do not fit the layer or its rank 4"):
        method.server_update(state, whole, Site("server"))


def test_flora_without_trained_layers_is_refused_before_the_first_round() -> None:
    assert "flora needs trained weights of the layers" in frozen_problem("flora", adapted())
    assert frozen_problem("flora", adapted(train=WITH_LAYERS)) == ""


@pytest.mark.parametrize("kind", [FlexLoRA, FLoRA])
def test_a_site_of_weight_0_is_left_out_of_the_mean(kind: Any) -> None:
    """``tests/laws/test_hostile_weights.py`` has the weights that are none, of all methods."""
    task, sites = adapted(train=WITH_LAYERS), little_sites()
    method = kind(task, LOCAL)
    state = method.init(task.first(0))
    sent = replies(method, state, sites)
    update, factors = sent["site-2"].mean("update"), sent["site-2"].gather("factors")["site-2"]
    empty = Reply(
        {
            "update": WeightedMean(tree.zeros(update.total), 0.0),
            "factors": type(sent["site-2"].parts["factors"])(
                {"site-2": {**factors, WEIGHT: torch.tensor(0.0, dtype=torch.float64)}}
            ),
        }
    )
    both = method.server_update(state, sent["site-0"] + sent["site-1"], Site("server"))
    assert equal(method.server_update(state, sent["site-0"] + sent["site-1"] + empty, Site("server")), both)
    with pytest.raises(Weightless, match="its weights sum to 0"):
        method.server_update(state, empty, Site("server"))


@pytest.mark.parametrize("private_head", [True, False])
def test_fedsa_keeps_b_and_usually_the_head_at_the_sites(private_head: bool) -> None:
    task, sites = adapted(), little_sites()
    method = fedsa_lora(task, LOCAL, private_head=private_head)
    state = method.init(task.first(0))
    request = method.request(state)
    assert request is not None
    reply, memory = method.site_update(request, {}, sites["site-0"])
    head = {"head.weight", "head.bias"}
    stays = {name for name in task.first(0) if name.endswith(B)} | (head if private_head else set())
    assert set(reply.mean("update").total) == task.first(0).keys() - stays
    assert set(memory["own"]) == stays
    assert all(float(leaf.abs().sum()) for leaf in memory["own"].values())


def test_the_law_of_moving_tensors() -> None:
    moving = Moving((B, A), 1)
    assert moving("x" + A)
    assert not moving("x" + B)
    assert moving("head.weight")
    assert not moving.within(lambda name: False)("head.weight")


def test_private_training_trains_the_moving_factor_only() -> None:
    task, sites = adapted(), {"a": Site("a", {"train": blobs(0, 24, (1, 8, 8))})}
    dp = DPSGD(noise=0.5, bound=1.0, unit="record", batch_size=8, lr=0.1)
    run = states(ffa_lora(task, dp, uniform=True), task.first(0), sites, 2)
    for name, leaf in run[0].params.items():
        assert torch.equal(leaf, run[-1].params[name]) == name.endswith(A)
    assert isinstance(alternating(dp, (B,)), DPSGD)

    class Other(LocalTraining):
        pass

    with pytest.raises(ValueError, match="adapters cannot alternate in Other"):
        alternating(Other(), (B,))


@pytest.mark.parametrize(
    "transforms",
    [(Clip(1.0), Gaussian(0.1)), (Int8(),), (Sign(),), (TopK(0.3),), (TopK(0.3, shared=True),), (PowerSGD(1),)],
    ids=lambda v: "+".join(type(t).__name__ for t in v),
)
@pytest.mark.parametrize("name", ["rolora", "ffa-lora"])
def test_replies_pass_through_transforms(name: str, transforms: Any) -> None:
    task, sites = adapted(), little_sites()
    method = send_through(METHODS[name](task, LOCAL, uniform=True), *transforms)
    check_method(method, task.first(0), sites, rounds=3)


def test_error_feedback_keeps_what_the_resting_factor_did_not_send() -> None:
    """What a site could not send of A reaches the server two rounds later, when A is sent again."""
    task, sites = adapted(), little_sites()
    for transform in (TopK(0.2, shared=False), Sign(), PowerSGD(1)):
        method = send_through(rolora(task, LOCAL), transform)
        state, seen = method.init(task.first(0)), list[set[str]]()
        memory: Mapping[str, Tree] = {}
        for _ in range(3):
            request = method.request(state)
            assert request is not None
            reply, memory = method.site_update(request, memory, sites["site-0"])
            state = method.server_update(state, reply, Site("server"))
            seen.append(set(memory["sent/train/0/residual"]))
        ends = [{A if name.endswith(A) else B for name in each if is_factor(name)} for each in seen]
        assert ends == [{B}, {A, B}, {A, B}], type(transform).__name__


def test_secure_sums_of_the_moving_factor_equal_plain_ones() -> None:
    pytest.importorskip("cryptography")
    from polyclinic.secure_aggregation import SecureSum

    task, sites = adapted(), little_sites()
    plain = states(rolora(task, LOCAL, uniform=True), task.first(0), sites, 2)[-1]
    method = send_through(rolora(task, LOCAL, uniform=True), SecureSum())
    summed = states(method, task.first(0), sites, 2)[-1]
    for name, leaf in plain.params.items():
        torch.testing.assert_close(summed.params[name], leaf, atol=1e-3, rtol=1e-3)
