"""FedDG-GA: three rounds against the published order of training, scoring, averaging and adjusting."""

from typing import Any

import numpy as np
import pytest

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.fairness.feddg_ga import FedDGGA, adjusted
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.support.agreement import KINDS, agree, place

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.1)
NAMES = ("site-0", "site-1", "site-2")


def ran(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    state = method.init(params)
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_are_the_published_ones(kind: str) -> None:
    """In the published code the weights are adjusted at the end of a round; here when the next updates arrive."""
    task, sites = place(kind)
    state = ran(FedDGGA(task, NAMES, 5, LOCAL, step=0.6), task.first(), sites, 3)
    w, a, total, initial = task.first(), np.full(3, 1 / 3), 5, 0.6
    for i in range(3):
        ends = [LOCAL.fit(task, w, site, i) for site in sites.values()]
        before = np.array([risk(task, end, s, i, "val") for end, s in zip(ends, sites.values(), strict=True)])
        w = {n: w[n] + sum(float(x) * (end[n] - w[n]) for x, end in zip(a, ends, strict=True)) for n in w}
        used = a
        after = np.array([risk(task, w, site, i, "val") for site in sites.values()])
        gaps = (after - before) / np.abs(after - before).max()
        a = np.clip(a + gaps * (initial - (i - 1) * initial / total) / 3, 0, 1)
        a = a / a.sum()
    agree(state.params, w)
    np.testing.assert_allclose([state.weights[n] for n in NAMES], used, atol=1e-5)
    assert np.abs(used - 1 / 3).max() > 0.05


def test_without_a_step_it_is_uniform_fedavg_and_a_site_that_was_absent_keeps_its_weight(
    task: Classification, sites: dict[str, Site]
) -> None:
    plain = ran(FedAvg(task, LOCAL, uniform=True), task.first(), sites, 2)
    assert close(ran(FedDGGA(task, NAMES, 4, LOCAL, step=0.0), task.first(), sites, 2).params, plain.params)
    even = dict.fromkeys("abc", 1 / 3)
    assert adjusted(even, {}, 0.1) == even
    assert adjusted(even, {"a": 0.0}, 0.1) == even
    found = adjusted(even, {"a": 2.0, "b": -1.0}, 0.1)
    total = 1 / 3 + 0.1 + 1 / 3 - 0.05 + 1 / 3
    assert found == pytest.approx({"a": (1 / 3 + 0.1) / total, "b": (1 / 3 - 0.05) / total, "c": 1 / 3 / total})
    assert adjusted({"a": 0.9, "b": 0.05}, {"a": 1.0, "b": -1.0}, 0.5) == {"a": 1.0, "b": 0.0}
    with pytest.raises(ConfigError, match="step must be between 0 and 1"):
        FedDGGA(task, NAMES, 4, LOCAL, step=2.0)


def test_a_gap_counts_only_in_the_round_after_it_was_measured(task: Classification, sites: dict[str, Site]) -> None:
    """A site that missed a round compares the averaged model with a model of its own from long ago."""
    method, site = FedDGGA(task, NAMES, 5, LOCAL), sites["site-0"]
    request = method.request(method.init(task.first()))
    reply, memory = method.site_update(request, {}, site)
    assert not reply.gather("update")["site-0"]["/known"]
    for round, known in ((1, True), (2, False)):
        later = type(request)(round, request.trees)
        assert bool(method.site_update(later, memory, site)[0].gather("update")["site-0"]["/known"]) == known
    blind = Site("site-0", {"train": site.data["train"]})
    assert method.site_update(request, {}, blind)[1]["before"]["loss"] == pytest.approx(
        risk(task, LOCAL.fit(task, task.first(), blind, 0), blind, 0, "train")
    )
