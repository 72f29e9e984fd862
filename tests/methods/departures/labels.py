"""Departures of semi-supervised, self-supervised and distilling methods, and of those for unequal machines."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.class_relations import matrix, relation_of, reliable
from polyclinic.learning.objectives.distillation_loss import Dual, answers, divergence
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.methods.base.phases import Then
from polyclinic.methods.distillation.feddf import FedDF
from polyclinic.methods.distillation.fedmd import FedMD
from polyclinic.methods.distillation.fedmic import fedmic
from polyclinic.methods.heterogeneity.partial_work import partial_work
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.self_supervised.fedmae import fedmae
from polyclinic.methods.semi_supervised import fedperl
from polyclinic.methods.semi_supervised.fedmix import FedMix
from polyclinic.methods.semi_supervised.histofl import HistoFL
from polyclinic.methods.semi_supervised.mixed_annotations import MixedSegmentation
from tests.conftest import Rows, little_sites, segmentation_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import minibatches, ready
from tests.support.departures import LOCAL, apart, departs, moves, small
from tests.support.few_labels import half_labeled, run
from tests.support.known import known

MODEL = "the global model after {}, relative to its change"
SCORES = "largest difference of a predicted probability"


@departs(
    "fedirm",
    "missing classes do not count as uniform rows",
    "largest difference of an entry of the relation matrix of three sites",
)
def fedirm_missing() -> float:
    """Two sites have both classes, and the third lacks one."""
    task, sites = small(), little_sites()
    params = moves(FedAvg(task, LOCAL), sites, task.first(), 5)
    data = [site.data["train"] for site in sites.values()]
    data[2] = Rows(data[2].x[data[2].y == 0], data[2].y[data[2].y == 0])
    sent = [relation_of(task, params, d, 2.0) for d in data]
    found = (sent[0] + sent[1] + sent[2]).value["matrix"]
    each = []
    for d in data:
        z, y = answers(task, params, d)
        each.append(matrix(z, F.one_hot(y, 2).float(), 2.0))
    return float((found - torch.stack(each).mean(0)).abs().max())


@departs(
    "fedirm",
    "a labeled site's matrix comes from one pass with the trained model instead of from its minibatches",
    "largest difference of an entry of the relation matrix of a site in the fifth round",
)
def fedirm_minibatches() -> float:
    task, site = small(), little_sites()["site-1"]
    params = moves(FedAvg(task, LOCAL), little_sites(), task.first(), 4)
    model, rows = ready(task, params), list[Tensor]()
    optimizer = torch.optim.SGD(model.parameters(), LOCAL.lr)
    for x, y in minibatches(LOCAL, site, 4):
        z = model(x)
        rows.append(matrix(z.detach(), F.one_hot(y, 2).float(), 2.0))
        optimizer.zero_grad()
        F.cross_entropy(z, y).backward()
        optimizer.step()
    end = LOCAL.fit(task, params, site, 4)
    found = relation_of(task, end, site.data["train"], 2.0).value["matrix"]
    return float((found - torch.stack(rows).mean(0)).abs().max())


@departs(
    "fedirm",
    "the largest entropy is a share of ln C",
    "share of the confident pseudo-labels of 5 classes that are left out, and that the published limit of 2.0 keeps",
)
def fedirm_entropy() -> float:
    """Of random logits whose passes vary."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 5, generator=rng)
    passes = logits + 0.5 * torch.randn(10, 1000, 5, generator=rng)
    kept = [reliable(logits, passes, 0.3, limit).sum() for limit in (0.9, 2.0 / math.log(5))]
    return float(1 - kept[0] / kept[1])


@departs(
    "fedperl",
    "descriptors without accuracy and loss on images of the server",
    "largest difference of the similarity of two of four sites",
)
def fedperl_descriptor() -> float:
    task, sites = small(), little_sites(count=4)
    start = moves(FedAvg(task, LOCAL), sites, task.first(), 2)
    models = {n: LOCAL.fit(task, start, site, 2) for n, site in sites.items()}
    found, plain = fedperl.similarities(models), fedperl.descriptor

    def longer(params: Tree) -> Tensor:
        z, y = answers(task, params, sites["site-0"].data["val"])
        scores = [(z.argmax(1) == y).double().mean(), F.cross_entropy(z, y).double()]
        return torch.cat([plain(params), torch.stack(scores)])

    with patch.object(fedperl, "descriptor", longer):
        return float((fedperl.similarities(models) - found).abs().max())


