"""Sites on a GPU: every method runs there, repeats itself to the bit, and agrees with the processor up to rounding.

Skipped without a GPU. Messages and states are on the processor whatever the device.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.laws.test_methods import case, held_by_server

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def zeros(size: int) -> bytes:
    return bytes(size)


def on(sites: Any, device: str) -> Any:
    return {name: replace(site, device=device, entropy=zeros) for name, site in sites.items()}


def run(method: Any, task: Any, sites: Any, rounds: int = 2, engine: Any = InProcess) -> Any:
    state, here = method.init(task.first(0)), engine(method, sites, server_data=held_by_server(sites))
    try:
        for step in train(method, here, state, rounds=rounds):
            assert not step.lost
            state = step.state
        return state, dict(here.memory)
    finally:
        if hasattr(here, "close"):
            here.close()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_repeats_itself(name: str) -> None:
    method, task, sites = case(name)
    sites = on(sites, "cuda")
    state, memory = run(method, task, sites)
    assert equal((state, memory), run(method, task, sites))
    trial = method.evaluation_request(state)
    for site in sites:
        model = method.site_model(trial.for_site(site), memory[site])
        assert all(leaf.device.type == "cpu" for leaf in model.values())


@pytest.mark.parametrize(
    "local", [LocalTraining(batch_size=8, momentum=0.9), DPSGD(batch_size=8, noise=0.5, unit="record")]
)
def test_training_agrees_with_the_processor_up_to_rounding(local: LocalTraining) -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("norm", "group"))))
    ends = [run(FedAvg(task, local), task, on(little_sites(), device))[0].params for device in ("cpu", "cuda")]
    moved = tree.norm(tree.sub(ends[0], task.first(0)))
    assert tree.norm(tree.sub(*ends)) < 0.01 * moved


def test_half_precision_learns_and_keeps_single_precision() -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4),)))
    sites = on(little_sites(), "cuda")
    ends = [run(FedAvg(task, LocalTraining(batch_size=8, amp=amp)), task, sites)[0].params for amp in (False, True)]
    moved = tree.norm(tree.sub(ends[0], task.first(0)))
    assert not equal(*ends)
    assert tree.norm(tree.sub(*ends)) < 0.2 * moved
    assert all(leaf.dtype == torch.float32 for leaf in ends[1].values())


def test_worker_processes_on_a_gpu_give_the_same_bits() -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("dropout", 0.2))))
    method, sites = FedAvg(task, LocalTraining(batch_size=8)), on(little_sites(), "cuda")
    assert equal(run(method, task, sites), run(method, task, sites, engine=Workers))


def test_what_a_model_says_is_on_the_processor() -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4),)))
    said = outputs(task, task.first(0), little_sites()["site-0"].data["test"], "cuda")
    assert {leaf.device.type for leaf in said.values()} == {"cpu"}
