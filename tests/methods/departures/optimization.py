"""Departures of methods of federated optimization and of aggregation."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply, WeightedMean
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import load
from polyclinic.learning.tasks.risk import full_gradient, trained
from polyclinic.learning.training.sharpness import matched
from polyclinic.methods.aggregation.dynamic_fusion import DynamicFusion
from polyclinic.methods.aggregation.fedce import FedCE
from polyclinic.methods.aggregation.fedlws import FedLWS
from polyclinic.methods.aggregation.pfa import progressive
from polyclinic.methods.aggregation.pid_weights import PIDWeights
from polyclinic.methods.aggregation.prrfl import PRRFL
from polyclinic.methods.class_imbalance.logit_adjustment import LogitAdjusted
from polyclinic.methods.fairness.feddg_ga import adjusted
from polyclinic.methods.fairness.fedism import SHARPNESS, FedISM
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedcm import FedCM
from polyclinic.methods.optimization.fedexp import FedExP
from polyclinic.methods.optimization.fedsam import fedsam
from polyclinic.methods.optimization.fedspeed import FedSpeed
from tests.conftest import Rows, little_sites
from tests.support.departures import LOCAL, NAMES, apart, departs, moves, small
from tests.support.few_labels import run

STATISTICS = "running statistics after 1 round, relative to their change"
MODEL = "the global model after {}, relative to its change"


def _statistics(method: Any) -> float:
    """Return how far running statistics are if the first pass of a step counts too."""
    sites, start = little_sites(), small().first()
    found = moves(method, sites, start)
    with patch("polyclinic.learning.training.sharpness.still", lambda model: nullcontext()):
        published = moves(method, sites, start)
    running = {name for name in start if "running" in name}
    assert apart(*(tree.select(m, lambda n: n not in running) for m in (found, published, start))) < 1e-6
    return apart(*(tree.select(m, running.__contains__) for m in (found, published, start)))


@departs("fedsam", "the first pass of a step does not update running statistics", STATISTICS + "; weights agree")
def fedsam_statistics() -> float:
    return _statistics(fedsam(small(), LOCAL, NAMES, 5))


@departs("fedspeed", "the first pass of a step does not update running statistics", STATISTICS + "; weights agree")
def fedspeed_statistics() -> float:
    return _statistics(FedSpeed(small(), 3, LOCAL))


class OwnSteps(FedCM):
    """FedCM whose sites divide by their own number of steps."""

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        reply, memory = super().site_update(request, memory, site)
        far = float(reply.mean("work").value["distance"])
        own = WeightedMean.of(tree.scale(reply.mean("update").value, 1 / far))
        return Reply({**reply.parts, "own": own}), memory

    def server_update(self, state: Any, reply: Any, server: Any) -> Any:
        after = super().server_update(state, reply, server)
        own = tree.select(reply.mean("own").value, after.direction.__contains__)
        return after._replace(direction=tree.scale(own, -1.0))


@departs(
    "fedcm",
    "K is the mean number of local steps if sites differ",
    MODEL.format("3 rounds") + "; sites of 2, 2 and 3 steps",
)
def fedcm_steps() -> float:
    start = small().first()
    found, published = (moves(kind(small(), LOCAL), little_sites(), start, 3) for kind in (FedCM, OwnSteps))
    return apart(found, published, start)


def _opposed() -> Any:
    """Sites with constant labels, which disagree."""
    sites = little_sites()
    return {
        name: replace(s, data={"train": Rows(s.data["train"].x, torch.full_like(s.data["train"].y, k % 2))})
        for k, (name, s) in enumerate(sites.items())
    }


@departs(
    "fedexp", "ε is not multiplied by the number of sites", MODEL.format("1 round") + "; three sites that disagree"
)
def fedexp_epsilon() -> float:
    start = small().first()
    found, published = (moves(FedExP(small(), LOCAL, e, True), _opposed(), start) for e in (1e-3, 3e-3))
    return apart(found, published, start)


class Changing(PRRFL):
    """PRR-FL that decides the direction of distillation in each epoch."""

    def learn(self, deputy: Tree, round: int, memory: Any, site: Any) -> Any:
        once = replace(self, local=replace(self.local, epochs=1))
        for epoch in range(self.local.epochs):
            deputy, memory = PRRFL.learn(once, deputy, 100 * round + epoch, memory, site)
        return deputy, memory


class Held(Changing):
    """The same minibatches, with one direction in a round."""

    def learn(self, deputy: Tree, round: int, memory: Any, site: Any) -> Any:
        decided = self.stage(deputy, memory, site)
        with patch.object(PRRFL, "stage", lambda *_: decided):
            return super().learn(deputy, round, memory, site)


@departs(
    "prr-fl", "the direction of distillation is decided once per round", MODEL.format("3 rounds") + "; 4 epochs a round"
)
def prrfl_decisions() -> float:
    start, local = small().first(), replace(LOCAL, epochs=4, lr=0.02)
    found, published = (moves(kind(small(), 3, local), little_sites(), start, 3) for kind in (Held, Changing))
    return apart(found, published, start)


def _lopsided(shape: tuple[int, ...], fraction: float) -> tuple[torch.Tensor, ...]:
    """The published window: one row and column more at negative frequencies."""
    from polyclinic.learning.training.fourier import low_frequencies

    rows = []
    for n, low in zip(shape, low_frequencies(shape, fraction), strict=True):
        most = int(torch.minimum(low, n - low).max())
        rows.append(torch.cat([low, torch.tensor([(-most - 1) % n])]).unique())
    return tuple(rows)


@departs("pfa", "the low-frequency window is symmetric", "weights of a 3 × 3 convolution, relative to their change")
def pfa_window() -> float:
    rng = torch.Generator().manual_seed(0)
    models: Any = {name: {"w": torch.randn(8, 4, 3, 3, generator=rng)} for name in NAMES}
    found = progressive(models, 0.7)["site-0"]
    with patch("polyclinic.methods.aggregation.pfa.low_frequencies", _lopsided):
        published = progressive(models, 0.7)["site-0"]
    return apart(found, published, models["site-0"])


def _slope_of_alpha(norm: str) -> float:
    """Compare with central differences of the validation loss of the mixture of whole models, in evaluation mode."""
    task, sites, start = small(norm), little_sites(), small(norm).first()
    ends = [LOCAL.fit(task, start, site, 0) for site in sites.values()]

    def mixture(alpha: torch.Tensor) -> Tree:
        return {n: sum(a * end[n].double() for a, end in zip(alpha, ends, strict=True)) for n in start}

    def value(alpha: torch.Tensor) -> float:
        model = load(task.model().double(), mixture(alpha)).eval()
        data = [site.data["val"] for site in sites.values()]
        x, y = torch.cat([d.x for d in data]).double(), torch.cat([d.y for d in data])
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(x), y))

    even, step = torch.full((3,), 1 / 3).double(), 1e-6 * torch.eye(3).double()
    published = torch.tensor([(value(even + h) - value(even - h)) / 2e-6 for h in step])
    theta = {n: leaf.float() for n, leaf in mixture(even).items()}
    slopes = [full_gradient(task, theta, site, 0, "val") for site in sites.values()]
    mean = {n: torch.stack([s[n] for s in slopes]).mean(0) for n in slopes[0]}
    found = torch.tensor([tree.dot(mean, tree.select(end, mean.__contains__)) for end in ends])
    one, two = (x - x.mean() for x in (found, published))  # a common part has no effect on the softmax
    return float((one - two).norm() / two.norm())


SLOPE = "∂L/∂α of three sites without its mean, relative, on {} normalization"


@departs("auto-fedavg", "gradients are computed at the server", SLOPE.format("group"))
def auto_fedavg_server() -> float:
    return _slope_of_alpha("group")


@departs("auto-fedavg", "batch statistics in place of running ones", SLOPE.format("batch"))
def auto_fedavg_statistics() -> float:
    return _slope_of_alpha("batch")


class ByAccuracy(FedCE):
    """FedCE whose error is 1 minus the accuracy on validation data."""

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        with patch("polyclinic.methods.aggregation.fedce.risk", _error):
            return super().site_update(request, memory, site)


def _error(task: Any, params: Tree, site: Any, round: int, role: str = "train") -> float:
    from polyclinic.learning.objectives.distillation_loss import answers

    z, y = answers(task, params, site.data["val"])
    return float((z.argmax(1) != y).float().mean())


@departs(
    "fedce",
    "the error of the model without a site is a loss on training data",
    "largest difference of a site's weight after 4 rounds, in points of 1",
)
def fedce_error() -> float:
    start = small().first()
    found, published = (run(kind(small(), LOCAL), little_sites(), start, 4)[0].state for kind in (FedCE, ByAccuracy))
    return max(abs(found.weights[n] - published.weights[n]) for n in NAMES)


@departs(
    "dynamic-fusion",
    "decides by the validation loss instead of accuracy",
    "share of 30 decisions that differ (3 sites, 10 rounds)",
)
def dynamic_fusion_decisions() -> float:
    task, sites, differ = small(), little_sites(), 0
    params, local = task.first(), replace(LOCAL, lr=0.02)
    method = DynamicFusion(task, local)
    for round in range(10):
        for site in sites.values():
            request = method.request(method.init(params)._replace(round=round))
            reply, _ = method.site_update(request, {}, site)
            improved = bool(reply.gather("gain")[site.name]["better"])
            end = local.fit(task, params, site, round)
            differ += improved != (_error(task, end, site, 0) < _error(task, params, site, 0))
        params = moves(FedAvg(task, local), sites, params)
    return differ / 30


@departs(
    "fedcostwavg",
    "a term whose sum is 0 is omitted",
    "largest difference of a site's weight in the second round, where all sums exist, in points of 1",
)
def fedcostwavg_sums() -> float:
    """The published weights are α n_i / Σ n + β r_i / Σ r, with the ratio r of two losses."""
    method = PIDWeights(small(), LOCAL, 0.5, 0.5, 0.0, True)
    sizes, losses = (12, 17, 22), ([0.7, 0.6], [0.9, 0.5], [0.8, 0.7])
    amounts = [method.amounts(n, own) for n, own in zip(sizes, losses, strict=True)]
    sums = {k: sum((a[k] for a in amounts), torch.zeros(()).double()) for k in amounts[0]}
    found = [method.weight(a, sums) for a in amounts]
    ratios = [a / b for a, b in losses]
    published = [0.5 * n / sum(sizes) + 0.5 * r / sum(ratios) for n, r in zip(sizes, ratios, strict=True)]
    return max(abs(a / sum(found) - b) for a, b in zip(found, published, strict=True))


@departs(
    "fedpidavg",
    "an increase of the loss counts as 0",
    "largest difference of a site's weight if the loss of one of three sites rises by a fifth of the others' decrease",
)
def fedpidavg_increase() -> float:
    method = PIDWeights(small(), LOCAL)
    losses = ([0.7, 0.6], [0.7, 0.6], [0.7, 0.72])
    amounts = [method.amounts(10, own) for own in losses]
    sums = {k: sum((a[k] for a in amounts), torch.zeros(()).double()) for k in amounts[0]}
    found = [method.weight(a, sums) for a in amounts]
    drops, totals = [a - b for a, b in losses], [sum(own) for own in losses]
    published = [0.45 / 3 + 0.45 * d / sum(drops) + 0.1 * m / sum(totals) for d, m in zip(drops, totals, strict=True)]
    return max(abs(a / sum(found) - b) for a, b in zip(found, published, strict=True))


class CutAfterBias(FedLWS):
    """FedLWS whose layers end with each bias of the list of all tensors, statistics included."""

    def server_update(self, state: Any, reply: Any, server: Any) -> Any:
        sent = reply.gather("update")
        changes = {s: {n: leaf for n, leaf in c.items() if n in state.params} for s, c in sent.items()}
        sizes = [next(float(leaf) for n, leaf in c.items() if n not in state.params) for c in sent.values()]
        mean = {
            n: sum(w * c[n] for w, c in zip(sizes, changes.values(), strict=True)) / sum(sizes) for n in state.params
        }
        moved, group = dict(tree.shift(state.params, mean)), list[str]()
        for name in state.params:
            group.append(name)
            if name.endswith("bias") or name == list(state.params)[-1]:
                by = self.shrinkage(
                    *(tree.select(t, group.__contains__) for t in (state.params, mean, *changes.values()))
                )
                moved |= {n: moved[n] * by for n in group}
                group = []
        return state._replace(round=state.round + 1, params=moved)


@departs(
    "fedlws",
    "a layer is a module; running statistics are not shrunk",
    "trained weights after 3 rounds, relative to their change",
)
def fedlws_layers() -> float:
    start, learned = small().first(), trained(small())
    found, published = (moves(kind(small(), LOCAL), little_sites(), start, 3) for kind in (FedLWS, CutAfterBias))
    return apart(*(tree.select(m, learned.__contains__) for m in (found, published, start)))


class BalancedISM(FedISM):
    """FedISM that trains with a balanced softmax, whereas its sharpness is of the plain loss."""

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        start, task = request.trees["params"], self.task
        shift = LogitAdjusted(task, self.local).shift(site)

        def balanced(model: Any, batch: Any) -> Any:
            return F.cross_entropy(model(batch[0]) + shift, batch[1])

        told, _ = super().site_update(request, memory, site)
        sharp = told.gather("update")[site.name][SHARPNESS]
        loss = matched(balanced, self.rho, self.surrogate)
        change = self.local.change(task, start, site, request.round, loss=loss)
        return Reply({"update": PerSiteUniform({site.name: {**change, SHARPNESS: sharp}})}), memory


@departs(
    "fedism",
    "the loss is the study's instead of a balanced softmax",
    "the global model after 2 rounds, relative to its change; three classes",
)
def fedism_loss() -> float:
    task, sites = small(classes=3), little_sites(classes=3)
    start = task.first()
    found, published = (moves(kind(task, LOCAL), sites, start, 2) for kind in (FedISM, BalancedISM))
    return apart(found, published, start)


@departs(
    "feddg-ga",
    "the step is divided by the number of sites instead of 3",
    "largest difference of a site's weight in the first step of four sites, in points of 1; 0 with three sites",
)
def feddg_ga_step() -> float:
    weights, gaps = dict.fromkeys("abcd", 0.25), {"a": 0.4, "b": -0.1, "c": 0.2, "d": -0.3}
    found, published = (adjusted(weights, gaps, 0.2 / by) for by in (4, 3))
    return max(abs(found[n] - published[n]) for n in weights)