def _perl(**changes: Any) -> float:
    """Return how far FedPerl's global model is after 3 rounds if names in its module are replaced."""
    task, sites = small(), half_labeled(count=4, labeled=2, sites=little_sites(count=4))
    method = fedperl.FedPerl(task, 5, LOCAL)
    found = moves(method, sites, task.first(), 3)
    with patch.multiple(fedperl, **changes):
        published = moves(method, sites, task.first(), 3)
    return apart(found, published, task.first())


def _confident_mean(logits: Tensor, probability: Tensor, threshold: float) -> Tensor:
    sure, label = probability.detach().max(1)
    kept = (sure >= threshold).float()
    return (F.cross_entropy(logits, label, reduction="none") * kept).sum() / kept.sum().clamp_min(1)


@departs(
    "fedperl",
    "pseudo-labels are averaged over all images instead of the confident ones",
    MODEL.format("3 rounds") + "; two of four sites unlabeled",
)
def fedperl_mean() -> float:
    return _perl(pseudo_loss=_confident_mean)


class _Detached:
    """``torch.nn.functional`` whose mean squared error has no gradient."""

    mse_loss = staticmethod(lambda own, other: F.mse_loss(own.detach(), other))
    normalize = staticmethod(F.normalize)


@departs(
    "fedperl", "the agreement with the peer has a gradient", MODEL.format("3 rounds") + "; two of four sites unlabeled"
)
def fedperl_gradient() -> float:
    return _perl(F=_Detached)


UNET = Segmentation(Network("unet", (1, 16, 16), 2, (("norm", "batch"), ("width", 2))))


@departs(
    "fedmix",
    "empty masks are used only of images known to be empty",
    "share of the unlabeled images of three sites whose masks are both empty, and which the published rule uses, after 5 rounds",
)
def fedmix_empty() -> float:
    sites = segmentation_sites()
    method = FedMix(UNET, replace(LOCAL, batch_size=5))
    step, _ = run(method, sites, UNET.first(), 5)
    mixed, images = MixedSegmentation(UNET), [site.data["unlabeled"].x for site in sites.values()]
    model: Any = load(mixed.model(), step.state.twins).eval()
    with torch.no_grad():
        masks = [(model.first(x).argmax(1), model.second(x).argmax(1)) for x in images]
    empty = [(~(a > 0).flatten(1).any(1) & ~(b > 0).flatten(1).any(1)) for a, b in masks]
    return float(torch.cat(empty).float().mean())


@departs("fedmix", "sites predict with the first network", SCORES + " from the second network after 5 rounds")
def fedmix_second() -> float:
    sites = segmentation_sites()
    step, _ = run(FedMix(UNET, replace(LOCAL, batch_size=5)), sites, UNET.first(), 5)
    data = sites["site-0"].data["test"]
    one, two = (answers(UNET, tree.under(n, step.state.twins), data)[0].softmax(1) for n in ("first", "second"))
    return float((one - two).abs().max())


@departs(
    "histofl",
    "the noise is added at the sites, and weighted as they are",
    "standard deviation of the noise in the mean of three equal sites, relative to the published code, which adds it to the mean",
)
def histofl_noise() -> float:
    task = Classification(Network("mlp", (400,), 100, (("depth", 0),)))
    rng = torch.Generator().manual_seed(0)
    data = Rows(torch.randn(8, 400, generator=rng), torch.arange(8))
    sites = {n: replace(s, data={"train": data}) for n, s in little_sites().items()}
    frozen, start = replace(LOCAL, lr=1e-12), task.first()
    found = moves(HistoFL(task, frozen, noise=1.0, uniform=True), sites, start)["head.weight"] - start["head.weight"]
    published = math.sqrt(3) * start["head.weight"].std()
    return float(found.std() / published)


@departs(
    "fedkd",
    "no gradient passes through the other model or through the divisor",
    "gradient of both models on one minibatch, relative",
)
def fedkd_gradient() -> float:
    task, site = small(), little_sites()["site-1"]
    dual = Dual(task, task, (1.0, 1.0), (1.0, 1.0), 1.0, True, 1.0)
    torch.manual_seed(0)
    model: Any = dual.model().train()
    batch = next(minibatches(LOCAL, site))
    weights = list(model.parameters())
    found = torch.autograd.grad(dual.loss(model, batch), weights)

    def linked(kind: str, learner: Tensor, target: Tensor, temperature: float) -> Tensor:
        return divergence(kind, learner, target, temperature)

    with (
        patch.object(Tensor, "detach", lambda x: x),
        patch("polyclinic.learning.objectives.distillation_loss.divergence", linked),
    ):
        published = torch.autograd.grad(dual.loss(model, batch), weights)
    one, two = (torch.cat([g.flatten() for g in gs]) for gs in (found, published))
    return float((one - two).norm() / two.norm())


