"""Departures of methods for domain adaptation, harmonization, class imbalance and noisy labels."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.latent import encoded
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.adversarial import Discriminator
from polyclinic.learning.tasks.classification import MultiLabel
from polyclinic.learning.training.augmentation import STRONG
from polyclinic.learning.training.fourier import compose, crop, restyle, spectrum
from polyclinic.methods.class_imbalance.fedetf import fedetf
from polyclinic.methods.class_imbalance.fediic import FedIIC
from polyclinic.methods.class_imbalance.logit_adjustment import LogitAdjusted
from polyclinic.methods.domain_adaptation.fedalign import FedAlign
from polyclinic.methods.domain_adaptation.fedharmony import FedHarmony
from polyclinic.methods.domain_adaptation.mrcm import MRCM
from polyclinic.methods.harmonization.adain import AdaIN
from polyclinic.methods.harmonization.fda import FDA
from polyclinic.methods.harmonization.feature_styles import blocks
from polyclinic.methods.harmonization.fedfa import FedFA, relative
from polyclinic.methods.harmonization.harmofl import HarmoFL
from polyclinic.methods.label_noise.fedcorr import FedCorr
from polyclinic.methods.label_noise.fedmlp import FedMLP
from polyclinic.methods.label_noise.two_groups import higher_group
from tests.conftest import finding_sites, little_sites
from tests.support.agreement import minibatches, ready
from tests.support.departures import LOCAL, NAMES, apart, departs, moves, small
from tests.support.few_labels import run

MODEL = "the global model after {}, relative to its change"
SCORES = "largest difference of a predicted probability"


class WithoutTrue(LogitAdjusted):
    """FedLC as its equation 8 is printed: the true class is not in the denominator."""

    def site_update(self, request: Any, memory: Any, site: Any) -> tuple[Reply, Any]:
        start, shift = request.trees["params"], self.shift(site)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            z = model(batch[0]) + shift
            own = z.gather(1, batch[1][:, None])
            rest = z.masked_fill(F.one_hot(batch[1], z.shape[1]).bool(), -torch.inf)
            return (rest.logsumexp(1) - own[:, 0]).mean()

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory


@departs(
    "fedlc", "the softmax is over all classes, the true one included", MODEL.format("2 rounds") + "; three classes"
)
def fedlc_denominator() -> float:
    task, sites = small(classes=3), little_sites(classes=3)
    start = task.first()
    found, published = (moves(kind(task, LOCAL, rule="root"), sites, start, 2) for kind in (LogitAdjusted, WithoutTrue))
    return apart(found, published, start)


@departs(
    "fedetf",
    "prototypes are not fine-tuned at the sites",
    SCORES + " at a site if its projection and prototypes take one more epoch after 5 rounds",
)
def fedetf_personal() -> float:
    method, sites = fedetf(small(), LOCAL), little_sites()
    step, _ = run(method, sites, small().first(), 5)
    site = sites["site-0"]
    model: Any = load(method.task.model(), step.state.params).eval()
    before = model(site.data["test"].x).softmax(1).detach()
    prototypes = model.head.prototypes.clone().requires_grad_()
    optimizer = torch.optim.SGD([*model.head.project.parameters(), prototypes], LOCAL.lr)
    prior = torch.bincount(site.data["train"].y, minlength=2).float().log()

    def predicted(x: Tensor) -> Tensor:
        f = model.head.project(model.encoder(x))
        logits: Tensor = model.head.beta * F.normalize(f, dim=1) @ prototypes
        return logits

    for x, y in minibatches(LOCAL, site):
        optimizer.zero_grad()
        F.cross_entropy(predicted(x) + prior, y).backward()
        optimizer.step()
    return float((predicted(site.data["test"].x).softmax(1) - before).abs().max().detach())


@departs(
    "fednoro",
    "the mixture starts from one division of the sites instead of nine random ones",
    "share of 20 sets of 12 sites (4 noisy, 5 classes, 3 standard deviations apart) that are divided otherwise",
)
def fednoro_starts() -> float:
    from sklearn.mixture import GaussianMixture

    rng, differ = np.random.default_rng(0), 0
    for _ in range(20):
        x = rng.normal(size=(12, 5)) + np.repeat([3.0, 0.0], [4, 8])[:, None]
        votes = []
        for seed in range(9):
            mixture = GaussianMixture(2, random_state=seed).fit(x)  # with the published defaults
            votes.append(mixture.predict(x) == mixture.means_.sum(1).argmax())
        published = np.array(max((tuple(v) for v in votes), key=[tuple(v) for v in votes].count))
        differ += not np.array_equal(higher_group(torch.from_numpy(x)).numpy(), published)
    return differ / 20


def _lockstep(task: Any, start: Tree, judges: list[Tree], sites: Any, round: int) -> Tree:
    """Fed-Align as published: in each step, all sites' present features and discriminators are used."""
    judge = Discriminator(FedAlign(task).judge.features, 1, 4)
    models = [ready(task, start) for _ in sites]
    guards = [load(judge.model(), j) for j in judges]
    learn, align = ([torch.optim.SGD(m.parameters(), LOCAL.lr) for m in models] for _ in range(2))
    guess = [torch.optim.SGD(g.parameters(), LOCAL.lr) for g in guards]
    streams = [list(minibatches(LOCAL, site, round)) for site in sites.values()]
    noise = torch.Generator().manual_seed(0)
    bce = F.binary_cross_entropy_with_logits
    for t in range(max(map(len, streams))):
        batches = [s[t % len(s)] for s in streams]
        for model, optimizer, (x, y) in zip(models, learn, batches, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        h = [encoded(task.network, m, x) for m, (x, _) in zip(models, batches, strict=True)]
        shown = [f.detach() + 0.001 * f.detach().std() * torch.randn(f.shape, generator=noise) for f in h]
        for i, (guard, optimizer) in enumerate(zip(guards, guess, strict=True)):
            optimizer.zero_grad()
            own, other = guard(h[i].detach()), guard(torch.cat([f for j, f in enumerate(shown) if j != i]))
            (0.1 * (bce(own, torch.ones_like(own)) + bce(other, torch.zeros_like(other)))).backward()
            optimizer.step()
        for i, optimizer in enumerate(align):
            optimizer.zero_grad()
            said = [guard(h[i]) for guard in guards]
            torch.stack([bce(z, torch.ones_like(z)) for z in said]).sum().backward()
            optimizer.step()
    ends = [params_of(m) for m in models]
    return {n: torch.stack([e[n] for e in ends]).mean(0) for n in start}


@departs(
    "fed-align",
    "sites exchange features and discriminators once per round instead of training in lockstep",
    "trained weights after the first round of alignment, relative to their change",
)
def fedalign_lockstep() -> float:
    task, sites = small("group"), little_sites()
    first, _ = run(FedAlign(task, LOCAL, start=1), sites, task.first(), 1)
    second = moves(FedAlign(task, LOCAL, start=1), sites, task.first(), 2)
    start = first.state.params
    published = _lockstep(task, start, [first.state.judges[n] for n in NAMES], sites, 1)
    return apart(second, published, start)


@departs("fedharmony", "no Gaussians in the first round, where the published code has zeros", MODEL.format("1 round"))
def fedharmony_first_round() -> float:
    task, sites, start = small(), little_sites(), small().first()
    method = FedHarmony(task, NAMES, LOCAL)
    width = method.judge.features
    zeros = {n: {"mean": torch.zeros(width), "std": torch.zeros(width)} for n in NAMES}
    ends = []
    for gaussians in ({}, zeros):
        request = method.request(method.init(start)._replace(gaussians=gaussians))
        changes = [method.site_update(request, {}, s)[0].mean("update").value for s in sites.values()]
        ends.append({n: torch.stack([c[n] for c in changes]).mean(0) for n in start})
    return apart(ends[0], ends[1])


@departs(
    "fedharmony",
    "as many features of others as of its own",
    MODEL.format("2 rounds")
    + "; the published code draws all numbers at random, with the size of the minibatch in total",
)
def fedharmony_counts() -> float:
    task, sites, start = small(), little_sites(), small().first()
    rng = np.random.default_rng(0)
    size = {"own": 1, "batch": 2}
    draw = FedHarmony._draw

    def shortened(network: Any, model: Any, x: Tensor) -> Tensor:
        size.update(batch=len(x), own=int(rng.integers(1, len(x) - 1)))
        return encoded(network, model, x)[: size["own"]]

    def drawn(self: Any, request: Any, others: list[int], count: int, generator: torch.Generator) -> Any:
        rest = size["batch"] - size["own"]
        first = int(rng.integers(0, rest + 1))
        parts = [
            draw(self, request, [k], n, generator) for k, n in zip(others, (first, rest - first), strict=True) if n
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    found = moves(FedHarmony(task, NAMES, LOCAL), sites, start, 2)
    where = "polyclinic.methods.domain_adaptation.fedharmony.encoded"
    with patch(where, shortened), patch.object(FedHarmony, "_draw", drawn):
        published = moves(FedHarmony(task, NAMES, LOCAL), sites, start, 2)
    return apart(found, published, start)


def _spatial(network: Any, model: Any, x: Tensor) -> Tensor:
    """Features with their place: the output of the last block before the mean over space."""
    kept: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.ReLU)][-1]
    hook = last.register_forward_hook(lambda *given: kept.append(given[2]))
    model(x)
    hook.remove()
    return kept[0].flatten(1)


