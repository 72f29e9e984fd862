"""The other ways to aggregate: each against a computation by hand, and in the limit in which it is FedAvg."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean, merge
from polyclinic.core.rounds import train, train_async
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.risk import risk, trained
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.adaptive_weights import AdaptiveWeights
from polyclinic.methods.aggregation.auto_fedavg import AutoFedAvg, climbed
from polyclinic.methods.aggregation.dynamic_fusion import DynamicFusion
from polyclinic.methods.aggregation.fedbuff import FedBuff
from polyclinic.methods.aggregation.fedce import FedCE, cosines
from polyclinic.methods.aggregation.fedgma import FedGMA
from polyclinic.methods.fairness.fedsld import FedSLD, balanced
from polyclinic.methods.fairness.guided_gradients import Guided, guided_gradient
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.rules.aggregation_rule import Updates
from polyclinic.testing import close, equal
from tests.conftest import Rows, little_sites
from tests.methods.aggregation.test_weighting import run, updates
from tests.methods.robust.rules.test_rules import draw, flat, trees
from tests.support.known import known


def moved(state: Any, task: Any) -> np.ndarray:
    return tree.flatten(tree.sub(state.params, task.first(0))).double().numpy()


def sizes(sites: Any) -> np.ndarray:
    return np.array([float(len(sites[name].data["train"])) for name in sorted(sites)])


def changes(task: Any, local: Any, sites: Any) -> np.ndarray:
    return np.stack([tree.flatten(u).double().numpy() for u, _, _ in updates(task, local, sites).values()])


def test_fedgma_by_hand(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    x, p = changes(task, local, sites), sizes(sites) / sizes(sites).sum()
    agreement = np.abs((p[:, None] * np.sign(x)).sum(0))
    learned = np.concatenate([np.full(leaf.numel(), n in trained(task)) for n, leaf in task.first(0).items()])
    mask = np.where((agreement >= 0.8) | ~learned, 1, agreement)
    found = moved(run(FedGMA(task, local, threshold=0.8), task, sites, 1), task)
    np.testing.assert_allclose(found, mask * (p[:, None] * x).sum(0), rtol=1e-3, atol=1e-5)
    assert (mask < 1).any()


def test_fedgma_without_a_threshold_is_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    assert equal(
        run(FedGMA(task, local, threshold=0.0), task, sites).params, run(FedAvg(task, local), task, sites).params
    )


@pytest.mark.parametrize(
    ("staleness", "values"),
    [
        ("constant", [1, 1, 1, 1]),
        ("polynomial", [1, 2**-0.5, 0.5, 11**-0.5]),
        ("hinge", [1, 1, 1, 1 / (0.5 * 6 + 1)]),
    ],
)
def test_what_old_answers_count(
    task: Classification, staleness: Literal["constant", "polynomial", "hinge"], values: Any
) -> None:
    method = FedBuff(task, staleness=staleness)
    assert [method.discount(age) for age in (0, 1, 3, 10)] == pytest.approx(values)


def test_fedbuff_divides_by_the_buffer_not_by_the_discounts(task: Classification) -> None:
    method = FedBuff(task, buffer=2, lr=3.0)
    ones = {name: torch.ones_like(leaf) for name, leaf in task.first(0).items()}
    reply = Reply({"update": WeightedMean.of(ones)}) + Reply({"update": WeightedMean.of(ones)}) * method.discount(3)
    state = method.server_update(method.init(task.first(0)), reply, Site("server"))
    np.testing.assert_allclose(moved(state, task), 3 * (1 + 0.5) / 2, rtol=1e-5)


def test_fedbuff_in_lock_step_is_fedavg_and_runs_without(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    expected = run(FedAvg(task, local, uniform=True), task, sites).params
    assert close(run(FedBuff(task, local), task, sites).params, expected)
    assert close(run(FedBuff(task, local, buffer=3), task, sites).params, expected)
    method = FedBuff(task, local, buffer=2)
    state, ages = method.init(task.first(0)), []
    for step in train_async(method, InProcess(method, sites), state, updates=6, buffer=2, discount=method.discount):
        ages.append(step.reply.mean("update").weight)
        state = step.state
    assert state.round == 6
    assert min(ages) < 2  # some answers were old
    assert tree.finite(state.params)


def test_dynamic_fusion_takes_only_what_helped(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    found, params = [], task.first(0)
    for name in sorted(sites):
        end = local.fit(task, params, sites[name], 0)
        gain = risk(task, params, sites[name], 0, "val") - risk(task, end, sites[name], 0, "val")
        found.append((gain, tree.flatten(tree.sub(end, params)).double().numpy(), len(sites[name].data["train"])))
    for margin in (-1e9, sorted(gain for gain, _, _ in found)[1] - 1e-6):
        chosen = [(x, n) for gain, x, n in found if gain > margin]
        expected = sum(n * x for x, n in chosen) / sum(n for _, n in chosen)
        np.testing.assert_allclose(
            moved(run(DynamicFusion(task, local, margin), task, sites, 1), task), expected, rtol=1e-3, atol=1e-5
        )
    state = run(DynamicFusion(task, local, 1e9), task, sites, 2)
    assert state.round == 2
    assert equal(state.params, task.first(0))


def test_dynamic_fusion_saves_what_it_does_not_send(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = DynamicFusion(task, local, 1e9)
    up = [
        sum(s.bytes_up.values()) for s in train(method, InProcess(method, sites), method.init(task.first(0)), rounds=2)
    ]
    assert max(up) == 3 * 4  # one number a site


def test_guided_by_hand(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    x = draw(30)
    x[3] = -3 * x[3]
    mean = x.mean(0)
    a = np.maximum(0, x @ mean / np.linalg.norm(x, axis=1) / np.linalg.norm(mean))
    found = Guided().aggregate(Updates.of(trees(x)), {})
    np.testing.assert_allclose(flat(found.aggregate), (a[:, None] * x).sum(0) / a.sum(), rtol=1e-4, atol=1e-5)
    assert known(found.shares)["s03"] == 0
    nothing = Guided().aggregate(Updates.of(trees(np.stack([x[0], -x[0]]))), {})
    assert list(known(nothing.shares).values()) == [0.5, 0.5]
    assert run(guided_gradient(task, local), task, sites).inner.round == 2


def test_fedsld_weighs_a_minibatch_to_look_like_all() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, y, prior = (
        torch.randn(10, 3, generator=rng),
        torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2]),
        torch.tensor([0.2, 0.3, 0.5]),
    )
    by_hand = 0.0
    for z, c in zip(logits.double(), y, strict=True):
        share = float((y == c).sum()) / 10
        by_hand += float(prior[c]) / share * float(z.logsumexp(0) - z[c]) / 10
    assert float(balanced(logits, y, prior)) == pytest.approx(by_hand, rel=1e-6)
    same = torch.bincount(y) / 10  # a minibatch that is like the federation already
    assert float(balanced(logits, y, same)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-6
    )


def test_fedsld_counts_all_classes_once(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = FedSLD(task, local)
    jobs = [step.request.job for step in train(method, InProcess(method, sites), method.init(task.first(0)), rounds=2)]
    assert jobs == ["count", "train", "train"]
    labels = torch.cat([site.data["train"].y for site in sites.values()])
    assert torch.equal(run(method, task, sites, 1).counts["counts"], torch.bincount(labels).double())


def test_fedsld_where_every_minibatch_is_like_the_federation_is_fedavg(task: Classification) -> None:
    """Whole-batch training at sites with the same shares of classes."""
    sites, local = little_sites(), LocalTraining(epochs=3, batch_size=100, lr=0.1)
    for k, site in enumerate(sites.values()):
        data = site.data["train"]
        y = torch.arange(len(data.y)) % 2
        even = 2 * (len(y) // 2)
        site.data["train"] = Rows(data.x[:even], y[:even])  # type: ignore[index]
        assert k < 3
    assert close(run(FedSLD(task, local), task, sites).params, run(FedAvg(task, local), task, sites).params)


def test_cosines_with_the_others() -> None:
    x, w = draw(31), np.random.default_rng(0).dirichlet(np.ones(10))
    mean = (w[:, None] * x).sum(0)
    rest = [mean - w[i] * x[i] for i in range(10)]
    expected = [x[i] @ rest[i] / np.linalg.norm(x[i]) / np.linalg.norm(rest[i]) for i in range(10)]
    np.testing.assert_allclose(cosines(Updates.of(trees(x)).gram, torch.from_numpy(w)), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["times", "plus"])
def test_fedce_by_hand(
    mode: Literal["times", "plus"], task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    found = updates(task, local, sites)
    x = changes(task, local, sites)
    learned = np.concatenate([np.full(leaf.numel(), n in trained(task)) for n, leaf in task.first(0).items()])
    g = x[:, learned]
    cos = [np.dot(g[i], r) / np.linalg.norm(g[i]) / np.linalg.norm(r) for i in range(3) for r in [g.sum(0) - g[i]]]
    unlike = (1 - np.array(cos)) / (1 - np.array(cos)).sum()
    errors = np.array([before for _, before, _ in found.values()])
    errors = errors / errors.sum()
    w = unlike * errors if mode == "times" else unlike + errors
    w = w / w.sum()
    state = run(FedCE(task, local, mode), task, sites, 1)
    np.testing.assert_allclose(list(state.weights.values()), w, rtol=1e-4)
    np.testing.assert_allclose(moved(state, task), (w[:, None] * x).sum(0), rtol=1e-3, atol=1e-5)
    others = w[1:] / w[1:].sum()
    gone = tree.flatten(tree.sub(state.without["site-0"], task.first(0))).double().numpy()
    np.testing.assert_allclose(gone, (others[:, None] * x[1:]).sum(0), rtol=1e-3, atol=1e-5)


def test_fedce_remembers_and_refuses(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    state = run(FedCE(task, local), task, sites, 3)
    assert state.seen == dict.fromkeys(sites, 3)
    assert sum(state.weights.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match='"times" or "plus", not "minus"'):
        FedCE(task, local, mode="minus")  # type: ignore[arg-type]
    alone = {"site-0": sites["site-0"]}
    assert close(run(FedCE(task, local), task, alone).params, run(FedAvg(task, local), task, alone).params)


def test_auto_fedavg_goes_down_the_gradient_of_the_mixture(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """What the server works out from one gradient is what automatic differentiation through the mixture gives."""
    first, net = task.first(0), task.model()
    found = {name: u for name, (u, _, _) in updates(task, local, sites).items()}
    beta = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    alpha = beta.double().softmax(0)
    mixed = {n: first[n] + sum(a * u[n] for a, u in zip(alpha, found.values(), strict=True)) for n in first}
    x = torch.cat([sites[name].data["val"].x for name in sorted(sites)])
    y = torch.cat([sites[name].data["val"].y for name in sorted(sites)])
    learned = {n: mixed[n].float() for n in trained(task)}
    statistics = {n: mixed[n].detach().float() for n in first if n not in trained(task)}
    loss = torch.nn.functional.cross_entropy(torch.func.functional_call(net.eval(), {**learned, **statistics}, x), y)
    (slope,) = torch.autograd.grad(loss, beta, retain_graph=True)
    direct = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
    after = climbed(found, dict(zip(found, beta.tolist(), strict=True)), direct, 2.0)
    np.testing.assert_allclose(list(after.values()), (beta - 2.0 * slope).detach(), rtol=1e-4, atol=1e-6)


def test_auto_fedavg_without_steps_is_fedavg_and_with_them_validates_better(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    still = run(AutoFedAvg(task, local, steps=0), task, sites)
    assert close(still.params, run(FedAvg(task, local), task, sites).params)
    n = sizes(sites)
    np.testing.assert_allclose(list(still.alpha.values()), n / n.sum(), rtol=1e-6)
    learned = run(AutoFedAvg(task, local, rate=20.0, steps=5), task, sites, 1)
    before = run(AutoFedAvg(task, local, steps=0), task, sites, 1)

    def validation(params: Any) -> float:
        return sum(risk(task, params, site, 0, "val") for site in sites.values())

    assert validation(learned.params) < validation(before.params)
    rare = AutoFedAvg(task, local, interval=2)
    jobs = [step.request.job for step in train(rare, InProcess(rare, sites), rare.init(task.first(0)), rounds=3)]
    assert jobs == ["train", "weigh", "weigh", "train", "train", "weigh", "weigh"]


def test_auto_fedavg_hears_only_sites_that_validate(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    blind = {n: Site(n, {r: d for r, d in s.data.items() if r != "val" or n == "site-1"}) for n, s in sites.items()}
    state = run(AutoFedAvg(task, local, rate=5.0), task, blind, 1)
    assert sum(state.alpha.values()) == pytest.approx(1)
    none = {n: Site(n, {"train": s.data["train"]}) for n, s in sites.items()}
    assert close(run(AutoFedAvg(task, local), task, none).params, run(FedAvg(task, local), task, none).params)


def test_fedmix_weights_by_hand(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    x, n = changes(task, local, sites), sizes(sites)
    loss = np.array([after for _, _, after in updates(task, local, sites).values()]) ** 1.5
    w = n / n.sum() + 10 * loss / loss.sum()
    np.testing.assert_allclose(
        moved(run(AdaptiveWeights(task, local), task, sites, 1), task),
        (w[:, None] * x).sum(0) / w.sum(),
        rtol=1e-3,
        atol=1e-5,
    )
    assert w.sum() == pytest.approx(11)
    method, sums = AdaptiveWeights(task, local, 3.0, 0.5), {"size": torch.tensor(40.0), "loss": torch.tensor(8.0)}
    assert method.weight(method.amounts(10, [9.0, 4.0]), sums) == pytest.approx(10 / 40 + 3 * 2 / 8)
    none = {"size": torch.tensor(1.0), "loss": torch.tensor(0.0)}
    assert math.isfinite(method.weight(method.amounts(1, [0.0]), none))


def test_fedmix_weights_without_the_loss_are_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    assert close(
        run(AdaptiveWeights(task, local, lam=0.0), task, sites).params, run(FedAvg(task, local), task, sites).params
    )


def test_a_site_that_was_lost_in_between_is_named(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = AdaptiveWeights(task, local)
    state = method.init(task.first(0))
    replies = [method.site_update(method.request(state), {}, sites[n])[0] for n in ("site-0", "site-1")]
    state = method.server_update(state, merge(replies), Site("server"))
    reply, memory = method.site_update(method.request(state), {}, sites["site-2"])
    assert reply.parts == {}
    assert memory == {}
