"""Rounds of the methods with one global model, written again with PyTorch's SGD, on networks of every kind.

Each reference has the equations of the paper or of the official code, named beside it, and uses nothing of the method:
no local training, no aggregation and no state of it. What is compared is the global model after three rounds of three
sites with 12, 17 and 22 examples, running statistics included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from tests.support.agreement import (
    KINDS,
    agree,
    descent,
    full_gradient,
    full_loss,
    largest_gap,
    learned,
    mean,
    minibatches,
    place,
    ready,
    sizes,
)
from tests.support.few_labels import run

ROUNDS, ETA = 3, 0.05
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=ETA)
STEPS = {"site-0": 2, "site-1": 2, "site-2": 3}  # a last minibatch of one example is left out
Reference = Callable[[Classification, dict[str, Site], dict[str, Any]], Tree]


def zeros(task: Classification) -> Tree:
    return {name: torch.zeros_like(task.first()[name]) for name in learned(task)}


def plus(params: Tree, step: Tree, factor: float = 1.0) -> Tree:
    """``params + factor · step``, where ``step`` may lack leaves."""
    return {name: leaf + factor * step[name] if name in step else leaf for name, leaf in params.items()}


def fedavg(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """McMahan et al., Algorithm 1, with FedProx's gradient of ``μ/2 ‖w − w₀‖²`` (Li et al., equation 2)."""
    w, mu = task.first(), options.get("mu", 0.0)
    for round in range(ROUNDS):
        ends = [
            descent(task, w, s, LOCAL, round, correct=lambda n, g, p, w=w: g + mu * (p - w[n])) for s in sites.values()
        ]
        w = mean(ends, None if options.get("uniform") else sizes(sites))
    return w


