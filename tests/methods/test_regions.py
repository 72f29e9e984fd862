"""Methods on overlapping regions: those that take outputs for exclusive classes are refused, and no other does so."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import evaluate
from polyclinic.methods.catalog import METHODS
from tests.learning.tasks.test_regions import BRATS, TASK, nested

ROLES = ("train", "val", "test", "unlabeled", "public")
SITES = tuple(f"site-{k}" for k in range(3))
OTHERS = {"fedmae"}
"""Methods that cannot train this network."""
SUPPORTED = [
    name
    for name, entry in METHODS.items()
    if (not entry.tasks or "segmentation" in entry.tasks) and not entry.network and not entry.pooled
]
SAMPLE = ("fedavg", "fedbn", "ditto", "zscore", "fednorm")


def plan(name: str, **task: Any) -> Plan:
    options = dict(TASK.network.options)
    inputs = TASK.network.inputs
    training = {"epochs": 1, "batch_size": 4, "lr": 0.01}
    given: dict[str, Any] = {"task": {"regions": BRATS, **task}, "network_options": options, "training": training}
    return Plan("segmentation", "residual-unet", inputs, 3, name, SITES, 1, **given)


@pytest.fixture
def no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes a softmax or a maximum over the outputs for regions."""

    def guarded(of: Any) -> Any:
        def call(x: Any, *args: Any, **named: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] == 3:
                raise AssertionError("regions were taken for classes")
            return of(x, *args, **named)

        return call

    for owner in (torch, torch.Tensor, functional):
        for name in ("softmax", "log_softmax", "argmax", "cross_entropy"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
        for name in SUPPORTED
        if not METHODS[name].exclusive and name not in OTHERS
    ],
)
def test_methods_train_and_score_regions(name: str, no_classes: None) -> None:
    sites = {s: Site(s, {r: nested(10 * k + i, 4) for i, r in enumerate(ROLES)}) for k, s in enumerate(SITES)}
    method = plan(name).build_method()
    engine = InProcess(method, sites, {}, {}, 0)
    state = method.init(method.task.first(0))
    for step in train(method, engine, state, rounds=1):
        state = step.state
    if method.evaluation_request(state).trees:
        found = evaluate(method, engine, state, SITES, "predict/test")
        assert all(outputs["dice"].shape == (4, 3) for outputs in found.values())


def test_methods_of_exclusive_classes_are_refused() -> None:
    refused = [name for name in SUPPORTED if METHODS[name].exclusive]
    assert {"lc-fed", "fedperl", "teacher-student", "mutual"} <= set(refused)
    for name in refused:
        with pytest.raises(ConfigError, match=rf"{name} takes the network's outputs for classes that exclude"):
            plan(name).build_method()


def test_a_plan_of_regions_survives_its_file() -> None:
    made = plan("fedavg")
    again = Plan.from_json(made.to_json())
    assert again.hash == made.hash
    assert again.build_task() == made.build_task()
    task = again.build_task()
    assert isinstance(task, Segmentation)
    assert task.regions == BRATS
