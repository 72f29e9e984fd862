"""Methods that must see what each site sends say so, and are refused under secure summation before anything runs."""

import pytest

from polyclinic.compression.transform_table import build as build_transform
from polyclinic.core.pipeline import send_through
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build

SITES = ("a", "b", "c")


@pytest.mark.parametrize("name", ["fedmoco", "fcl", "fedperl", "feddf", "semi-sync"])
def test_refused_early(task: Classification, name: str) -> None:
    method = build(name, Setting(task, LocalTraining(), SITES, 4))
    with pytest.raises(ValueError, match="needs each site's reply"):
        send_through(method, build_transform({"name": "secure-sum"}))


@pytest.mark.parametrize("name", ["fedmae", "fedirm", "fedsemi", "fedmic", "fednova", "fedmd"])
def test_sums_are_enough(task: Classification, name: str) -> None:
    method = build(name, Setting(task, LocalTraining(), SITES, 4))
    assert not method.capabilities.needs_each_reply
