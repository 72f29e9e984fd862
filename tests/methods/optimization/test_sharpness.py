"""FedSAM, FedLESAM and FedSpeed against their published steps, written again with PyTorch's optimizers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.feddyn import FedDyn
from polyclinic.methods.optimization.fedlesam import FedLESAM
from polyclinic.methods.optimization.fedsam import SharpnessAware, fedsam, sharpness_aware
from polyclinic.methods.optimization.fedspeed import FedSpeed
from polyclinic.methods.personalization.ditto import Ditto
from polyclinic.testing import equal
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready, restore, statistics
from tests.support.known import known

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)
NAMES = ("site-0", "site-1", "site-2")


def climb(model: Any, x: Any, y: Any, rho: Any, adaptive: Any = False) -> Any:
    """Move the weights uphill as published, and return by how much; running statistics stay."""
    kept = statistics(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    restore(model, kept)
    moved = [p for p in model.parameters() if p.grad is not None]
    size = [p.detach().abs() if adaptive else torch.ones_like(p) for p in moved]
    norm = torch.cat([(s * p.grad).flatten() for s, p in zip(size, moved, strict=True)]).norm()
    steps = [rho / (norm + 1e-12) * s.square() * p.grad for s, p in zip(size, moved, strict=True)]
    with torch.no_grad():
        for p, step in zip(moved, steps, strict=True):
            p += step
    return moved, steps


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fedsams_steps_are_the_published_ones(kind: str, adaptive: bool) -> None:
    task, sites = place(kind)
    method = fedsam(task, LOCAL, NAMES, 5, rho=0.3, adaptive=adaptive)
    found = (
        method.site_update(known(method.request(method.init(task.first()))), {}, sites["site-1"])[0]
        .mean("update")
        .value
    )
    model = ready(task, task.first())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, sites["site-1"]):
        moved, steps = climb(model, x, y, 0.3, adaptive)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, step in zip(moved, steps, strict=True):
                p -= step
        optimizer.step()
    agree(found, change(model, task.first()))


def test_fedsam_without_a_perturbation_is_the_method_itself(task: Classification, sites: dict[str, Site]) -> None:
    ours, plain = fedsam(task, LOCAL, NAMES, 5, rho=0.0), FedAvg(task, LOCAL)
    request = plain.request(plain.init(task.first()))
    agree(
        ours.site_update(request, {}, sites["site-0"])[0].mean("update").value,
        plain.site_update(request, {}, sites["site-0"])[0].mean("update").value,
        1e-6,
    )


def test_fedsam_surrounds_other_methods_and_refuses_those_that_it_cannot_change(task: Classification) -> None:
    around = fedsam(task, LOCAL, NAMES, 5, over="ditto", rho=0.1)
    assert isinstance(around, Ditto)
    assert isinstance(around.local, SharpnessAware)
    assert isinstance(around.inner, FedAvg)
    assert isinstance(around.inner.local, SharpnessAware)
    with pytest.raises(ConfigError, match="takes training steps of its own"):
        fedsam(task, LOCAL, NAMES, 5, over="apfl")
    for name in ("harmofl", "fedlesam", "fedspeed", "fedsam"):
        with pytest.raises(ConfigError, match=f'over = "{name}" perturbs the weights itself'):
            fedsam(task, LOCAL, NAMES, 5, over=name)
    with pytest.raises(ConfigError, match="rho must be at least 0"):
        fedsam(task, LOCAL, NAMES, 5, rho=-0.1)
    with pytest.raises(ConfigError, match="remove training"):
        sharpness_aware(DPSGD(), 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_fedlesams_steps_are_the_published_ones(kind: str) -> None:
    """The perturbation is ρ times the unit vector from the present global model to the last one."""
    task, sites = place(kind)
    method, last, now = FedLESAM(task, LOCAL, rho=0.4), task.first(1), task.first(0)
    names = [n for n, _ in task.model().named_parameters()]
    memory = {"last": {n: last[n] for n in names}}
    request = method.request(method.init(now))
    reply, kept = method.site_update(request, memory, sites["site-2"])
    assert equal(kept["last"], {n: now[n] for n in kept["last"]})
    gap = {n: last[n] - now[n] for n in names}
    norm = torch.cat([leaf.flatten() for leaf in gap.values()]).norm()
    model = ready(task, now)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, sites["site-2"]):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(0.4 * gap[n] / norm)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.sub_(0.4 * gap[n] / norm)
        optimizer.step()
    agree(reply.mean("update").value, change(model, now), 2e-5)


def test_fedlesam_begins_as_fedavg(task: Classification, sites: dict[str, Site]) -> None:
    ours, plain = FedLESAM(task, LOCAL), FedAvg(task, LOCAL)
    request = plain.request(plain.init(task.first()))
    first = ours.site_update(request, {}, sites["site-0"])[0]
    assert equal(first, plain.site_update(request, {}, sites["site-0"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_of_fedspeed_are_the_published_ones(kind: str) -> None:
    """Two of three sites, twice: h_i sums a site's changes, and the server adds the mean h of all three."""
    task, sites = place(kind)
    sites, local = {name: sites[name] for name in NAMES[:2]}, LocalTraining(steps=2, batch_size=8, lr=0.05)
    method = FedSpeed(task, 3, local, lam=0.2, rho=0.3)
    state = method.init(task.first())
    for step in train(method, InProcess(method, sites), state, rounds=2):
        state = step.state
    learned = [n for n, _ in task.model().named_parameters()]
    w, h = task.first(), {name: {n: torch.zeros_like(task.first()[n]) for n in learned} for name in NAMES}
    for round in range(2):
        ends = []
        for name, site in sites.items():
            model = ready(task, w)
            # the proximal term as weight decay, and the rest of it with the dual variable, as in the published code
            optimizer = torch.optim.SGD(model.parameters(), 0.05, weight_decay=0.2)
            for x, y in minibatches(local, site, round):
                moved, steps = climb(model, x, y, 0.3)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                with torch.no_grad():
                    for p, up in zip(moved, steps, strict=True):
                        p -= up
                terms = [0.2 * (p * (h[name][n] - w[n])).sum() for n, p in model.named_parameters()]
                sum(terms, torch.tensor(0.0)).backward()
                optimizer.step()
            ends.append({n: leaf.clone() for n, leaf in model.state_dict().items() if n in w})
            h[name] = {n: h[name][n] + ends[-1][n] - w[n] for n in learned}
        mean = {n: torch.stack([end[n] for end in ends]).mean(0) for n in w}
        w = {
            n: leaf + torch.stack([h[k][n] for k in NAMES]).mean(0) if n in learned else leaf
            for n, leaf in mean.items()
        }
    agree(state.params, w)


def test_fedspeed_without_a_perturbation_differs_from_feddyn_only_in_what_it_adds(
    task: Classification, sites: dict[str, Site]
) -> None:
    """The first round from zero corrections: both take the proximal steps, so that the site's changes agree."""
    ours, dyn = FedSpeed(task, 3, LOCAL, lam=0.1, rho=0.0), FedDyn(task, 3, LOCAL, alpha=0.1)
    a = ours.site_update(ours.request(ours.init(task.first())), {}, sites["site-0"])[0].mean("update").value
    b = dyn.site_update(dyn.request(dyn.init(task.first())), {}, sites["site-0"])[0].mean("update").value
    agree(a, b)
    assert np.isfinite(tree.norm(a))
