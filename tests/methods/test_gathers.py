"""Methods that must see what each site sends say so, and are refused under secure summation before anything runs.

``tests/laws/test_sums_alone.py`` compares what every method declares with what its sites send.
"""

from typing import Any

import pytest

from polyclinic.compression.transform_table import build as build_transform
from polyclinic.core.pipeline import UnsuitableTransforms, send_through
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build

SITES = ("a", "b", "c")


SEEN_IN_EVERY_ROUND = ("cross", "fedsm", "iop-fl", "fed-align", "fl-mrcm", "fedreplay", "data-vectors")
SEEN_IN_SOME = ("fedmoco", "fcl", "feddg", "vafl", "fedharmony")  # in a phase, before the first round, after it
SEEN_BY_THE_SERVER = ("fedperl", "feddf", "semi-sync", "cfl")


@pytest.mark.parametrize("item", [{"name": "secure-sum"}, {"name": "adaptive-clip", "start": 1.0}])
@pytest.mark.parametrize("name", [*SEEN_IN_EVERY_ROUND, *SEEN_IN_SOME, *SEEN_BY_THE_SERVER])
def test_refused_early(task: Classification, name: str, item: dict[str, Any]) -> None:
    method = build(name, Setting(task, LocalTraining(), SITES, 4))
    with pytest.raises(UnsuitableTransforms, match=r"needs each site's reply.* remove \w+ from the uplink, or choose"):
        send_through(method, build_transform(item))


@pytest.mark.parametrize("name", ["fedmae", "fedirm", "fedsemi", "fedmic", "fednova", "fedmd"])
def test_sums_are_enough(task: Classification, name: str) -> None:
    method = build(name, Setting(task, LocalTraining(), SITES, 4))
    assert not method.capabilities.needs_each_reply
