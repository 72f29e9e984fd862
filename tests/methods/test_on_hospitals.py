"""What the laws promise, on real patients: heart disease at four hospitals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.attacks.adversaries import SignFlip
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import concat
from polyclinic.data.federation import DataSpec, federate
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.krum import MultiKrum
from polyclinic.methods.topology.gossip import Gossip
from polyclinic.methods.topology.split_learning import Split
from polyclinic.methods.topology.swarm import Swarm
from polyclinic.testing import equal

LOCAL = LocalTraining(epochs=2, batch_size=16, lr=0.05)


@pytest.fixture(scope="module")
def heart(real_data: Path) -> Any:
    """The hospitals as sites, a task for them, and all their test patients."""
    data = federate(
        DataSpec.model_validate(
            {
                "kind": "table",
                "path": str(real_data / "uci_heart_4hospitals" / "heart_4sites.csv"),
                "label": "num",
                "threshold": 0.0,
                "missing": ("-9",),
                "zero_is_missing": ("chol", "trestbps"),
                "categories": ("cp", "restecg", "slope", "thal"),
            }
        )
    )
    sites = {name: Site(name, dict(roles)) for name, roles in data.sites.items()}
    task = Classification(Network("mlp", data.shape, 2, (("depth", 1), ("width", 16))))
    return sites, task, concat([roles["test"] for roles in data.sites.values()])


def end(method: Any, sites: Any, task: Any, rounds: Any = 12) -> Any:
    state = method.init(task.first(0))
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state.params


@pytest.mark.slow
def test_without_a_server_sites_learn_what_they_learn_with_one(heart: Any) -> None:
    sites, task, test = heart
    expected = end(FedAvg(task, LOCAL), sites, task)
    assert equal(end(Swarm(task, LOCAL), sites, task), expected)
    auc = task.summary(outputs(task, expected, test))["auc"]
    for method in (Gossip(task, LOCAL), Split(task, tuple(sites), LOCAL)):
        assert task.summary(outputs(task, end(method, sites, task), test))["auc"] > auc - 0.03


@pytest.mark.slow
def test_multi_krum_withstands_what_breaks_the_mean(heart: Any) -> None:
    whole, task, test = heart
    sites = {}
    for name, site in whole.items():
        for k, mine in enumerate(torch.arange(len(site.data["train"])).chunk(3)):
            sites[f"{name}-{k}"] = Site(f"{name}-{k}", {"train": site.data["train"].subset(mine)})
    attackers = ("cleveland-0", "va-1")

    def auc(method: Any) -> float:
        return task.summary(outputs(task, end(method, sites, task, 8), test))["auc"]

    honest, plain = auc(FedAvg(task, LOCAL, uniform=True)), FedAvg(task, LOCAL, uniform=True)
    assert auc(Poisoned(plain, attackers, SignFlip(6.0))) < honest - 0.1
    assert auc(Poisoned(Robust(plain, MultiKrum(0.2)), attackers, SignFlip(6.0))) > honest - 0.04
