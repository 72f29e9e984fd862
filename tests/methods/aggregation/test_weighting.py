"""Weights from losses and distances: their limits, and one step each by hand."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.core import tree
from polyclinic.core.aggregates import merge
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.risk import full_gradient, risk, trained
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.ida import InverseDistance, ida
from polyclinic.methods.aggregation.loss_weighting import LossWeighted
from polyclinic.methods.fairness.afl import AFL, on_simplex
from polyclinic.methods.fairness.prop_ffl import PropFFL, proportional
from polyclinic.methods.fairness.qffl import QFFL
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Average, Updates
from polyclinic.testing import close
from tests.methods.robust.rules.test_rules import draw, flat, trees
from tests.support.known import known


def run(method: Any, task: Any, sites: Any, rounds: Any = 2) -> Any:
    state = method.init(task.first(0))
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


def updates(task: Any, local: Any, sites: Any) -> Any:
    """What each site's training changes, and its losses before and after, apart from any method."""
    first, found = task.first(0), {}
    for name in sorted(sites):
        end = local.fit(task, first, sites[name], 0)
        found[name] = (tree.sub(end, first), risk(task, first, sites[name], 0), risk(task, end, sites[name], 0))
    return found


def test_risk_is_the_mean_loss_of_all_examples(task: Classification, sites: dict[str, Site]) -> None:
    params, data = task.first(0), sites["site-2"].data["train"]
    model = task.model().eval()
    model.load_state_dict(params, strict=False)
    expected = torch.nn.functional.cross_entropy(model(data.x), data.y)
    assert risk(task, params, sites["site-2"], 0) == pytest.approx(float(expected.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="site-2 has no secret data"):
        risk(task, params, sites["site-2"], 0, "secret")


def test_full_gradient_is_that_of_the_mean_loss(task: Classification, sites: dict[str, Site]) -> None:
    params, data = task.first(0), sites["site-1"].data["train"]
    model = task.model().train()
    model.load_state_dict(params, strict=False)
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    found = full_gradient(task, params, sites["site-1"], 0)
    assert found.keys() == trained(task)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], known(p.grad), atol=1e-6)