@departs("fl-mrcm", "features are averaged over space before the discriminator", MODEL.format("2 rounds"))
def mrcm_space() -> float:
    task, sites, start = small("group"), little_sites(), small("group").first()
    found = moves(MRCM(task, NAMES, LOCAL), sites, start, 2)
    width = _spatial(task.network, task.model(), torch.zeros(1, 1, 8, 8)).shape[1]

    def latent(network: Any, model: Any, data: Any, device: str = "cpu", which: Any = None) -> Tensor:
        with torch.no_grad():
            return _spatial(network, model.eval(), data[which][0])

    where = "polyclinic.methods.domain_adaptation.mrcm."
    with (
        patch(where + "encoded", _spatial),
        patch(where + "encode_all", latent),
        patch(where + "encoded_width", lambda _: width),
    ):
        published = moves(MRCM(task, NAMES, LOCAL), sites, start, 2)
    return apart(found, published, start)


def _amplitude(decay: float) -> Tensor:
    """Return the mean amplitude of three sites of different contrast."""
    sites = little_sites()
    method = HarmoFL(small(), replace(LOCAL, batch_size=4), decay=decay)
    return torch.stack([method._amplitude(site, 0) for site in sites.values()]).mean(0)


@departs(
    "harmofl",
    "the running mean of amplitudes keeps its intended decay",
    "amplitudes of three sites, relative to those of their first minibatches of 4",
)
def harmofl_decay() -> float:
    found, published = _amplitude(0.1), _amplitude(0.0)
    return float((found - published).norm() / published.norm())


