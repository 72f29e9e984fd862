"""Rounds of personalization methods, written again with PyTorch's SGD, on networks of every kind.

As in ``tests/methods/optimization/test_published_rounds.py``, the references use nothing of the methods. Compared are,
after three rounds, the server's model and the model with which each site predicts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from tests.support.agreement import (
    KINDS,
    agree,
    descent,
    entering,
    full_loss,
    in_head,
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
Found = tuple[Tree, dict[str, Tree]]
Reference = Callable[[Classification, dict[str, Site], dict[str, Any]], Found]


def in_encoder(name: str) -> bool:
    return not in_head(name)


def normalization(task: Classification) -> set[str]:
    """The names of what layers of normalization have, by the kind of module."""
    kinds = nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm | nn.LayerNorm
    layers = [(name, m) for name, m in task.model().named_modules() if isinstance(m, kinds)]
    return {f"{name}.{leaf}" for name, m in layers for leaf in m.state_dict()}


def kept(task: Classification, sites: dict[str, Site], stays: Callable[[str], bool]) -> Found:
    """FedAvg of all leaves but those for which ``stays`` holds, of which each site has its own."""
    shared, models = task.first(), {name: task.first() for name in sites}
    for round in range(ROUNDS):
        for name, site in sites.items():
            models[name] = descent(task, models[name], site, LOCAL, round)
        shared = {n: x for n, x in mean(list(models.values()), sizes(sites)).items() if not stays(n)}
        models = {name: {**model, **shared} for name, model in models.items()}
    return shared, models


def fedbn(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Li et al. (ICLR 2021), equation 2."""
    return kept(task, sites, normalization(task).__contains__)


