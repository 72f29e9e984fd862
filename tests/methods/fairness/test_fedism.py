"""FedISM: two rounds against the published code's steps, its limits, and the site that it favors."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.fairness.fedism import FedISM
from polyclinic.methods.optimization.fedavg import FedAvg
from tests.conftest import Rows, little_sites
from tests.support.agreement import KINDS, agree, largest_gap, mean, minibatches, place, ready, restore, statistics
from tests.support.few_labels import near, run

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def gradients(model: Any, x: Any, y: Any) -> dict[str, Any]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dot(one: dict[str, Any], other: dict[str, Any]) -> Any:
    return sum((one[n] * other[n]).sum() for n in one)


def climb(model: Any, g: dict[str, Any], rho: float) -> None:
    """Move the weights by ρ along the unit vector of g."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            p += rho * g[n] / dot(g, g).sqrt() if n in g else 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_are_the_published_ones(kind: str) -> None:
    """GSAM by its decomposition of gradients, sharpness of the received model, and a moving average of weights."""
    task, sites = place(kind)
    rho, alpha, q, beta = 0.3, 0.4, 1.5, 0.6
    step, _ = run(FedISM(task, LOCAL, rho, alpha, q, beta), sites, task.first(), 2)
    w, weights = task.first(), torch.zeros(3, dtype=torch.float64)
    for round in range(2):
        ends, sharp = [], []
        for site in sites.values():
            x, y = site.data["train"].x, site.data["train"].y
            model = load(task.model(), w).eval()
            g = gradients(model, x, y)
            with torch.no_grad():
                here = F.cross_entropy(model(x), y)
                climb(model, g, rho)
                sharp.append(float(F.cross_entropy(model(x), y) - here))
            model = ready(task, w)
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for x, y in minibatches(LOCAL, site, round):
                start = {n: p.detach().clone() for n, p in model.named_parameters()}
                g = gradients(model, x, y)
                kept = statistics(model)
                climb(model, g, rho)
                h = gradients(model, x, y)
                restore(model, kept)
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        p.copy_(start[n])
                        p.grad = h[n] - alpha * (g[n] - dot(g, h) / dot(h, h) * h[n]) if n in h else None
                optimizer.step()
            ends.append(params_of(model))
        shares = (torch.tensor(sharp, dtype=torch.float64) / sum(sharp)) ** q
        shares = shares / shares.sum()
        weights = beta * shares + (1 - beta) * weights if round else shares
        w = mean(ends, weights.tolist())
    agree(step.state.params, w)
    assert list(step.state.weights.values()) == pytest.approx(weights.tolist(), abs=1e-5)
    plain, _ = run(FedAvg(task, LOCAL, uniform=True), sites, task.first(), 2)
    assert largest_gap(w, plain.state.params) > 1e-3


def test_without_a_perturbation_and_an_exponent_it_is_uniform_fedavg(
    task: Classification, sites: dict[str, Site]
) -> None:
    found, _ = run(FedISM(task, LOCAL, rho=1e-9, surrogate=0.0, q=0.0), sites, task.first(), 2)
    plain, _ = run(FedAvg(task, LOCAL, uniform=True), sites, task.first(), 2)
    assert near(found.state.params, plain.state.params)
    for wrong in ({"rho": 0.0}, {"beta": 0.0}, {"q": -1.0}, {"surrogate": -0.1}):
        with pytest.raises(ConfigError, match="fedism: rho and beta must be above 0"):
            FedISM(task, LOCAL, **wrong)  # type: ignore[arg-type]


def test_the_site_with_bad_images_counts_more() -> None:
    """Images of one site are noisy: the model is less certain there, and its loss sharper."""
    sites, task = {}, place("cnn, group")[0]
    for name, site in little_sites().items():
        rows = site.data["train"]
        x, noise = rows.x[:12], torch.randn(rows.x[:12].shape, generator=torch.Generator().manual_seed(1))
        x = x + 3 * noise if name == "site-0" else x
        sites[name] = Site(name, {**site.data, "train": Rows(x, rows.y[:12])})
    step, _ = run(FedISM(task, LocalTraining(epochs=4, batch_size=6, lr=0.1)), sites, task.first(), 8)
    assert step.state.weights["site-0"] > 0.4
