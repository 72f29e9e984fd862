"""FedCostWAvg, FedPIDAvg, FedAWA and FedLWS against their published steps, written again in numpy and PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.fedawa import FedAWA, adapted
from polyclinic.methods.aggregation.fedlws import FedLWS
from polyclinic.methods.aggregation.pid_weights import PIDWeights
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import close
from tests.support.agreement import KINDS, agree, place

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.1)


def ran(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    engine, state, steps = InProcess(method, sites), method.init(params), []
    for step in train(method, engine, state, rounds=rounds):
        steps.append(step)
    return steps[-1].state, steps


def weighted(task: Any, sites: Any, rounds: Any, weights: Any) -> Any:
    """FedAvg with weights by ``weights(sizes, losses)``, where losses [rounds, sites] are those so far."""
    w, sizes, losses = task.first(), np.array([len(s.data["train"]) for s in sites.values()], float), []
    for round in range(rounds):
        ends = [LOCAL.fit(task, w, site, round) for site in sites.values()]
        losses.append([risk(task, end, site, round) for end, site in zip(ends, sites.values(), strict=True)])
        p = weights(sizes, np.array(losses))
        p = p / p.sum()
        w = {
            n: w[n] + sum(float(a) * (end[n] - w[n]).double() for a, end in zip(p, ends, strict=True)).float()
            for n in w
        }
    return w


@pytest.mark.parametrize("kind", KINDS)
def test_fedcostwavg_is_the_published_weighting(kind: str) -> None:
    """α s / S + (1 − α) k / K, with k the ratio of the last loss to the present one."""
    task, sites = place(kind)
    method = build("fedcostwavg", Setting(task, LOCAL, tuple(sites), 3))

    def weights(s: Any, c: Any) -> Any:
        p = 0.5 * s / s.sum()
        if len(c) > 1:
            k = c[-2] / c[-1]
            p = p + 0.5 * k / k.sum()
        return p

    state, steps = ran(method, task.first(), sites, 3)
    agree(state.params, weighted(task, sites, 3, weights))
    assert [s.request.job for s in steps] == ["train", "send"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_fedpidavg_is_the_published_weighting(kind: str) -> None:
    """α s / S + β k / K + γ m / M, with k the decrease and m the sum of at most six losses."""
    task, sites = place(kind)
    method = build("fedpidavg", Setting(task, LOCAL, tuple(sites), 8))

    def weights(s: Any, c: Any) -> Any:
        m = c[-6:].sum(0)
        p = 0.45 * s / s.sum() + 0.1 * m / m.sum()
        k = np.clip(c[-2] - c[-1], 0, None) if len(c) > 1 else np.zeros_like(m)
        return p + 0.45 * k / k.sum() if k.sum() else p

    agree(ran(method, task.first(), sites, 8)[0].params, weighted(task, sites, 8, weights), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fedpid_weighs_by_the_decrease_since_the_first_round(kind: str) -> None:
    """0.45 s / S + 0.45 k / K + 0.1 m / M, with k = c(t − 1) − c(t) and m = c(0) − c(t), increases as 0."""
    task, sites = place(kind)
    method = build("fedpid", Setting(task, LOCAL, tuple(sites), 4))

    def weights(s: Any, c: Any) -> Any:
        p = 0.45 * s / s.sum()
        if len(c) > 1:
            for share, drop in ((0.45, c[-2] - c[-1]), (0.1, c[0] - c[-1])):
                drop = drop.clip(min=0)
                p = p + (share * drop / drop.sum() if drop.sum() > 0 else 0.0)
        return p

    state, _ = ran(method, task.first(), sites, 4)
    agree(state.params, weighted(task, sites, 4, weights))
    other, _ = ran(build("fedpidavg", Setting(task, LOCAL, tuple(sites), 4)), task.first(), sites, 4)
    assert not close(state.params, other.params)


def test_with_the_size_alone_it_is_fedavg_and_a_rise_counts_as_nothing(
    task: Classification, sites: dict[str, Site]
) -> None:
    plain = ran(FedAvg(task, LOCAL), task.first(), sites, 2)[0]
    assert close(ran(PIDWeights(task, LOCAL, 1.0, 0.0, 0.0), task.first(), sites, 2)[0].params, plain.params)
    found = PIDWeights(task, LOCAL).amounts(5, [1.0, 3.0])
    assert [float(found[n]) for n in ("size", "drop", "sum")] == [5.0, 0.0, 4.0]
    assert float(PIDWeights(task, LOCAL, ratio=True).amounts(5, [1.0, 4.0])["drop"]) == 0.25
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        PIDWeights(task, LOCAL, alpha=0.0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_of_fedawa_are_the_published_ones(kind: str, steps: int) -> None:
    """Loss and Adam of the published code over whole vectors, without the matrix of inner products."""
    task, sites = place(kind)
    method = FedAWA(task, LOCAL, rate=0.05, steps=steps)
    state, _ = ran(method, task.first(), sites, 2)
    learned = [n for n, _ in task.model().named_parameters()]
    sizes = torch.tensor([float(len(s.data["train"])) for s in sites.values()]).double()
    T, w = (sizes / sizes.sum()).requires_grad_(), task.first()
    for round in range(2):
        ends = [LOCAL.fit(task, w, site, round) for site in sites.values()]
        flat = torch.cat([w[n].flatten() for n in learned]).double()
        own = torch.stack([torch.cat([end[n].flatten() for n in learned]) for end in ends]).double()
        T = T.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([T], lr=0.05, betas=(0.5, 0.999))
        for _ in range(steps):
            p = T.softmax(0)
            far = 1 - torch.nn.functional.cosine_similarity(flat[None], own, dim=1)
            moved = own - flat
            apart = (moved - p @ moved).norm(dim=1)
            optimizer.zero_grad()
            (p @ far + p @ apart).backward()
            optimizer.step()
        p = p.detach()
        w = {n: w[n] + sum(float(a) * (end[n] - w[n]) for a, end in zip(p, ends, strict=True)) for n in w}
    agree(state.params, w)
    np.testing.assert_allclose([state.logits[s] for s in sites], T.detach().numpy(), atol=1e-4)


def test_fedawa_shifts_weight_to_the_site_in_the_middle() -> None:
    """Three updates on a line: many steps favor the one between the others."""
    x = torch.tensor([[1.0, 0.0], [0.0, 0.1], [-1.0, 0.0]]).double()
    p, _ = adapted(torch.full((3,), 1 / 3).double(), x @ x.T, torch.ones(3).double(), 0.05, 200)
    assert float(p[1]) > 0.6
    assert float(p.sum()) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_of_fedlws_are_the_published_ones(kind: str) -> None:
    task, sites = place(kind)
    method = FedLWS(task, LOCAL, beta=0.5, least=0.02, most=0.3)
    state, _ = ran(method, task.first(), sites, 2)
    modules: dict[str, list[str]] = {}
    for n, _ in task.model().named_parameters():
        modules.setdefault(n[: n.rindex(".")] if "." in n else "", []).append(n)
    sizes = np.array([len(s.data["train"]) for s in sites.values()], float)
    p, w, taus = sizes / sizes.sum(), task.first(), set()
    for round in range(2):
        ends = [LOCAL.fit(task, w, site, round) for site in sites.values()]
        mean = {
            n: sum((float(a) * end[n].double() for a, end in zip(p, ends, strict=True)), torch.tensor(0.0)) for n in w
        }
        new = dict(mean)
        for names in modules.values():
            old, now, *own = (torch.cat([t[n].flatten().double() for n in names]).numpy() for t in (w, mean, *ends))
            each = [o - old for o in own]
            center = sum(each) / len(each)
            tau = np.clip(0.5 * np.mean([np.linalg.norm(e - center) for e in each]), 0.02, 0.3)
            size = np.linalg.norm(old)
            gamma = size / (size + tau * np.linalg.norm(now - old)) if size else 1.0
            taus.add(float(tau))
            new |= {n: mean[n] * gamma for n in names}
        w = {n: leaf.float() for n, leaf in new.items()}
    agree(state.params, w)
    assert len(taus) > 2  # neither bound alone


def test_fedlws_without_shrinking_is_fedavg(task: Classification, sites: dict[str, Site]) -> None:
    none = FedLWS(task, LOCAL, beta=0.0, least=0.0, most=0.0)
    assert close(
        ran(none, task.first(), sites, 2)[0].params, ran(FedAvg(task, LOCAL), task.first(), sites, 2)[0].params
    )
    with pytest.raises(ConfigError, match="at least as large as least"):
        FedLWS(task, LOCAL, least=0.5, most=0.1)