@departs(
    "fedkd",
    "the broadcast is sent as full weights",
    "numbers in a request, relative to the factors that the decomposed change has",
)
def fedkd_broadcast() -> float:
    from polyclinic.core.low_rank import factors

    task = Classification(Network("mlp", (64,), 2, (("depth", 2), ("width", 64))))
    rng = torch.Generator().manual_seed(0)
    site = {
        "a": replace(
            little_sites()["site-0"],
            name="a",
            data={"train": Rows(torch.randn(64, 64, generator=rng), torch.arange(64) % 2)},
        )
    }
    method = fedmic(task, LOCAL, broadcast=True)
    end = moves(method, site, task.first(), 1)
    change = tree.sub(end, task.first())
    small_ones = [factors(leaf, 0.951) for leaf in change.values()]
    sent = sum(
        f[0].numel() + f[1].numel() if f else leaf.numel() for f, leaf in zip(small_ones, change.values(), strict=True)
    )
    return tree.size(end) / sent


@departs(
    "fedmd",
    "public images have no labels, so that the initial training on them is omitted",
    SCORES + " on public images (consensus after 2 rounds) from sites that trained on them for 5 epochs first",
)
def fedmd_pretraining() -> float:
    task, sites = small(), little_sites()
    start = task.first()
    public = sites["site-0"].data["public"]
    pretrained = replace(LOCAL, epochs=5).fit(task, start, sites["site-0"], 0, data=public)
    indexed = {
        n: replace(s, data={**s.data, "public": Rows(public.x, torch.arange(len(public)))}) for n, s in sites.items()
    }
    one, two = (
        run(FedMD(task, LOCAL), indexed, p, 2)[0].state.consensus["scores"].softmax(1) for p in (start, pretrained)
    )
    return float((one - two).abs().max())


@departs(
    "feddf",
    "distills for a fixed number of epochs instead of selecting by validation",
    "the global model after 1 round, relative to its change; the best of 5 epochs on 36 labeled images",
)
def feddf_selection() -> float:
    task, sites, start = small(), little_sites(), small().first()
    public = Rows(sites["site-0"].data["public"].x, torch.arange(12))
    ends = [
        moves(FedDF(task, LOCAL, distil_epochs=e, distil_batch=4), sites, start, 1, server_data={"public": public})
        for e in range(1, 6)
    ]
    losses = []
    for end in ends:
        pairs = [answers(task, end, site.data["val"]) for site in sites.values()]
        losses.append(float(F.cross_entropy(torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs]))))
    return apart(ends[-1], ends[losses.index(min(losses))], start)


@departs(
    "partial-work",
    "draws steps instead of epochs",
    "difference of the mean share of its work that a late site does (20 epochs)",
)
def partial_work_steps() -> float:
    """The paper draws a whole number of epochs between 1 and all, at even odds."""
    method, site = partial_work(small(), replace(LOCAL, epochs=20), late=1.0), little_sites()["site-1"]
    whole, done = method.inner.local.count(site.data["train"]), list[int]()

    def count(self: Any, request: Any, memory: Any, site: Any) -> Any:
        done.append(self.local.steps)
        return None, memory

    request = known(method.request(method.init(small().first())))
    with patch.object(type(method.inner), "site_update", count):
        for round in range(500):
            method.site_update(replace(request, round=round), {}, site)
    return abs(sum(done) / len(done) / whole - sum(range(1, 21)) / 20 / 20)


@departs(
    "fedmae",
    "fine-tuning without layer-wise decay of the learning rate",
    "a transformer of two layers after 1 round of fine-tuning, relative to its change; decay 0.75",
)
def fedmae_decay() -> float:
    task = Classification(NETWORKS["vit"][0])
    sites, start = little_sites(), task.first()
    method = fedmae(task, LOCAL, 2, pretrain=0.0)
    assert isinstance(method, Then)

    def depth(name: str) -> int:
        """The number of layers above: the head has none."""
        parts = name.split(".")
        if "blocks" in parts:
            return 2 - int(parts[parts.index("blocks") + 1])
        return 3 if "patch_embedding" in name else 0

    class Decayed(FedAvg):
        def site_update(self, request: Any, memory: Any, site: Any) -> Any:
            begun = request.trees["params"]
            end = self.local.fit(
                self.task, begun, site, request.round, gradient_hook=lambda name, g: g * 0.75 ** depth(name)
            )
            from polyclinic.core.aggregates import Reply

            return Reply({"update": self.update(end, begun, site)}), memory

    found, published = (moves(m, sites, start) for m in (FedAvg(task, LOCAL), Decayed(task, LOCAL)))
    assert apart(moves(method, sites, start), found, start) < 1e-6
    return apart(found, published, start)
