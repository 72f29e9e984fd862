"""Fed-MoE's mixture by hand, and what stays at a site."""

from typing import Any

import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.domain_adaptation.fedmoe import FedMoE
from tests.conftest import Rows


def test_the_mixture_by_hand(task: Classification) -> None:
    method = FedMoE(task, LocalTraining())
    shared, own = task.first(0), task.first(1)
    gate = {"gate.weight": torch.tensor([[0.5, -1.0]]), "gate.bias": torch.tensor([0.2])}
    model = cached_model(
        method.prediction_task, {**tree.prefixed("shared", shared), **tree.prefixed("own", own), **gate}
    ).eval()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([x.flatten(1).mean(1), x.flatten(1).std(1)], 1)
    a = (seen @ gate["gate.weight"].T + gate["gate.bias"]).sigmoid()
    expected = a * cached_model(task, shared).eval()(x) + (1 - a) * cached_model(task, own).eval()(x)
    torch.testing.assert_close(model(x), expected)


def test_a_site_never_seen_predicts_with_the_federated_expert(task: Classification, local: LocalTraining) -> None:
    method = FedMoE(task, local)
    model = cached_model(
        method.prediction_task, method.site_model(method.request(method.init(task.first())), {})
    ).eval()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x), cached_model(task, task.first()).eval()(x))


def test_the_private_expert_and_the_gate_stay(task: Any, local: Any, sites: dict[str, Site]) -> None:
    method = FedMoE(task, local)
    reply, memory = method.site_update(method.request(method.init(task.first())), {}, sites["site-0"])
    assert reply.mean("update").total.keys() == task.first().keys()
    assert {name.partition(".")[0] for name in memory["own"]} == {"own", "gate"}
    assert any(memory["own"]["gate.weight"].flatten() != 0)


def test_a_site_that_disagrees_leans_on_its_own_model() -> None:
    """Three hospitals label by one rule, one by its opposite: averaging fails it, its private expert does not."""
    task = Classification(Network("mlp", (4,), 2))
    rng, sites = torch.Generator().manual_seed(0), {}
    for k in range(4):
        x = torch.randn(160, 4, generator=rng)
        y = ((x[:, 0] > 0) ^ (k == 3)).long()
        sites[f"site-{k}"] = Site(f"site-{k}", {"train": Rows(x[:120], y[:120]), "val": Rows(x[120:], y[120:])})
    method = Evaluated(FedMoE(task, LocalTraining(lr=0.3)), task)
    federation, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, federation, state, rounds=10):
        state = step.state
    scores = evaluate(method, federation, state, list(sites))
    assert float(scores["site-3"]["accuracy"]) > 0.8
