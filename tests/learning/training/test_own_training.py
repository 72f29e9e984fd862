"""A training loop of one's own as the local training of methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyclinic as pc
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan, local_training
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.own_training import METHODS, Items, OwnTraining
from polyclinic.methods import registry
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.testing import check_method, equal
from tests.conftest import blobs, little_sites

NET = Network("cnn", (1, 8, 8), 2, (("width", 2), ("depth", 1)))
TASK = Classification(NET)


def loop(model: nn.Module, data: Any, round: int, rng: torch.Generator) -> None:
    """An ordinary loop of PyTorch: one pass with a loader, which shuffles by ``rng``."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in torch.utils.data.DataLoader(data, 8, shuffle=True, generator=rng):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def whole(model: nn.Module, data: Any, round: int, rng: torch.Generator) -> None:
    """One step on all examples."""
    x, y = (torch.stack(items) for items in zip(*(data[i] for i in range(len(data))), strict=True))
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), 0.05).step()


def plan(method: str, **training: Any) -> Plan:
    options = {"width": 2, "depth": 1}
    return Plan(
        "classification",
        "cnn",
        (1, 8, 8),
        2,
        method,
        ("site-0", "site-1", "site-2"),
        3,
        network_options=options,
        training=training,
    )


@pytest.mark.parametrize(
    "name", ["fedavg", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "fedavg")]
)
def test_a_method_with_a_loop_of_ones_own_keeps_its_promises(name: str) -> None:
    assert registry.entry(name)
    method = plan(name, loop=pc.training(loop)).build_method()
    check_method(method.inner, TASK.first(0), little_sites())


def test_one_step_on_all_examples_is_that_of_the_usual_training() -> None:
    sites, params = little_sites(), TASK.first(0)
    found = []
    for training in ({"loop": pc.training(whole)}, {"batch_size": 100, "lr": 0.05}):
        method = plan("fedavg", **training).build_method()
        for step in train(method, InProcess(method, sites), method.init(params), rounds=2):
            assert not step.lost, step.lost
            state = step.state
        found.append(state.params)
    assert not equal(found[0], params)
    for name, leaf in found[0].items():
        torch.testing.assert_close(leaf, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fednova", "fedmd", "per-fedavg"])
def test_methods_that_change_the_steps_are_refused_when_they_are_built(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} changes or repeats the steps of training, .* choose local, pooled"):
        plan(name, loop=pc.training(loop)).build_method()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.private trains with DP-SGD, and not by training.loop"):
        local_training({"loop": "x", "private": {"noise": 1.0}})
    own = OwnTraining(loop=pc.training(loop))
    with pytest.raises(ConfigError, match="does not offer gradient_hook, which the method needs"):
        own.fit(TASK, TASK.first(0), little_sites()["site-0"], 0, gradient_hook=lambda name, grad: grad)
    with pytest.raises(BadStudy, match='no installed package provides a training called "acme-loop"'):
        parse(
            'name = "x"\nrounds = 1\n[data]\nuse = "heart"\n[training]\nloop = "acme-loop"\n[[methods]]\nname = "fedavg"\n'
        )


def test_the_data_set_of_a_loop_is_one_of_pytorch() -> None:
    items = Items(blobs(0, 5, (4,)))
    assert len(items) == 5
    assert torch.equal(items[-1][0], items[4][0])
    with pytest.raises(IndexError):
        _ = items[5]


def test_a_study_of_a_program_trains_by_its_loop(tmp_path: Path) -> None:
    sites = {k: torch.utils.data.TensorDataset(v.data["train"].x, v.data["train"].y) for k, v in little_sites().items()}
    result = pc.experiment(
        "own-loop",
        sites,
        patients=None,
        network="mlp",
        methods=["fedavg"],
        training={"loop": pc.training(loop)},
        rounds=1,
        out=tmp_path,
    )
    assert len(result.compare()) == 1
