"""A site without labels takes no step and sends its model unmoved, however many steps are asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from tests.conftest import Rows, little_sites
from tests.support.few_labels import near, only_labels, run


@pytest.mark.parametrize("steps", [None, 5])
def test_no_data_no_step(task: Classification, steps: Any) -> None:
    local, start = LocalTraining(steps=steps, batch_size=8), task.first(0)
    nothing = Rows(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    site = replace(little_sites()["site-0"], data={"train": nothing})
    assert local.count(nothing) == 0
    assert local.count(()) == 0
    end = local.fit(task, start, site, 0)
    assert all(torch.equal(end[name], start[name]) for name in start)


@pytest.mark.parametrize("name", ["fedavg", "fednova", "semi-sync", "fedsemi", "fedirm", "fedperl", "fedmae"])
def test_a_site_with_nothing_at_all_changes_nothing(task: Classification, name: str) -> None:
    sites = {k: only_labels(s) for k, s in little_sites().items()}
    nothing = Rows(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    method = build(name, Setting(task, LocalTraining(steps=3, batch_size=8, lr=0.05), tuple(sites), 2))
    alone, _ = run(method, sites, task.first(0))
    with_it, _ = run(
        method, {**sites, "site-9": replace(sites["site-0"], name="site-9", data={"train": nothing})}, task.first(0)
    )
    assert near(alone.state.params, with_it.state.params)
