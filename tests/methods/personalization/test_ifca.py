"""IFCA finds planted clusters, and with one cluster it is FedAvg."""

from typing import Any

import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.ifca import IFCA
from polyclinic.testing import close
from tests.conftest import Rows


def run(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=rounds):
        state = step.state
    return state, federation.memory


def test_one_cluster_is_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    ours, _ = run(IFCA(task, local, clusters=1), task.first(), sites, 2)
    plain, _ = run(FedAvg(task, local), task.first(), sites, 2)
    assert close(ours.params, plain.params)


def test_sites_that_disagree_part() -> None:
    """Two hospitals label by one rule and two by its opposite; no single model serves both."""
    task = Classification(Network("mlp", (4,), 2))
    rng = torch.Generator().manual_seed(0)
    sites = {}
    for k in range(4):
        x = torch.randn(80, 4, generator=rng)
        y = ((x[:, 0] > 0) ^ (k >= 2)).long()
        sites[f"site-{k}"] = Site(f"site-{k}", {"train": Rows(x, y)})
    state, memory = run(IFCA(task, LocalTraining(lr=0.3)), task.first(), sites, 10)
    index = [int(memory[f"site-{k}"]["cluster"]["index"]) for k in range(4)]
    assert index[0] == index[1] != index[2] == index[3]
    assert sorted(state.weights.tolist()) == [160, 160]


def test_what_is_sent_names_no_cluster(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    """Every site sends the same names and shapes, whichever cluster it is in."""
    method = IFCA(task, local, clusters=3)
    request = method.request(method.init(task.first()))
    forms = {
        tuple((n, t.shape) for n, t in method.site_update(request, {}, s)[0].mean("update").total.items())
        for s in sites.values()
    }
    assert len(forms) == 1