def silobn(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Andreux et al. (2020), section 2.2."""
    return kept(task, sites, lambda name: "running" in name)


def fedper(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Arivazhagan et al. (2019), Algorithm 1."""
    return kept(task, sites, in_head)


def lg_fedavg(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Liang et al. (2020), Algorithm 1."""
    return kept(task, sites, in_encoder)


def fedrep(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Collins et al. (2021), Algorithm 1: the head first, the representation after it."""
    shared, models = task.first(), {name: task.first() for name in sites}
    heads = replace(LOCAL, epochs=options["head_epochs"])
    for round in range(ROUNDS):
        for name, site in sites.items():
            w = descent(task, models[name], site, heads, round, slot="head", only=in_head)
            models[name] = descent(task, w, site, LOCAL, round, only=in_encoder)
        shared = {n: x for n, x in mean(list(models.values()), sizes(sites)).items() if not in_head(n)}
        models = {name: {**model, **shared} for name, model in models.items()}
    return shared, models


def ditto(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Li et al. (ICML 2021), Algorithm 1: ``v ← v − η (∇F(v) + λ (v − w))``."""
    w, own, lam = task.first(), {name: task.first() for name in sites}, options["lam"]
    for round in range(ROUNDS):
        for name, site in sites.items():
            own[name] = descent(
                task, own[name], site, LOCAL, round, slot="personal", correct=lambda n, g, p, w=w: g + lam * (p - w[n])
            )
        w = mean([descent(task, w, site, LOCAL, round) for site in sites.values()], sizes(sites))
    return w, own


def pfedme(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """T. Dinh et al. (2020), Algorithm 1: K steps of θ on each minibatch, then ``w ← w − η λ (w − θ)``."""
    shared, own = task.first(), dict[str, Tree]()
    lam, eta, names = options["lam"], options["eta"], learned(task)
    for round in range(ROUNDS):
        ends = []
        for name, site in sites.items():
            model, w = ready(task, shared), {n: shared[n].clone() for n in names}
            optimizer = torch.optim.SGD(model.parameters(), ETA)
            for x, y in minibatches(LOCAL, site, round):
                for _ in range(options["steps"]):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    for n, p in model.named_parameters():
                        pull = lam * (p.detach() - w[n])
                        p.grad = pull if p.grad is None else p.grad + pull
                    optimizer.step()
                w = {n: w[n] - eta * lam * (w[n] - p.detach()) for n, p in model.named_parameters()}
            own[name] = params_of(model)
            ends.append({**own[name], **w})
        shared = mean(ends, sizes(sites))
    return shared, own


def apfl(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Deng et al. (2020), Algorithm 1, and equation 10 on the first minibatch of a round."""
    shared, own = task.first(), {name: task.first() for name in sites}
    shares, names = dict.fromkeys(sites, options["alpha"]), learned(task)
    for round in range(ROUNDS):
        ends = []
        for name, site in sites.items():
            w, v, a, first = ready(task, shared), own[name], shares[name], True
            optimizer = torch.optim.SGD(w.parameters(), ETA)
            for x, y in minibatches(LOCAL, site, round):
                now = {n: p.detach().clone() for n, p in w.named_parameters()}
                blend = ready(task, {**v, **{n: a * v[n] + (1 - a) * now[n] for n in names}})
                F.cross_entropy(blend(x), y).backward()
                optimizer.zero_grad()
                F.cross_entropy(w(x), y).backward()
                optimizer.step()
                slopes = {n: p.grad for n, p in blend.named_parameters() if p.grad is not None}
                moved = a - ETA * sum(float(((v[n] - now[n]) * g).sum()) for n, g in slopes.items())
                statistics = {n: b for n, b in params_of(blend).items() if n not in names}
                v = {**v, **statistics, **{n: v[n] - ETA * a * g for n, g in slopes.items()}}
                a, first = min(max(moved, 0.0), 1.0) if first else a, False
            own[name], shares[name] = v, a
            ends.append(params_of(w))
        shared = mean(ends, sizes(sites))
    return shared, {
        k: {n: shares[k] * v[n] + (1 - shares[k]) * shared[n] if n in names else v[n] for n in v}
        for k, v in own.items()
    }


def moon(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Li et al. (CVPR 2021), Algorithm 1, with the representation that enters the head."""
    shared, last = task.first(), {name: task.first() for name in sites}
    for round in range(ROUNDS):
        for name, site in sites.items():
            model, references = ready(task, shared), [load(task.model(), p).eval() for p in (shared, last[name])]
            optimizer = torch.optim.SGD(model.parameters(), ETA)
            for x, y in minibatches(LOCAL, site, round):
                z, scores = entering(model, x)
                with torch.no_grad():
                    near, far = (entering(m, x)[0] for m in references)
                pair = torch.stack([F.cosine_similarity(z, h) / options["temperature"] for h in (near, far)], 1)
                contrast = F.cross_entropy(pair, torch.zeros(len(x), dtype=torch.long))  # −log softmax of the first
                optimizer.zero_grad()
                (F.cross_entropy(scores, y) + options["mu"] * contrast).backward()
                optimizer.step()
            last[name] = params_of(model)
        shared = mean(list(last.values()), sizes(sites))
    return shared, dict.fromkeys(sites, shared)


def fedmri(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Feng et al. (2022), equations 4 to 7: ``β ‖θ − θ_server‖₁ / Σ ‖θ − θ_old‖₁`` of encoders; decoders stay."""
    models, last, others = {name: task.first() for name in sites}, dict[str, Tree](), options["others"]
    names = [n for n in learned(task) if in_encoder(n)]
    for round in range(ROUNDS):
        ends = {}
        for name, site in sites.items():
            model, server = ready(task, models[name]), models[name]
            old = list(last.values()) if others else [last[name]] if name in last else []
            optimizer = torch.optim.SGD(model.parameters(), ETA)
            for x, y in minibatches(LOCAL, site, round):
                loss, own = F.cross_entropy(model(x), y), dict(model.named_parameters())
                if old:
                    near = torch.stack([(own[n] - server[n]).abs().sum() for n in names]).sum()
                    far = torch.stack([(own[n] - o[n]).abs().sum() for o in old for n in names]).sum()
                    loss = loss + options["beta"] * near / (far + 1e-14)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends[name] = params_of(model)
        last = ends
        shared = {n: x for n, x in mean(list(ends.values())).items() if in_encoder(n)}
        models = {name: {**end, **shared} for name, end in ends.items()}
    return shared, models


def iop_fl(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Jiang et al. (2023), inside: FedAvg, and ``t_i ← α t_i + (1 − α) w_i`` of each site's models."""
    w, own, alpha = task.first(), dict[str, Tree](), options["alpha"]
    for round in range(ROUNDS):
        ends = {name: descent(task, w, site, LOCAL, round) for name, site in sites.items()}
        own = {
            k: {n: alpha * own[k][n] + (1 - alpha) * x for n, x in end.items()} if k in own else end
            for k, end in ends.items()
        }
        w = mean(list(ends.values()), sizes(sites))
    return w, own


def fedsm(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Xu et al. (2022), Algorithm 1: FedAvg, and personal models that are averaged softly."""
    w, own, keep = task.first(), {name: task.first() for name in sites}, options["pull"]
    for round in range(ROUNDS):
        ends = {k: descent(task, own[k], site, LOCAL, round, slot="personal") for k, site in sites.items()}
        own = {
            k: {n: keep * x + (1 - keep) / 2 * sum(ends[j][n] for j in ends if j != k) for n, x in end.items()}
            for k, end in ends.items()
        }
        w = mean([descent(task, w, site, LOCAL, round) for site in sites.values()], sizes(sites))
    return w, own


def ifca(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Ghosh et al. (2020), Algorithm 1 with model averaging: a site joins the model with its lowest loss."""
    models, chosen = [task.first(), task.first(1001)], dict[str, int]()
    for round in range(ROUNDS):
        ends: list[list[Tree]] = [[], []]
        weights: list[list[float]] = [[], []]
        for name, site in sites.items():
            losses = [full_loss(task, model, site) for model in models]
            chosen[name] = losses.index(min(losses))
            ends[chosen[name]].append(descent(task, models[chosen[name]], site, LOCAL, round))
            weights[chosen[name]].append(float(len(site.data["train"])))
        models = [mean(e, w) if e else model for e, w, model in zip(ends, weights, models, strict=True)]
    largest = max((0, 1), key=lambda j: sum(weights[j]))
    return models[largest], {name: models[j] for name, j in chosen.items()}


def fednorm(task: Classification, sites: dict[str, Site], options: dict[str, Any]) -> Found:
    """Bernecker et al. (2022), section 3: normalization is averaged within a modality, all else over all sites."""
    of, models, layers = options["modalities"], {name: task.first() for name in sites}, normalization(task)
    for round in range(ROUNDS):
        ends = [descent(task, models[name], site, LOCAL, round) for name, site in sites.items()]
        for name, modality in zip(sites, of, strict=True):
            same = [k for k in range(3) if of[k] == modality]
            inside = mean([ends[k] for k in same], [sizes(sites)[k] for k in same])
            over_all = mean(ends, sizes(sites))
            models[name] = {n: inside[n] if n in layers else x for n, x in over_all.items()}
    shared = {n: x for n, x in models["site-0"].items() if n not in layers}
    return shared, models


PUBLISHED: dict[str, tuple[str, Reference, dict[str, Any]]] = {
    "fedbn": ("fedbn", fedbn, {}),
    "silobn": ("silobn", silobn, {}),
    "fedper": ("fedper", fedper, {}),
    "lg-fedavg": ("lg-fedavg", lg_fedavg, {}),
    "fedrep": ("fedrep", fedrep, {"head_epochs": 2}),
    "ditto": ("ditto", ditto, {"lam": 3.0}),
    "pfedme": ("pfedme", pfedme, {"lam": 5.0, "eta": 0.05, "steps": 3}),
    "apfl": ("apfl", apfl, {"alpha": 0.6}),
    "moon": ("moon", moon, {"mu": 5.0, "temperature": 0.3}),
    "fedmri": ("fedmri", fedmri, {"beta": 0.5, "others": False}),
    "fedmri, all encoders": ("fedmri", fedmri, {"beta": 0.5, "others": True}),
    "iop-fl": ("iop-fl", iop_fl, {"alpha": 0.3}),
    "fedsm": ("fedsm", fedsm, {"pull": 0.7}),
    "ifca": ("ifca", ifca, {}),
    "fednorm": ("fednorm", fednorm, {"modalities": ("mr", "ct", "mr")}),
}
WITHOUT_EFFECT = {("silobn", kind) for kind in ("cnn, group", "cnn, group, 3-D", "vit", "vit, 3-D")} | {("ifca", "vit")}
"""Without running statistics there is nothing to keep, and all sites may choose one of IFCA's two models."""


def own_model(method: Any, state: Any, memory: Any, name: str, task: Classification) -> Tree:
    """The model with which a site predicts, without the parts of other sites."""
    if "personal" in state._fields:
        return dict(state.personal[name])
    found = method.site_model(method.evaluation_request(state).for_site(name), memory)
    return {n: leaf for n, leaf in found.items() if n in task.first()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_three_rounds_are_the_published_ones(case: str, kind: str) -> None:
    name, reference, options = PUBLISHED[case]
    task, sites = place(kind)
    method = build(name, Setting(task, LOCAL, tuple(sites), ROUNDS), options)
    step, engine = run(method, sites, task.first(), ROUNDS)
    shared, models = reference(task, sites, options)
    agree({n: leaf for n, leaf in step.state.params.items() if n in shared}, shared)
    for site in sites:
        agree(own_model(method, step.state, engine.memory.get(site, {}), site, task), models[site])
    plain, _ = kept(task, sites, lambda name: False)
    differs = max(largest_gap({n: x for n, x in model.items() if n in plain}, plain) for model in models.values())
    assert (differs > 5e-4) == ((case, kind) not in WITHOUT_EFFECT)
