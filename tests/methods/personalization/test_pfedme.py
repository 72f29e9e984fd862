"""pFedMe: FedAvg in a limit, and Algorithm 1 of its paper by hand."""

import numpy as np
import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.pfedme import PFedMe
from polyclinic.testing import close, equal
from tests.conftest import Rows


def test_a_shared_model_that_jumps_to_the_personal_one_is_fedavgs(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """η = 1/λ and K = 1: θ takes one step from w, where the penalty has no slope, and w becomes θ."""
    ours, plain, site = PFedMe(task, local, lam=4.0, eta=0.25, steps=1), FedAvg(task, local), sites["site-2"]
    state = plain.init(task.first())
    assert close(
        ours.site_update(ours.request(state), {}, site)[0], plain.site_update(plain.request(state), {}, site)[0]
    )


def test_what_leaves_is_nothing_where_nothing_follows(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method, site = PFedMe(task, local, eta=0.0), sites["site-0"]
    request = method.request(method.init(task.first()))
    reply, memory = method.site_update(request, {}, site)
    trained = {name for name, _ in task.model().named_parameters()}
    assert not any(leaf.any() for name, leaf in reply.mean("update").value.items() if name in trained)
    assert tree.norm(tree.sub(memory["own"], request.trees["params"])) > 0
    assert equal(method.site_model(request, memory), memory["own"])
    assert equal(method.site_model(request, {}), request.trees["params"])


def test_two_minibatches_by_hand() -> None:
    """Algorithm 1 on linear regression: K steps of θ on f + λ/2 ‖θ − w‖², then w ← w − η λ (w − θ), twice."""
    task = Regression(Network("mlp", (3,), 1, (("depth", 0),)))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 0.3
    site = Site("a", {"train": Rows(x, torch.zeros(6, 1))})
    lam, eta, lr = 3.0, 0.1, 0.2
    method = PFedMe(task, LocalTraining(batch_size=6, epochs=2, lr=lr), lam=lam, eta=eta, steps=4)
    first = task.first(0)
    reply, memory = method.site_update(method.request(method.init(first)), {}, site)
    X = np.hstack([x.double().numpy(), np.ones((6, 1))])
    w = theta = np.append(first["head.weight"].double().numpy(), first["head.bias"].double().numpy())
    for _ in range(2):
        for _ in range(4):
            error = X @ theta
            assert abs(error).max() < 1  # where smooth L1 is error² / 2
            theta = theta - lr * (X.T @ error / 6 + lam * (theta - w))
        w = w - eta * lam * (w - theta)
    sent, own = reply.mean("update").value, memory["own"]
    before = np.append(first["head.weight"].double().numpy(), first["head.bias"].double().numpy())
    np.testing.assert_allclose(np.append(own["head.weight"], own["head.bias"]), theta, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.append(sent["head.weight"], sent["head.bias"]), w - before, rtol=1e-3, atol=1e-6)
