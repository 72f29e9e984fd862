"""Ditto's laws: its global model is FedAvg's, and without attraction its personal model trains alone."""

from collections.abc import Mapping

import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.ditto import ditto
from polyclinic.testing import equal
from tests.support.known import known


def test_the_global_model_is_fedavgs(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    ours, plain = ditto(task, local), FedAvg(task, local)
    state, site = ours.init(task.first()), sites["site-0"]
    assert equal(
        ours.site_update(known(ours.request(state)), {}, site)[0], plain.site_update(plain.request(state), {}, site)[0]
    )


def test_without_attraction_the_personal_model_trains_alone(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method, site = ditto(task, local, lam=0.0), sites["site-1"]
    state, alone = method.init(task.first()), task.first()
    memory: Mapping[str, Tree] = {}
    for round in range(2):
        request = known(method.request(state))
        reply, memory = method.site_update(request, memory, site)
        alone = local.fit(task, alone, site, round, slot="personal")
        assert equal(memory["personal"], alone)
        state = method.server_update(state, reply, site)
    assert equal(method.site_model(known(method.request(state)), memory), alone)


def test_attraction_shortens_the_way_from_the_global_model(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    site, gaps = sites["site-1"], []
    for lam in (0.0, 1.0, 5.0):
        method = ditto(task, local, lam=lam)
        request = known(method.request(method.init(task.first())))
        personal = method.site_update(request, {}, site)[1]["personal"]
        trained = [name for name, _ in task.model().named_parameters()]
        gaps.append(tree.norm({n: personal[n] - request.trees["params"][n] for n in trained}))
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_one_step_by_hand(sites: dict[str, Site]) -> None:
    """v⁺ = v − η (∇F(v) + λ (v − w)), on linear regression in numpy's arithmetic."""
    from polyclinic.core.site import Site
    from polyclinic.learning.networks.network_catalog import Network
    from polyclinic.learning.tasks.regression import Regression
    from polyclinic.learning.training.local import LocalTraining
    from tests.conftest import Rows

    task = Regression(Network("mlp", (3,), 1, (("depth", 0),)))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    site = Site("a", {"train": Rows(x, torch.zeros(6, 1))})
    method = ditto(task, LocalTraining(batch_size=6, lr=0.5), lam=0.3)
    w = task.first(0)
    v = task.first(1)
    request = known(method.request(method.init(w)))
    found = method.site_update(request, {"personal": v}, site)[1]["personal"]
    X, weight, bias = x.numpy(), v["head.weight"].numpy(), v["head.bias"].numpy()
    error = X @ weight.T + bias  # all |error| < 1, where smooth L1 is error² / 2
    assert abs(error).max() < 1
    expected = weight - 0.5 * (error.T @ X / 6 + 0.3 * (weight - w["head.weight"].numpy()))
    torch.testing.assert_close(found["head.weight"], torch.from_numpy(expected))


def test_an_unseen_site_predicts_with_the_global_model(task: Classification, local: LocalTraining) -> None:
    method = ditto(task, local)
    request = known(method.request(method.init(task.first())))
    assert equal(method.site_model(request, {}), task.first())
