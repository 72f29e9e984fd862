"""FedNova against the paper's equations in numpy; semi-synchronous and partial work by their definitions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.core.aggregates import merge
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.heterogeneity.fednova import FedNova, accumulation
from polyclinic.methods.heterogeneity.partial_work import PartialWork, partial_work
from polyclinic.methods.heterogeneity.semi_sync import SemiSync, semi_sync
from polyclinic.methods.optimization.fedavg import FedAvg
from tests.conftest import little_sites
from tests.support.known import known

LINEAR = Classification(Network("mlp", (5,), 3, (("depth", 0),)))


def after(method: Any, sites: Any, params: Any, rounds: Any = 1) -> Any:
    for step in train(method, InProcess(method, sites), method.init(params), rounds=rounds):
        assert not step.lost
    return step.state


@given(st.integers(1, 40), st.floats(0, 0.95))
def test_accumulation_is_what_sgd_adds_up_of_a_constant_gradient(steps: Any, momentum: Any) -> None:
    velocity = moved = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1
        moved += velocity
    assert accumulation(steps, momentum) == pytest.approx(moved)


@given(st.integers(1, 40), st.floats(1e-4, 0.5))
def test_accumulation_under_a_proximal_pull(steps: Any, shrink: Any) -> None:
    moved = 0.0
    for _ in range(steps):
        moved = moved + 1 - shrink * moved
    assert accumulation(steps, 0, shrink) == pytest.approx(moved)


def numpy_descent(w: Any, b: Any, x: Any, y: Any, lr: Any, steps: Any) -> Any:
    """Softmax regression on the whole batch."""
    for _ in range(steps):
        z = x @ w.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        w, b = w - lr * p.T @ x / len(y), b - lr * p.mean(0)
    return w, b


def test_one_round_is_the_papers_equation_in_numpy() -> None:
    # x ← x − (Σ p_i τ_i) Σ p_i (x − x_i) / τ_i, with sites that take 6, 3 and 2 steps (equations 6 and 7)
    sites, params = little_sites((5,), classes=3), LINEAR.first(1)
    seconds = (("site-0", 1.0), ("site-1", 2.0), ("site-2", 3.0))
    local = LocalTraining(batch_size=1000, lr=0.3, epochs=2)
    method = SemiSync(FedNova(LINEAR, local), seconds, share=2.0)
    found = after(method, sites, params).params
    w0, b0 = params["head.weight"].double().numpy(), params["head.bias"].double().numpy()
    n, tau = np.array([12, 17, 22]), np.array([6, 3, 2])
    p = n / n.sum()
    dw, db = 0, 0
    for k in range(3):
        data = sites[f"site-{k}"].data["train"]
        w, b = numpy_descent(w0, b0, data.x.double().numpy(), data.y.numpy(), 0.3, tau[k])
        dw, db = dw + p[k] * (w0 - w) / tau[k], db + p[k] * (b0 - b) / tau[k]
    effective = (p * tau).sum()
    assert np.allclose(found["head.weight"].numpy(), w0 - effective * dw, atol=1e-5)
    assert np.allclose(found["head.bias"].numpy(), b0 - effective * db, atol=1e-5)


def test_with_equal_work_it_is_fedavg(task: Classification) -> None:
    sites = little_sites()
    local = LocalTraining(steps=3, batch_size=8, lr=0.1, momentum=0.5)
    nova, plain = (after(m(task, local), sites, task.first(0), 2).params for m in (FedNova, FedAvg))
    assert all(torch.allclose(nova[name], plain[name], atol=1e-6) for name in plain)


def test_statistics_move_by_the_plain_mean(task: Classification) -> None:
    sites, start = little_sites(), task.first(0)
    local = LocalTraining(epochs=2, batch_size=4, lr=0.1)
    nova, plain = (after(m(task, local), sites, start).params for m in (FedNova, FedAvg))
    running = [name for name in start if "running" in name]
    assert running
    assert all(torch.allclose(nova[name], plain[name], atol=1e-6) for name in running)
    assert any(not torch.allclose(nova[name], plain[name], atol=1e-4) for name in start if name not in running)


def test_adam_is_refused(task: Classification) -> None:
    with pytest.raises(ValueError, match='optimizer = "sgd", not adam'):
        FedNova(task, LocalTraining(optimizer="adam"))
    with pytest.raises(ValueError, match="not for both"):
        FedNova(task, LocalTraining(momentum=0.9), mu=0.1)


def steps_taken(method: Any, request: Any, site: Any) -> Any:
    """How many minibatches a site reads."""
    reads = []

    class Counted:
        def __len__(self) -> Any:
            return len(site.data["train"])

        def __getitem__(self, index: Any) -> Any:
            reads.append(len(index))
            return site.data["train"][index]

    method.site_update(request, {}, replace(site, data={**site.data, "train": Counted()}))
    return len(reads)


def test_semi_sync_gives_each_site_the_steps_that_fit_the_time(task: Classification) -> None:
    sites, local = little_sites(), LocalTraining(epochs=1, batch_size=4, lr=0.1)
    method = semi_sync(task, local, tuple(sites), seconds=(1.0, 0.5, 4.0), share=2.0)
    state = method.init(task.first(0))
    request = known(method.request(state))
    assert request.job == "epoch-time"
    reply = merge(method.site_update(request, {}, site)[0] for site in sites.values())
    state = method.server_update(state, reply, Site("server"))
    # 12, 17 and 22 examples: 3, 4 (a last batch of one is left out) and 6 minibatches: epochs of 3, 2 and 24 s
    assert state.seconds == 48.0
    request = known(method.request(state))
    assert request.round == 0
    assert [steps_taken(method, request, site) for site in sites.values()] == [48, 96, 12]


@pytest.mark.parametrize("seconds", [1e300, 1.7e308])
def test_a_false_time_gives_no_site_of_semi_sync_work_without_end(task: Classification, seconds: float) -> None:
    sites, local = little_sites(), LocalTraining(epochs=1, batch_size=4, lr=0.1)
    method = semi_sync(task, local, tuple(sites), share=2.0)
    state = method.init(task.first(0))
    reply = merge(method.site_update(known(method.request(state)), {}, site)[0] for site in sites.values())
    reply.gather("seconds")["site-2"]["epoch"].fill_(seconds)
    request = known(method.request(method.server_update(state, reply, Site("server"))))
    assert [steps_taken(method, request, site) for site in sites.values()] == [300, 400, 600]  # 100 epochs


@pytest.mark.parametrize("share", [0.0, -1.0, 101.0, float("nan")])
def test_semi_sync_refuses_an_impossible_share(task: Classification, share: float) -> None:
    with pytest.raises(ValueError, match="semi-sync: share must be above 0 and at most 100"):
        semi_sync(task, LocalTraining(), ("a",), share=share)


def test_equal_machines_and_equal_data_make_semi_sync_fedavg(task: Classification) -> None:
    site = little_sites()["site-1"]
    sites = {name: replace(site, name=name) for name in ("a", "b")}
    local = LocalTraining(epochs=1, batch_size=8, lr=0.1)
    paced = after(semi_sync(task, local, ("a", "b")), sites, task.first(0), 2).params
    plain = after(FedAvg(task, local), sites, task.first(0), 2).params
    assert all(torch.equal(paced[name], plain[name]) for name in plain)


def test_partial_work_is_fedavg_where_nobody_is_late_and_shorter_where_all_are(task: Classification) -> None:
    sites, local = little_sites(), LocalTraining(epochs=4, batch_size=4, lr=0.1)
    punctual = after(PartialWork(FedAvg(task, local), late=0.0), sites, task.first(0)).params
    plain = after(FedAvg(task, local), sites, task.first(0)).params
    assert all(torch.equal(punctual[name], plain[name]) for name in plain)
    late = partial_work(task, local, late=1.0, least=0.1)
    request = late.request(late.init(task.first(0)))
    counts = [steps_taken(late, request, site) for site in sites.values()]
    wholes = [local.count(site.data["train"]) for site in sites.values()]
    assert all(1 <= done <= whole for done, whole in zip(counts, wholes, strict=True))
    assert counts != wholes


@pytest.mark.parametrize("seconds", [(1.0,), (1.0, 2.0, 0.0)])
def test_semi_sync_refuses_impossible_seconds(task: Classification, seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="semi-sync: seconds"):
        semi_sync(task, LocalTraining(), ("a", "b", "c"), seconds=seconds)


def test_nova_normalizes_what_paced_sites_send(task: Classification) -> None:
    sites, local = little_sites(), LocalTraining(epochs=1, batch_size=8, lr=0.05)
    seconds = (("site-0", 0.1),)
    start = task.first(0)
    nova = after(SemiSync(FedNova(task, local), seconds), sites, start).params
    plain = after(SemiSync(FedAvg(task, local), seconds), sites, start).params
    assert any(not torch.allclose(nova[name], plain[name], atol=1e-4) for name in plain)
