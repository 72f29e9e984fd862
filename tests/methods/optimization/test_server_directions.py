"""FedCM and FedExP: two rounds against their published steps."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedcm import FedCM
from polyclinic.methods.optimization.fedexp import FedExP
from polyclinic.testing import close, equal
from tests.support.agreement import KINDS, agree, minibatches, place, ready

LOCAL = LocalTraining(steps=3, batch_size=8, lr=0.05)


def ran(method: Any, params: Any, sites: Any, rounds: Any = 2) -> Any:
    state = method.init(params)
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_of_fedcm_are_the_published_ones(kind: str) -> None:
    """The loss is α L + (1 − α) ⟨w, Δ⟩, and Δ the mean change divided by −K η."""
    task, sites = place(kind)
    state = ran(FedCM(task, LOCAL, alpha=0.3, lr=0.8), task.first(), sites)
    learned = [n for n, _ in task.model().named_parameters()]
    w, direction = task.first(), {n: torch.zeros_like(task.first()[n]) for n in learned}
    for round in range(2):
        ends = []
        for site in sites.values():
            model = ready(task, w)
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for x, y in minibatches(LOCAL, site, round):
                inner = sum((p * direction[n]).sum() for n, p in model.named_parameters())
                optimizer.zero_grad()
                (0.3 * F.cross_entropy(model(x), y) + 0.7 * inner).backward()
                optimizer.step()
            ends.append({n: leaf.clone() for n, leaf in model.state_dict().items() if n in w})
        mean = {n: torch.stack([end[n] for end in ends]).mean(0) - w[n] for n in w}
        direction = {n: -mean[n] / (3 * 0.05) for n in learned}
        w = {n: w[n] + 0.8 * mean[n] for n in w}
    agree(state.params, w)
    agree(state.direction, direction, 1e-4)


def test_fedcm_with_alpha_1_is_uniform_fedavg(task: Classification, sites: dict[str, Site]) -> None:
    assert close(
        ran(FedCM(task, LOCAL, alpha=1.0), task.first(), sites).params,
        ran(FedAvg(task, LOCAL, uniform=True), task.first(), sites).params,
    )
    with pytest.raises(ConfigError, match="momentum of its own"):
        FedCM(task, LocalTraining(optimizer="adam"))
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        FedCM(task, LOCAL, alpha=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_of_fedexp_are_the_published_ones(kind: str) -> None:
    """In numpy's double precision, with sites weighted by examples; the mean of the last two models predicts."""
    task, sites = place(kind)
    method = FedExP(task, LOCAL, epsilon=1e-4)
    state = ran(method, task.first(), sites)
    learned = [n for n, _ in task.model().named_parameters()]
    sizes = np.array([len(site.data["train"]) for site in sites.values()], float)
    w, before, steps = task.first(), task.first(), []
    for round in range(2):
        changes = []
        for site in sites.values():
            end = LOCAL.fit(task, w, site, round)
            changes.append({n: (end[n] - w[n]).double().numpy() for n in w})
        p = sizes / sizes.sum()
        mean = {n: sum(a * c[n] for a, c in zip(p, changes, strict=True)) for n in w}
        squares = sum(a * sum((c[n] ** 2).sum() for n in learned) for a, c in zip(p, changes, strict=True))
        steps.append(max(1.0, 0.5 * squares / (sum((mean[n] ** 2).sum() for n in learned) + 1e-4)))
        before = w
        w = {n: w[n] + torch.from_numpy((steps[-1] if n in learned else 1.0) * mean[n]).float() for n in w}
    assert state.step == pytest.approx(steps[-1], rel=1e-4)
    agree(state.current, w)
    shown = {n: (w[n] + before[n]) / 2 if n in learned else w[n] for n in w}
    agree(method.site_model(method.evaluation_request(state), {}), shown)


def test_fedexp_steps_farther_where_sites_disagree(task: Classification, sites: dict[str, Site]) -> None:
    """One site agrees with itself: the step is 1, and the first model is FedAvg's."""
    one = {"site-0": sites["site-0"]}
    state = ran(FedExP(task, LOCAL), task.first(), one, 1)
    assert state.step == 1.0
    assert equal(state.params, ran(FedAvg(task, LOCAL), task.first(), one, 1).params)
    apart = {
        n: Site(n, {"train": type(s.data["train"])(s.data["train"].x, torch.full_like(s.data["train"].y, k % 2))})
        for k, (n, s) in enumerate(sites.items())
    }
    assert ran(FedExP(task, LOCAL, uniform=True), task.first(), apart, 1).step > 1.0
    with pytest.raises(ConfigError, match="epsilon must be above 0"):
        FedExP(task, LOCAL, epsilon=0.0)
