"""APFL between its limits: alone at α = 1, FedAvg at α = 0; and its mixing weight's step by hand."""

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.apfl import APFL
from polyclinic.testing import equal
from tests.conftest import Rows


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_leaves_is_fedavgs(
    task: Classification, local: LocalTraining, sites: dict[str, Site], alpha: float
) -> None:
    ours, plain, site = APFL(task, local, alpha=alpha), FedAvg(task, local), sites["site-2"]
    state = plain.init(task.first())
    assert equal(
        ours.site_update(ours.request(state), {}, site)[0], plain.site_update(plain.request(state), {}, site)[0]
    )


def test_wholly_own_is_training_alone(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method, site = APFL(task, local, alpha=1.0, adaptive=False), sites["site-0"]
    request = method.request(method.init(task.first()))
    memory = method.site_update(request, {}, site)[1]
    alone = local.fit(task, task.first(), site, 0)
    assert equal(method.site_model(request, memory), alone)


def test_wholly_shared_is_the_global_model(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method, site = APFL(task, local, alpha=0.0, adaptive=False), sites["site-0"]
    request = method.request(method.init(task.first()))
    memory = method.site_update(request, {}, site)[1]
    trained = {name for name, _ in task.model().named_parameters()}
    ours, theirs = method.site_model(request, memory), request.trees["params"]
    assert equal(tree.select(ours, trained.__contains__), tree.select(theirs, trained.__contains__))


def test_one_step_by_hand() -> None:
    """v⁺ = v − η α ∇f(v̄) and α⁺ = α − η ⟨v − w, ∇f(v̄)⟩ with v̄ = αv + (1 − α)w, on linear regression."""
    task = Regression(Network("mlp", (3,), 1, (("depth", 0),)))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 0.3
    method = APFL(task, LocalTraining(batch_size=6, lr=0.5), alpha=0.7)
    w, v = task.first(0), task.first(1)
    memory = {"own": v, "mixing": {"alpha": torch.tensor(0.7, dtype=torch.float64)}}
    kept = method.site_update(method.request(method.init(w)), memory, Site("a", {"train": Rows(x, torch.zeros(6, 1))}))[
        1
    ]
    X = x.double().numpy()
    W, V = (t["head.weight"].double().numpy() for t in (w, v))
    bw, bv = (t["head.bias"].double().numpy() for t in (w, v))
    error = X @ (0.7 * V + 0.3 * W).T + 0.7 * bv + 0.3 * bw
    assert abs(error).max() < 1  # where smooth L1 is error² / 2
    g, gb = error.T @ X / 6, error.mean(0)
    torch.testing.assert_close(kept["own"]["head.weight"].double().numpy(), V - 0.5 * 0.7 * g, rtol=1e-5, atol=1e-6)
    slope = ((V - W) * g).sum() + ((bv - bw) * gb).sum()
    assert float(kept["mixing"]["alpha"]) == pytest.approx(min(max(0.7 - 0.5 * slope, 0), 1), rel=1e-5)