@pytest.mark.parametrize(("form", "weigh"), [("exp", lambda loss: math.exp(-loss)), ("inverse", lambda loss: 1 / loss)])
def test_loss_weighting_by_hand(
    form: Literal["exp", "inverse"], weigh: Any, task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    found = updates(task, local, sites)
    w = np.array([weigh(after) for _, _, after in found.values()])
    expected = sum(x * tree.flatten(u).double() for x, (u, _, _) in zip(w / w.sum(), found.values(), strict=True))
    state = run(LossWeighted(task, local, form=form), task, sites, 1)
    moved = tree.flatten(tree.sub(state.params, task.first(0))).double()
    assert torch.allclose(moved, expected, atol=1e-5)


def test_ida_by_hand(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    x = draw(3)
    w = 1 / np.abs(x - x.mean(0)).sum(1)
    given = Updates.of(trees(x), {f"s{i:02d}": float(i + 1) for i in range(10)})
    found = InverseDistance().aggregate(given, {})
    np.testing.assert_allclose(flat(found.aggregate), (w[:, None] * x).sum(0) / w.sum(), rtol=1e-4, atol=1e-5)
    w = w * np.arange(1, 11)
    found = InverseDistance(weighted=True).aggregate(given, {})
    np.testing.assert_allclose(list(known(found.shares).values()), w / w.sum(), rtol=1e-6)
    same = InverseDistance().aggregate(Updates.of(trees(np.repeat(x[:1], 4, 0))), {})
    assert list(known(same.shares).values()) == [0.25] * 4


def test_ida_leaves_running_statistics_out_of_distances(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    state = run(ida(task, local), task, sites, 1)
    found, learned = updates(task, local, sites), trained(task)
    x = np.stack([tree.flatten(tree.select(u, learned.__contains__)).double().numpy() for u, _, _ in found.values()])
    w = 1 / np.abs(x - x.mean(0)).sum(1)
    np.testing.assert_allclose([note.share for note in state.notes.values()], w / w.sum(), rtol=1e-5)


def test_ida_with_intrac_divides_by_accuracy(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    state = run(ida(task, local, sized=True, intrac=True), task, sites, 1)
    assert sum(note.share for note in state.notes.values()) == pytest.approx(1)
    request = FedAvg(task, local).request(FedAvg(task, local).init(task.first(0)))
    method = ida(task, local, sized=True, intrac=True)
    reply, _ = method.site_update(request, {}, sites["site-0"])
    claimed = float(reply.gather("apart")["site-0"]["update/"])
    n = len(sites["site-0"].data["train"])
    assert n <= claimed <= 2 * n  # accuracy is at least that of guessing
    assert n / claimed * n == pytest.approx(round(n / claimed * n))
    from polyclinic.learning.tasks.regression import Regression

    with pytest.raises(ValueError, match="which regression does not have"):
        ida(Regression(task.network), local, intrac=True)


def test_q_0_counts_all_sites_the_same(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    assert close(
        run(QFFL(task, local, q=0.0), task, sites).params, run(FedAvg(task, local, uniform=True), task, sites).params
    )


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_q_ffl_by_hand(q: float, task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    """Li et al., Algorithm 2, in numpy."""
    found, learned = updates(task, local, sites), trained(task)
    L, top, bottom = 1 / local.lr, 0.0, 0.0
    for change, before, _ in found.values():
        delta = -L * tree.flatten(tree.select(change, learned.__contains__)).double().numpy()
        top = top + before**q * delta
        bottom += q * before ** (q - 1) * (delta**2).sum() + L * before**q
    state = run(QFFL(task, local, q=q), task, sites, 1)
    moved = tree.sub(state.params, task.first(0))
    np.testing.assert_allclose(
        tree.flatten(tree.select(moved, learned.__contains__)), -top / bottom, rtol=1e-3, atol=1e-6
    )


def test_q_ffl_heeds_the_worst_site_more(task: Classification, local: LocalTraining) -> None:
    """Two steps along two axes: the site with the higher loss pulls farther, relative to FedAvg."""
    from polyclinic.core.aggregates import Reply

    method, losses = QFFL(task, local, q=2.0), (0.2, 2.0)
    L = 1 / local.lr
    from polyclinic.core.aggregates import WeightedMean

    sent = []
    for axis, loss in enumerate(losses):
        delta = torch.zeros(2).index_fill(0, torch.tensor([axis]), 1.0)
        h = 2 * loss * L**2 + L * loss**2
        sent.append(Reply({"update": WeightedMean.of({"w": delta * L * loss**2 / h}, h)}))
    moved = merge(sent).mean("update").value["w"]
    assert moved[1] / moved[0] == pytest.approx((losses[1] / losses[0]) ** 2, rel=1e-4)
    assert method.q == 2


def project(v: np.ndarray) -> np.ndarray:
    """The nearest mixture, found by bisecting the threshold."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - low, 0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_on_simplex(values: Any) -> None:
    found = on_simplex(torch.tensor(values, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, project(np.array(values)), atol=1e-9)
    assert found.sum() == pytest.approx(1)


def test_afl_without_climbing_is_fedavg_and_climbs_where_losses_are_high(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    names = tuple(sites)
    still, even = run(AFL(task, names, local, rate=0.0), task, sites), FedAvg(task, local, uniform=True)
    assert close(still.params, run(even, task, sites).params)
    state = run(AFL(task, names, local, rate=0.5), task, sites, 1)
    losses = np.array([risk(task, task.first(0), sites[name], 0) for name in sorted(sites)])
    np.testing.assert_allclose(list(state.shares.values()), project(1 / 3 + 0.5 * losses), atol=1e-6)
    last = run(AFL(task, names, local, rate=100.0), task, sites, 3)  # everything on one site is still a mixture
    assert sum(last.shares.values()) == pytest.approx(1)


def test_afl_when_nobody_in_the_mixture_answers(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = AFL(task, tuple(sites), local)
    state = method.init(task.first(0))._replace(shares={"site-0": 1.0, "site-1": 0.0, "site-2": 0.0})
    replies = [method.site_update(method.request(state).for_site(n), {}, sites[n])[0] for n in ("site-1", "site-2")]
    after = method.server_update(state, merge(replies), Site("server"))
    assert after.params == state.params
    assert after.shares["site-1"] > 0


def test_prop_ffl_by_hand(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    losses, sizes = {"a": 1.0, "b": 2.0, "c": 0.5}, {"a": 10.0, "b": 10.0, "c": 20.0}
    found = proportional(losses, sizes, 1.1)
    raw = np.array([10 / (2.2 - 1), 10 / (2.2 - 2), 20 / (2.2 - 0.5)])
    np.testing.assert_allclose(list(found.values()), raw / raw.sum(), rtol=1e-6)
    assert list(proportional({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 3.0}).values()) == [0.25, 0.75]
    a = np.array(
        list(
            proportional(
                {n: b for n, (_, b, _) in updates(task, local, sites).items()},
                {n: float(len(s.data["train"])) for n, s in sites.items()},
            ).values()
        )
    )
    expected = sum(
        x * tree.flatten(u).double() for x, (u, _, _) in zip(a, updates(task, local, sites).values(), strict=True)
    )
    moved = tree.sub(run(PropFFL(task, local), task, sites, 1).params, task.first(0))
    assert torch.allclose(tree.flatten(moved).double(), expected, atol=1e-5)


def test_prop_ffl_with_a_far_bound_is_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    assert close(
        run(PropFFL(task, local, margin=1e9), task, sites).params, run(FedAvg(task, local), task, sites).params
    )
    with pytest.raises(ValueError, match="margin must be above 1"):
        PropFFL(task, local, margin=1.0)


def test_weighting_under_a_rule_keeps_its_weights(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """q-FFL's weights are those of its mean; the weighted average under Robust is q-FFL itself."""
    assert close(
        run(Robust(QFFL(task, local), Average()), task, sites).params, run(QFFL(task, local), task, sites).params
    )