class AfterFirst(HarmoFL):
    """HarmoFL whose first round trains on images as they are."""

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        if request.job == "amplitude" or request.round:
            return super().site_update(request, memory, site)
        params = {n: x * (n != "front.amplitude") for n, x in request.trees["params"].items()}
        reply, memory = super().site_update(replace(request, trees={"params": params}), memory, site)
        return reply, memory


@departs("harmofl", "amplitudes are averaged before the first round", MODEL.format("1 round"))
def harmofl_first_round() -> float:
    start = small().first()
    found, published = (moves(kind(small(), LOCAL), little_sites(), start, 1) for kind in (HarmoFL, AfterFirst))
    shared = tree.select(start, published.__contains__)
    return apart(*(tree.select(m, shared.__contains__) for m in (found, published, start)))


@departs(
    "harmofl",
    "the window is the whole spectrum instead of one frequency",
    "harmonized noise images, relative to their change",
)
def harmofl_window() -> float:
    rng = torch.Generator().manual_seed(0)
    x, other = (torch.randn(8, 1, 32, 32, generator=rng) + k for k in (1.0, 2.0))
    found, published = (restyle(x, crop(spectrum(other)[0].mean(0, keepdim=True), w)[0], w) for w in (1.0, 0.0))
    return float((found - published).norm() / (published - x).norm())


@departs(
    "mixstyle",
    "without residual blocks, the places are the first resolutions of the encoder",
    "number of the paper's places (after layer1 and layer2) that are others here in a residual network",
)
def mixstyle_places() -> float:
    found = blocks(Network("resnet10", (1, 64, 64), 2))[:2]
    return float(sum(name != f"layer{k}" for k, name in enumerate(found, 1)))


@departs(
    "fedfa",
    "the variance over sites is by channel, as in the paper and not in the code",
    "largest factor 1 + γ of a channel after 3 rounds, relative to 2, that of all channels in the code",
)
def fedfa_channels() -> float:
    step, _ = run(FedFA(small(), LOCAL, probability=1.0), little_sites(), small().first(), 3)
    return max(float((relative(v) - 1).abs().max()) / 2 for v in step.state.variance.values())


@departs(
    "adain",
    "applied to images instead of features of a trained network",
    "output of a random 3 × 3 convolution, relative to the change by AdaIN of that output",
)
def adain_features() -> float:
    method, rng = AdaIN(small()), torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 1, 16, 16, generator=rng) * s + s for s in (1.0, 2.0))
    kernel = torch.randn(4, 1, 3, 3, generator=rng)
    h, g = F.conv2d(x, kernel), F.conv2d(y, kernel)
    found, published = F.conv2d(method.restyled(x, method.styles(y)), kernel), method.restyled(h, method.styles(g))
    return float((found - published).norm() / (published - h).norm())


