"""FedDyn and Mime against numpy on a linear model with squared loss, where every gradient can be written down."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.feddyn import FedDyn
from polyclinic.methods.optimization.mime import Mime
from polyclinic.testing import close
from tests.conftest import Rows

F, ETA, STEPS = 4, 0.05, 5


class Line(nn.Module):
    """y = w · x"""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, F))

    def forward(self, x: Any) -> Any:
        return x @ self.w.T


@dataclass(frozen=True)
class Squares(Regression):
    """Half the mean squared error, of a line."""

    def model(self) -> Any:
        return Line()

    def first(self, seed: Any = 0) -> Any:
        return {"w": torch.randn(1, F, generator=torch.Generator().manual_seed(seed))}

    def loss(self, model: Any, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean() / 2


TASK = Squares(Line)  # type: ignore[arg-type]
LOCAL = LocalTraining(epochs=STEPS, batch_size=1000, lr=ETA)  # one step an epoch, on everything


def lines(count: Any = 3) -> Any:
    """Sites whose lines differ."""
    rng, sites = torch.Generator().manual_seed(5), {}
    for k in range(count):
        x = torch.randn(20 + 10 * k, F, generator=rng)
        y = x @ torch.randn(F, 1, generator=rng) + 0.1 * torch.randn(len(x), 1, generator=rng)
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x, y)})
    return sites


def gradient(w: Any, site: Any) -> Any:
    data = site.data["train"]
    x, y = data.x.double().numpy(), data.y.double().numpy()
    return (x @ w - y[:, 0]) @ x / len(x)


def run(method: Any, sites: Any, rounds: Any = 3) -> Any:
    state = method.init(TASK.first(0))
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_feddyn_by_hand(alpha: float) -> None:
    sites = lines()
    w, h = TASK.first(0)["w"][0].double().numpy(), np.zeros(F)
    g = {name: np.zeros(F) for name in sites}
    for _ in range(3):
        ends = []
        for name, site in sites.items():
            y = w.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, site) - g[name] + alpha * (y - w))
            g[name] = g[name] - alpha * (y - w)
            ends.append(y)
        h = h - alpha * sum(y - w for y in ends) / len(sites)
        w = np.mean(ends, 0) - h / alpha
    np.testing.assert_allclose(run(FedDyn(TASK, 3, LOCAL, alpha), sites).params["w"][0], w, rtol=1e-4, atol=1e-5)


def test_feddyn_counts_only_those_who_took_part() -> None:
    sites = lines()
    few = {name: sites[name] for name in ("s0", "s1")}
    state = run(FedDyn(TASK, 4, LOCAL), few, 1)
    local = LOCAL.with_penalty(lambda m, s: 0.05 * (m.get_parameter("w") - s["w"]).square().sum())
    moved = torch.stack([local.fit(TASK, TASK.first(0), site, 0)["w"] - TASK.first(0)["w"] for site in few.values()])
    assert torch.allclose(state.h["w"], -0.1 * moved.sum(0) / 4, atol=1e-6)


@pytest.mark.slow
def test_feddyn_goes_where_all_sites_together_are_best() -> None:
    """Its point; FedAvg with many local steps stops elsewhere."""
    sites = lines()
    hess = sum(s.data["train"].x.double().T @ s.data["train"].x.double() / len(s.data["train"]) for s in sites.values())
    pull = sum(s.data["train"].x.double().T @ s.data["train"].y.double() / len(s.data["train"]) for s in sites.values())
    best = torch.linalg.solve(hess, pull)[:, 0]
    local = LocalTraining(epochs=30, batch_size=1000, lr=0.1)
    dyn = run(FedDyn(TASK, 3, local, 0.5), sites, 25).params["w"][0].double()
    avg = run(FedAvg(TASK, local, uniform=True), sites, 25).params["w"][0].double()
    assert float((dyn - best).norm()) < 0.05 * float((avg - best).norm())


@pytest.mark.parametrize("lite", [False, True])
def test_mime_by_hand(lite: bool) -> None:
    sites, beta = lines(), 0.7
    w, m = TASK.first(0)["w"][0].double().numpy(), np.zeros(F)
    for _ in range(3):
        c = np.mean([gradient(w, site) for site in sites.values()], 0)
        ends = []
        for site in sites.values():
            y = w.copy()
            for _ in range(STEPS):
                g = gradient(y, site) - (0 if lite else gradient(w, site) - c)
                y -= ETA * ((1 - beta) * g + beta * m)
            ends.append(y)
        m, w = (1 - beta) * c + beta * m, np.mean(ends, 0)
    np.testing.assert_allclose(run(Mime(TASK, LOCAL, beta, lite=lite), sites).params["w"][0], w, rtol=1e-4, atol=1e-5)


def test_mime_corrects_with_the_same_minibatch_and_dropout(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """At the first of several steps the two gradients cancel, dropout and all: every site steps along c."""
    from dataclasses import replace

    from polyclinic.learning.networks.network_catalog import Network

    task = replace(task, network=Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.5))))
    method = Mime(task, LocalTraining(steps=1, batch_size=8, lr=0.1), beta=0.0)
    state = method.init(task.first(0))
    c = {
        name: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
        for name, leaf in state.momentum.items()
    }
    reply, _ = method.site_update(method.request(state._replace(c=c)), {}, sites["site-1"])
    moved = reply.mean("update").value
    for name, leaf in c.items():
        assert torch.allclose(moved[name], -0.1 * leaf, atol=1e-5)


def test_without_momentum_mime_lite_is_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    def end(method: Any) -> Any:
        state = method.init(task.first(0))
        for step in train(method, InProcess(method, sites), state, rounds=2):
            state = step.state
        return state.params

    assert close(end(Mime(task, local, beta=0.0, lite=True)), end(FedAvg(task, local, uniform=True)))


def test_wrong_settings_are_refused(task: Classification) -> None:
    with pytest.raises(ValueError, match="its own momentum"):
        Mime(task, LocalTraining(momentum=0.9))
    with pytest.raises(ValueError, match="its own momentum"):
        Mime(task, LocalTraining(optimizer="adam"))
    with pytest.raises(ValueError, match="alpha must be above 0"):
        FedDyn(task, 3, alpha=0.0)
    assert tree.norm(FedDyn(task, 3).init(task.first(0)).h) == 0
