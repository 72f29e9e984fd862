"""What the table says a method is for, it can do: every kind of task, two rounds and a prediction."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import MultiLabel
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.survival import Survival
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.registry import Setting, build
from tests.conftest import Rows, little_sites, segmentation_sites
from tests.support.few_labels import run

MINE = [
    *("fedmic", "mutual", "fedmoco", "fedmae", "fcl", "fedsemi", "fedperl", "fedvss"),
    *("private-heads", "fedmix", "teacher-student", "fedmd", "feddf", "fedni", "histofl"),
    *("fine-tuned", "fedbabu", "per-fedavg", "fedala", "fedsoup", "fedsam", "fedlesam", "fedspeed", "fedcm", "fedexp"),
    *("feddecorr", "fedrdn", "fedcostwavg", "fedpidavg", "fedawa", "fedlws", "feddg-ga", "fedism"),
    *("fedpid", "adain", "fda", "feda3i", "fedmlp"),
]
SMALL = (("depth", 2), ("width", 4))
TASKS = {
    "segmentation": Segmentation(Network("unet", (1, 16, 16), 2, (("norm", "batch"), ("width", 2)))),
    "multilabel": MultiLabel(Network("cnn", (1, 8, 8), 3, SMALL)),
    "regression": Regression(Network("cnn", (1, 8, 8), 1, SMALL)),
    "survival": Survival(Network("cnn", (1, 8, 8), 3, SMALL), (1.0, 2.0, 3.0)),
}


def sites_for(kind: Any) -> Any:
    if kind == "segmentation":
        return segmentation_sites(2)
    makers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "multilabel": lambda y: torch.stack([y == 0, y == 1, torch.ones_like(y)], 1).float(),
        "regression": lambda y: y[:, None].float() * 3 + 1,
        "survival": lambda y: torch.stack(
            [torch.arange(len(y)) % 4 + 1 + y / 2, (torch.arange(len(y)) % 3 > 0)], 1
        ).float(),
    }
    return {
        name: replace(site, data={role: Rows(d.x, makers[kind](d.y)) for role, d in site.data.items()})
        for name, site in little_sites(count=2).items()
    }


KINDS_OF = {n: [k for k in TASKS if not METHODS[n].tasks or k in METHODS[n].tasks] for n in MINE}
# By default one kind of each method, the last, and segmentation of methods that treat masks in a way of their own.
QUICK = {(n, kinds[-1]) for n, kinds in KINDS_OF.items() if kinds} | {("fedsemi", "segmentation")}
CASES = [
    pytest.param(n, k, marks=() if (n, k) in QUICK else pytest.mark.slow)
    for n, kinds in KINDS_OF.items()
    for k in kinds
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_works_for_its_kinds_of_task(name: str, kind: Any) -> None:
    task, sites = TASKS[kind], sites_for(kind)
    method = Evaluated(
        build(name, Setting(task, LocalTraining(epochs=1, batch_size=8, lr=0.01), tuple(sites), 2)), task
    )
    step, engine = run(method, sites, task.first(0), 2, {"public": sites["site-0"].data["public"]})
    scores = evaluate(method, engine, step.state, engine.sites)
    assert len(scores) == 2
    assert all(bool(torch.isfinite(torch.stack(list(s.values()))).all()) for s in scores.values())