@departs(
    "fda",
    "on images with unequal sides, the window is as large a share of the longer axis",
    "restyled noise images of 32 × 64 pixels (β = 0.1), relative to their change; 0 with equal sides",
)
def fda_window() -> float:
    method = FDA(small().with_network(Network("cnn", (1, 32, 64), 2, (("depth", 2), ("width", 4)))), beta=0.1)
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 1, 32, 64, generator=rng) + k for k in (1.0, 2.0))
    found = method.restyled(x, method.styles(y))
    (own, phase), (other, _) = spectrum(x), spectrum(y)
    b = int(0.1 * 32)
    near = [torch.minimum(torch.arange(n), n - torch.arange(n)) <= b for n in (32, 64)]
    published = compose(torch.where(near[0][:, None] & near[1], other, own), phase)
    return float((found - published).norm() / (published - x).norm())


class Colored:
    """Views with other colors, as strong augmentation here has."""

    view = staticmethod(STRONG.view)


@departs(
    "fediic",
    "the views of an image keep its colors",
    MODEL.format("2 rounds") + "; noise, contrast and brightness vary",
)
def fediic_views() -> float:
    start, method = small().first(), FedIIC(small(), replace(LOCAL, lr=0.02), width=16)
    found = moves(method, little_sites(), start, 2)
    with patch("polyclinic.methods.class_imbalance.fediic.WEAK", Colored):
        published = moves(method, little_sites(), start, 2)
    return apart(*(tree.select(m, start.__contains__) for m in (found, published, start)))


@departs(
    "fedmlp",
    "the views of an image keep its colors",
    MODEL.format("3 rounds") + "; noise, contrast and brightness vary",
)
def fedmlp_views() -> float:
    sites = finding_sites()
    task = MultiLabel(small(classes=3).network)
    method, start = FedMLP(task, 10, LOCAL), task.first()
    found = moves(method, sites, start, 3)
    with patch("polyclinic.methods.label_noise.fedmlp.WEAK", Colored):
        published = moves(method, sites, start, 3)
    return apart(found, published, start)


@departs(
    "fedcorr",
    "mixtures start from one division",
    "share of 20 sets of 40 losses (30 % higher by 2 standard deviations) whose share of wrong labels differs by more than 0.05",
)
def fedcorr_mixtures() -> float:
    from sklearn.mixture import GaussianMixture

    rng, differ = np.random.default_rng(0), 0
    for _ in range(20):
        x = rng.normal(size=(40, 1)) + np.repeat([2.0, 0.0], [12, 28])[:, None]
        mixture = GaussianMixture(2, random_state=13).fit(x)
        published = float((mixture.predict(x) == mixture.means_[:, 0].argmax()).mean())
        differ += abs(float(higher_group(torch.from_numpy(x)).double().mean()) - published) > 0.05
    return differ / 20


@departs(
    "fedcorr",
    "all sites of a round train from the same model",
    MODEL.format("1 round") + ", from that of sites that train one after the other",
)
def fedcorr_turns() -> float:
    task, sites, start = small(), little_sites(), small().first()
    found, published = moves(FedCorr(task, 10, LOCAL, mixup=False), sites, start, 1), start
    for site in sites.values():
        published = LOCAL.fit(task, published, site, 0)
    return apart(found, published, start)


@departs(
    "feda3i",
    "the mixture starts from one division",
    "share of 20 sets of 12 sites (half of each kind, 2 standard deviations apart) that are divided otherwise",
)
def feda3i_mixture() -> float:
    from sklearn.mixture import GaussianMixture

    rng, differ = np.random.default_rng(0), 0
    for _ in range(20):
        x = rng.normal(size=(12, 2)) + np.repeat([[2.0, 0.0], [0.0, 2.0]], 6, 0)
        mixture = GaussianMixture(2, random_state=0).fit(x)
        large = mixture.predict(x) == (mixture.means_[:, 0] - mixture.means_[:, 1]).argmax()
        differ += not np.array_equal(higher_group(torch.from_numpy(x * [1.0, -1.0])).numpy(), large)
    return differ / 20


@departs(
    "feda3i",
    "the weight of quality grows by layers instead of blocks",
    "largest difference of the weight α in the published U-Net, in points of 1",
)
def feda3i_layers() -> float:
    """Its blocks: one, four down and four up of two convolutions and two normalizations each, those up with one more."""
    layers = [k for k, count in enumerate([4, 4, 4, 4, 4, 5, 5, 5, 5, 1]) for _ in range(count)]
    return max(abs(i / (len(layers) - 1) - block / 9) for i, block in enumerate(layers))