def fedsgd(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """McMahan et al., section 2: ``w ← w − η Σ n_k/n g_k``; running statistics are those of one pass."""
    w = task.first()
    for _ in range(ROUNDS):
        ends = []
        for site in sites.values():
            whole = LocalTraining(epochs=1, batch_size=1000, lr=ETA)
            statistics = {n: x for n, x in descent(task, w, site, whole).items() if "running" in n}
            ends.append({**plus(w, full_gradient(task, w, site), -ETA), **statistics})
        w = mean(ends, sizes(sites))
    return w


def scaffold(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Karimireddy et al., Algorithm 1, option II, with all sites; the weights are those of the benchmark if asked."""
    weights = None if options["uniform"] else sizes(sites)
    x, c, own = task.first(), zeros(task), {name: zeros(task) for name in sites}
    for round in range(ROUNDS):
        moves, turns = [], []
        for name, site in sites.items():
            y = descent(task, x, site, LOCAL, round, correct=lambda n, g, p, k=name, c=c: g - own[k][n] + c[n])
            new = {n: own[name][n] - c[n] + (x[n] - y[n]) / (STEPS[name] * ETA) for n in c}
            moves.append(tree.sub(y, x))
            turns.append(tree.sub(new, own[name]))
            own[name] = new
        x = plus(x, mean(moves, weights), options["lr"])
        c = plus(c, mean(turns, weights))
    return x


def fedopt(task: Classification, sites: dict[str, Site], options: dict[str, Any], rule: str) -> Tree:
    """Reddi et al., Algorithm 2, in NumPy; Hsu et al. for the server's momentum. Statistics move by the mean."""
    w, m, v = task.first(), dict[str, Any](), dict[str, Any]()
    beta1, beta2, lr, tau = (options.get(k, d) for k, d in (("beta1", 0.9), ("beta2", 0.99), ("lr", 0), ("tau", 1e-3)))
    for round in range(ROUNDS):
        delta = tree.sub(mean([descent(task, w, s, LOCAL, round) for s in sites.values()], sizes(sites)), w)
        moved = dict(plus(w, delta))
        for name in learned(task):
            d = delta[name].double().numpy()
            m[name] = beta1 * m.get(name, 0.0) + (d if rule == "momentum" else (1 - beta1) * d)
            old = v.get(name, np.full(d.shape, tau**2))
            v[name] = {
                "adagrad": old + d**2,
                "adam": beta2 * old + (1 - beta2) * d**2,
                "yogi": old - (1 - beta2) * d**2 * np.sign(old - d**2),
                "momentum": old,
            }[rule]
            step = lr * m[name] if rule == "momentum" else lr * m[name] / (np.sqrt(v[name]) + tau)
            moved[name] = w[name] + torch.from_numpy(np.asarray(step)).float()
        w = moved
    return w


def feddyn(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Acar et al., Algorithm 1, with all sites."""
    alpha, w, h = options["alpha"], task.first(), zeros(task)
    g = {name: zeros(task) for name in sites}
    for round in range(ROUNDS):
        ends = []
        for name, site in sites.items():
            end = descent(
                task, w, site, LOCAL, round, correct=lambda n, d, p, k=name, w=w: d - g[k][n] + alpha * (p - w[n])
            )
            g[name] = {n: g[name][n] - alpha * (end[n] - w[n]) for n in h}
            ends.append(end)
        h = {n: h[n] - alpha * sum(end[n] - w[n] for end in ends) / len(sites) for n in h}
        w = plus(mean(ends), h, -1 / alpha)
    return w


def mime(task: Classification, sites: dict[str, Site], options: dict[str, Any], lite: bool) -> Tree:
    """Karimireddy et al. (NeurIPS 2021), Algorithm 1 with momentum as the base optimizer."""
    x, m, beta, first = task.first(), zeros(task), options["beta"], learned(task)[0]
    for round in range(ROUNDS):
        c = mean([full_gradient(task, x, site) for site in sites.values()])
        ends = []
        for site in sites.values():
            at_x = iter([gradient_at(task, x, batch) for batch in minibatches(LOCAL, site, round)] if not lite else [])
            now: dict[str, Tree] = {}

            def correct(name: str, g: Any, p: Any, c: Any = c, m: Any = m, at_x: Any = at_x, now: Any = now) -> Any:
                if name == first and not lite:
                    now["x"] = next(at_x)
                corrected = g if lite else g - now["x"][name] + c[name]
                return (1 - beta) * corrected + beta * m[name]

            ends.append(descent(task, x, site, LOCAL, round, correct=correct))
        m = {n: (1 - beta) * c[n] + beta * m[n] for n in m}
        x = mean(ends)
    return x


def gradient_at(task: Classification, params: Tree, batch: Any) -> Tree:
    """The gradient of one minibatch at ``params``."""
    model, (x, y) = ready(task, params), batch
    F.cross_entropy(model(x), y).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def fednova(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Wang et al., equations 6 and 7: the work of SGD with a proximal term is summed step by step."""
    w, mu, n = task.first(), options["mu"], sizes(sites)
    p = [k / sum(n) for k in n]
    for round in range(ROUNDS):
        ends, work = [], []
        for name, site in sites.items():
            ends.append(descent(task, w, site, LOCAL, round, correct=lambda n, g, x, w=w: g + mu * (x - w[n])))
            work.append(sum((1 - ETA * mu) ** k for k in range(STEPS[name])))  # ‖a_i‖₁
        effective, now = sum(a * b for a, b in zip(p, work, strict=True)), mean(ends, n)
        for leaf in learned(task):
            d = sum(a * (w[leaf].double() - end[leaf].double()) / b for a, end, b in zip(p, ends, work, strict=True))
            now[leaf] = (w[leaf].double() - effective * d).float()
        w = now
    return w


def q_ffl(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Li et al. (ICLR 2020), Algorithm 2, with L = 1/η; statistics have the weights h."""
    w, q, L = task.first(), options["q"], 1 / ETA
    for round in range(ROUNDS):
        ends = [descent(task, w, site, LOCAL, round) for site in sites.values()]
        losses = [full_loss(task, w, site) for site in sites.values()]
        steps = [{n: L * (w[n].double() - end[n].double()) for n in learned(task)} for end in ends]
        h = [
            q * f ** (q - 1) * sum(float(d.square().sum()) for d in step.values()) + L * f**q
            for f, step in zip(losses, steps, strict=True)
        ]
        now = mean(ends, h)
        for n in learned(task):
            moved = sum(f**q * step[n] for f, step in zip(losses, steps, strict=True)) / sum(h)
            now[n] = (w[n].double() - moved).float()
        w = now
    return w


def afl(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Mohri et al., Algorithm 1, with several local steps: λ ascends the losses, projected by bisection."""
    w, shares = task.first(), np.full(3, 1 / 3)
    for round in range(ROUNDS):
        risks = np.array([full_loss(task, w, site) for site in sites.values()])
        w = mean([descent(task, w, site, LOCAL, round) for site in sites.values()], list(shares))
        climbed = shares + options["rate"] * risks
        low, high = climbed.min() - 1, climbed.max()
        for _ in range(100):  # Σ max(λ − t, 0) = 1
            t = (low + high) / 2
            low, high = (t, high) if np.maximum(climbed - t, 0).sum() > 1 else (low, t)
        shares = np.maximum(climbed - low, 0)
    return w


def ida(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Yeganeh et al., equations 3 to 6: weights are inverse L1 distances from the mean; statistics have them, too."""
    w = task.first()
    for round in range(ROUNDS):
        ends = [descent(task, w, site, LOCAL, round) for site in sites.values()]
        middle = mean(ends)
        distances = [
            sum(float((end[n].double() - middle[n].double()).abs().sum()) for n in learned(task)) for end in ends
        ]
        w = mean(ends, [1 / distance for distance in distances])
    return w


def fedgma(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Tenison et al., Algorithm 1: a coordinate moves by its agreement, if that is below τ."""
    w, n = task.first(), sizes(sites)
    for round in range(ROUNDS):
        moves = [tree.sub(descent(task, w, site, LOCAL, round), w) for site in sites.values()]
        step = mean(moves, n)
        for name in learned(task):
            signs = torch.stack([k * move[name].sign() for k, move in zip(n, moves, strict=True)])
            agreement = signs.sum(0).abs() / sum(n)
            step[name] = torch.where(agreement >= options["threshold"], step[name], agreement * step[name])
        w = plus(w, step)
    return w


def cyclic(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Tree:
    """Chang et al. (2018): the model is passed on from site to site."""
    w = task.first()
    for round in range(ROUNDS):
        for site in sites.values():
            w = descent(task, w, site, LOCAL, round)
    return w


PUBLISHED: dict[str, tuple[str, Reference, dict[str, Any]]] = {
    "fedavg": ("fedavg", fedavg, {}),
    "fedavg, equal weights": ("fedavg", fedavg, {"uniform": True}),
    "fedavg-recomputed": ("fedavg-recomputed", fedavg, {}),
    "fedsgd": ("fedsgd", fedsgd, {}),
    "fedprox": ("fedprox", fedavg, {"mu": 4.0}),
    "scaffold": ("scaffold", scaffold, {"uniform": True, "lr": 0.7}),
    "scaffold, by examples": ("scaffold", scaffold, {"uniform": False, "lr": 1.0}),
    "fedavgm": ("fedavgm", lambda t, s, o: fedopt(t, s, o, "momentum"), {"beta1": 0.6, "lr": 0.8}),
    "fedadagrad": ("fedadagrad", lambda t, s, o: fedopt(t, s, o, "adagrad"), {"beta1": 0.5, "lr": 0.01}),
    "fedadam": ("fedadam", lambda t, s, o: fedopt(t, s, o, "adam"), {"beta2": 0.9, "lr": 0.01, "tau": 0.01}),
    "fedyogi": ("fedyogi", lambda t, s, o: fedopt(t, s, o, "yogi"), {"beta2": 0.9, "lr": 0.01, "tau": 0.01}),
    "feddyn": ("feddyn", feddyn, {"alpha": 0.3}),
    "mime": ("mime", lambda t, s, o: mime(t, s, o, False), {"beta": 0.6}),
    "mime-lite": ("mime-lite", lambda t, s, o: mime(t, s, o, True), {"beta": 0.6}),
    "fednova": ("fednova", fednova, {"mu": 2.0}),
    "q-ffl": ("q-ffl", q_ffl, {"q": 1.5}),
    "afl": ("afl", afl, {"rate": 0.4}),
    "ida": ("ida", ida, {}),
    "fedgma": ("fedgma", fedgma, {"threshold": 0.8}),
    "cyclic": ("cyclic", cyclic, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_three_rounds_are_the_published_ones(case: str, kind: str) -> None:
    name, reference, options = PUBLISHED[case]
    task, sites = place(kind)
    method = build(name, Setting(task, LOCAL, tuple(sites), ROUNDS), options)
    step, _ = run(method, sites, task.first(), ROUNDS)
    wanted = reference(task, sites, options)
    agree(step.state.params, wanted)
    plain = task.first() if reference is fedavg and not options else fedavg(task, sites, {})
    assert largest_gap(wanted, plain) > 5e-4  # fifty times the tolerance: without its own step it would fail
