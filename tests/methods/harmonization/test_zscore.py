"""The z-score over all sites is that of pooled data; within each, no site's offset is left."""

from typing import Any

import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.zscore import zscore
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.conftest import Rows, blobs


def run(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=rounds):
        state = step.state
    return state, federation.memory


@pytest.mark.parametrize("by_site", [False, True])
def test_what_the_network_sees(
    task: Classification, local: LocalTraining, sites: dict[str, Site], by_site: bool
) -> None:
    method = zscore(task, local, by_site=by_site)
    state, memory = run(method, task.first(), sites, 1)
    seen = []
    for name, site in sites.items():
        model = cached_model(method.prediction_task, method.site_model(method.evaluation_request(state), memory[name]))
        seen.append(model.get_submodule("front")(site.data["train"].x))
        if by_site:
            assert abs(float(seen[-1].mean())) < 1e-5
            assert float(seen[-1].std(correction=0)) == pytest.approx(1, abs=1e-4)
    everything = torch.cat(seen)
    assert abs(float(everything.mean())) < 1e-5
    assert float(everything.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_standardized_data_are_left_alone(local: LocalTraining) -> None:
    """On data that have mean 0 and deviation 1 it is FedAvg."""
    rng, sites = torch.Generator().manual_seed(0), {}
    for k in range(2):
        x = torch.randn(30, 4, generator=rng, dtype=torch.float64)
        x = (x - x.mean(0)) / x.std(0, correction=0)
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x.float(), (x[:, 0] > 0).long())})
    task = Classification(Network("mlp", (4,), 2))
    state, _ = run(zscore(task, local), task.first(), sites, 2)
    plain, _ = run(FedAvg(task, local), task.first(), sites, 2)
    assert close({k: v for k, v in state.params.items() if not k.startswith("front.")}, plain.params)


def test_a_constant_column_is_only_centered(local: LocalTraining) -> None:
    x = torch.cat([torch.randn(9, 1), torch.full((9, 1), 7.0)], 1)
    task = Classification(Network("mlp", (2,), 2))
    method = zscore(task, local)
    state, _ = run(method, task.first(), {"a": Site("a", {"train": Rows(x, torch.arange(9) % 2)})}, 1)
    assert float(state.params["front.scale"][1]) == 1
    assert float(state.params["front.shift"][1]) == -7


def test_an_unseen_site_is_served(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    for by_site in (False, True):
        method = Evaluated(zscore(task, local, by_site=by_site), task)
        state, _ = run(method, task.first(), sites, 1)
        everyone = {**sites, "elsewhere": Site("elsewhere", {"val": blobs(5, 9, (1, 8, 8))})}
        assert set(evaluate(method, InProcess(method, everyone), state, list(everyone))) == set(everyone)
