"""Whatever a method trains, every site can be scored with it: those that took part, and one that never did."""

import pytest

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.registry import Setting, build
from tests.conftest import Rows, blobs, little_sites

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
LOCAL = LocalTraining(batch_size=8, lr=0.05)
SHIFT = [
    "ditto",
    "pfedme",
    "apfl",
    "fedrep",
    "moon",
    "ifca",
    "feddg",
    "fedsm",
    "iop-fl",
    "fednorm",
    "fedmri",
    "site-graph",
    "fed-align",
    "fed-moe",
    "fedharmony",
    "fl-mrcm",
    "harmofl",
    "zscore",
    "combat",
    "vafl",
    "stain-norm",
    "fedreplay",
    "histogram-match",
]
FEW_STEPS = {
    "vafl": {"epochs": 1},
    "stain-norm": {"epochs": 1, "exchanges": 2},
    "fedreplay": {"epochs": 1, "examples": 32},
}


QUICK = {"ditto", "ifca", "fedsm", "fed-moe", "harmofl", "combat", "histogram-match"}
"""One of each way to serve a site; the others are slow tests."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHIFT])
def test_inside_and_outside(name: str) -> None:
    sites = little_sites()
    method = Evaluated(build(name, Setting(TASK, LOCAL, tuple(sites), 3), FEW_STEPS.get(name)), TASK)
    federation, state = InProcess(method, sites), method.init(TASK.first())
    for step in train(method, federation, state, rounds=2):
        assert not step.lost
        state = step.state
    everyone = {**sites, "elsewhere": Site("elsewhere", {"val": blobs(9, 10, (1, 8, 8))})}
    served = InProcess(method, everyone, federation.memory)
    found = evaluate(method, served, state, list(everyone))
    assert set(found) == set(everyone)
    assert all(0 <= float(scores["accuracy"]) <= 1 for scores in found.values())


@pytest.mark.parametrize(
    "name", ["ditto", "pfedme", "apfl", "fedrep", "moon", "ifca", "fedsm", "fedharmony", "fed-moe", "combat", "zscore"]
)
def test_regression_on_tables(name: str) -> None:
    """What a brain-age study needs: numbers as targets, columns as inputs."""
    rows = {f"site-{k}": blobs(k, 20, (6,)) for k in range(3)}
    sites = {n: Site(n, {r: Rows(b.x, b.x[:, :1] * 10 + 50) for r in ("train", "val")}) for n, b in rows.items()}
    task = Regression(Network("mlp", (6,), 1), 50.0, 10.0)
    method = Evaluated(build(name, Setting(task, LOCAL, tuple(sites), 3)), task)
    assert name in METHODS
    federation, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, federation, state, rounds=2):
        assert not step.lost
        state = step.state
    assert all(float(s["mae"]) < 100 for s in evaluate(method, federation, state, list(sites)).values())
