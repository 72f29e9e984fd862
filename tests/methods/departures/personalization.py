"""Departures of personalized methods and of adaptation at each site."""

from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.batch_statistics import batches
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_width, pooled, represent
from polyclinic.learning.networks.model_tree import load, params_of, trainable
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import answers
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.fourier import crop, restyle, spectrum
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.local_adaptation.fedala import FedALA
from polyclinic.methods.local_adaptation.fedsoup import FedSoup
from polyclinic.methods.local_adaptation.per_fedavg import PerFedAvg
from polyclinic.methods.multitask.gated_experts import begin
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization import routing_network
from polyclinic.methods.personalization.boundary_features import boundary_contrast, edges
from polyclinic.methods.personalization.cfl import bipartition
from polyclinic.methods.personalization.fedmri import fedmri
from polyclinic.methods.personalization.fedproto import FedProto
from polyclinic.methods.personalization.fedsm import FedSM
from polyclinic.methods.personalization.iopfl import IOPFL
from polyclinic.methods.personalization.lcfed import LCFed
from polyclinic.methods.personalization.moon import Moon
from tests.conftest import blobs, little_sites, segmentation_sites
from tests.support.agreement import minibatches, ready
from tests.support.departures import LOCAL, NAMES, apart, departs, moves, small
from tests.support.few_labels import run

MODEL = "the global model after {}, relative to its change"
SCORES = "largest difference of a predicted probability"
UNET = Segmentation(Network("unet", (1, 16, 16), 2, (("norm", "batch"), ("width", 2))))


@dataclass(frozen=True)
class Projected(Composed):
    """A network with MOON's projection in front of its last layer."""

    def __call__(self) -> nn.Module:
        model = self.network()
        f = head_width(self.network)
        model.head = nn.Sequential(nn.Linear(f, f), nn.ReLU(), nn.Linear(f, 256), nn.Linear(256, self.outputs))
        return model


def _projection(network: Any, model: Any, x: Tensor) -> Tensor:
    z: Tensor = model.head[:3](pooled(model.encoder(x)))
    return z


@departs(
    "moon",
    "no projection head",
    "the encoder after 2 rounds, relative to its change; the published head has 256 outputs",
)
def moon_projection() -> float:
    task, sites = small(), little_sites()
    wide = task.with_network(Projected(task.network))
    start = task.first()
    found = moves(Moon(task, LOCAL), sites, start, 2)
    with patch("polyclinic.methods.personalization.moon.features", _projection):
        published = moves(Moon(wide, LOCAL), sites, begin(wide, start), 2)
    inside = task.network.in_encoder
    return apart(*(tree.select(m, inside) for m in (found, published, start)))


def _largest_across(changes: Tensor, group: set[int]) -> float:
    unit = F.normalize(changes, dim=1)
    rest = [i for i in range(len(changes)) if i not in group]
    return float((unit @ unit.T)[sorted(group)][:, rest].max())


@departs(
    "cfl",
    "divides clusters by complete linkage, as the published code does",
    "share of 500 sets of 6 random updates of 5 numbers that the paper's equation divides otherwise",
)
def cfl_linkage() -> float:
    rng, differ = torch.Generator().manual_seed(0), 0
    groups = [set(g) for k in (1, 2, 3) for g in combinations(range(6), k)]
    for _ in range(500):
        x = torch.randn(6, 5, generator=rng)
        best = min(groups, key=lambda g: _largest_across(x, g))
        found = set(bipartition(x))
        differ += found not in (best, set(range(6)) - best)
    return differ / 500


@departs(
    "feddg",
    "the window is a share of the spectrum",
    "restyled noise images of 384 × 384 pixels (window 0.02, λ = 1), relative to their change by one frequency",
)
def feddg_window() -> float:
    rng = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 1, 384, 384, generator=rng) + k for k in (1.0, 2.0))
    found, published = (restyle(x, crop(spectrum(other)[0], w), w) for w in (0.02, 0.0))
    return float((found - published).norm() / (published - x).norm())


def _published_contrast(features: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Return the contrast over rims and rings, each of which is a class of its own."""
    flat, both = features.flatten(2), [part.flatten(1).float() for part in edges(masks)]
    e = torch.cat([F.normalize(torch.einsum("bfp,bp->bf", flat, m) / m.sum(1, keepdim=True)) for m in both])
    label = torch.arange(2).repeat_interleave(len(features))
    z = e @ e.T / temperature
    losses = []
    for i in range(len(e)):
        apart_from = torch.logsumexp(z[i][label != label[i]], 0)
        losses += [
            torch.logaddexp(z[i, j], apart_from) - z[i, j] for j in range(len(e)) if j != i and label[j] == label[i]
        ]
    return torch.stack(losses).mean()


@departs(
    "feddg",
    "the boundary contrast compares rims alone",
    "value of the contrast of random features of 10 masks, relative",
)
def feddg_contrast() -> float:
    masks = segmentation_sites()["site-0"].data["train"].y
    features = torch.randn(len(masks), 8, *masks.shape[1:], generator=torch.Generator().manual_seed(0))
    found, published = (f(features, masks, 0.05) for f in (boundary_contrast, _published_contrast))
    return float((found - published).abs() / published)


@departs(
    "fedsm",
    "a small selector instead of VGG-11",
    "its number of parameters relative to VGG-11 (images of one channel, 3 sites)",
)
def fedsm_selector() -> float:
    """VGG-11: eight 3 × 3 convolutions and three linear layers."""
    channels = [1, 64, 128, 256, 256, 512, 512, 512, 512]
    vgg = sum(9 * a * b + b for a, b in pairwise(channels))
    vgg += sum(a * b + b for a, b in ((512 * 49, 4096), (4096, 4096), (4096, 3)))
    return tree.size(FedSM(small(), NAMES).selecting.first()) / vgg


class BySize(FedSM):
    """FedSM whose selector is averaged by numbers of examples too."""

    def _selector(self, request: Any, site: Any) -> Any:
        equal = super()._selector(request, site)
        return type(equal).of(equal.value, self.site_weight(site))


@departs(
    "fedsm",
    "the selector and its moments of Adam are averaged with equal weights",
    "the selector after 3 rounds, relative to its change; sites of 12, 17 and 22 examples",
)
def fedsm_weights() -> float:
    start = FedSM(small(), NAMES).selecting.first()
    found, published = (
        run(kind(small(), NAMES, LOCAL), little_sites(), small().first(), 3)[0].state.selector.params
        for kind in (FedSM, BySize)
    )
    return apart(found, published, start)


def _outside(local: LocalTraining = LOCAL) -> tuple[IOPFL, Any, Any]:
    method, sites = IOPFL(small(), NAMES, local), little_sites()
    step, _ = run(method, sites, small().first(), 2)
    return method, step.state, replace(sites["site-0"], name="elsewhere", data={"test": blobs(77, 24, (1, 8, 8), 0.8)})


def _unnormalized(self: Any, x: Tensor) -> Tensor:
    """The published mixture, whose weights have any sum."""
    first: Tensor = self.member[0](x)
    mean = x.flatten(2).mean(2) if x.ndim > 2 else x
    r = self.router(mean).unflatten(1, (-1, *[1] * (first.ndim - 1)))
    return (r * torch.stack([first, *(layer(x) for layer in list(self.member)[1:])], 1)).sum(1)


@departs("iop-fl", "routing weights have sum 1", SCORES + " at an unseen site, on batch normalization")
def iopfl_sum() -> float:
    method, state, site = _outside()
    request, found = method.evaluation_request(state), []
    for forward in (routing_network._Mixed.forward, _unnormalized):
        with patch.object(routing_network._Mixed, "forward", forward):
            params = method.adapted_model(request, {}, site, "test")
            found.append(outputs(method.prediction_task, params, site.data["test"])["score"])
    return float((found[0] - found[1]).abs().max())


@departs("iop-fl", "no rotations", SCORES + " at an unseen site, if the noisy images are also rotated by 90°")
def iopfl_rotation() -> float:
    method, state, site = _outside()
    request, found = method.evaluation_request(state), []
    plain = torch.randn

    def rotated(shape: Any, generator: torch.Generator | None = None) -> Tensor:
        """Noise that turns the image it is added to; the average over pixels is not turned back."""
        noise = plain(shape, generator=generator)
        return noise + 2 * (turning["x"].rot90(1, (2, 3)) - turning["x"]) if len(shape) == 4 else noise

    turning: dict[str, Tensor] = {}

    def note(count: int, size: int) -> Any:
        for chunk in batches(count, size):
            turning["x"] = site.data["test"][chunk][0]
            yield chunk

    for change in (False, True):
        with patch.object(routing_network, "batches", note), patch.object(torch, "randn", rotated if change else plain):
            params = method.adapted_model(request, {}, site, "test")
        found.append(outputs(method.prediction_task, params, site.data["test"])["score"])
    return float((found[0] - found[1]).abs().max())


@departs(
    "iop-fl", "predictions after the last pass", SCORES + " between the last step on a batch of 8 and the last pass"
)
def iopfl_last_pass() -> float:
    method, state, site = _outside()
    params = method.adapted_model(method.evaluation_request(state), {}, site, "test")
    last: list[Tensor] = []
    loss = routing_network.Adaptation.loss

    def note(self: Any, plain: Tensor, noisy: Tensor) -> Tensor:
        last.append(plain.detach().softmax(1))
        return loss(self, plain, noisy)

    with patch.object(routing_network.Adaptation, "loss", note):
        method.adapted_model(method.evaluation_request(state), {}, site, "test")
    published = torch.cat(last[-3:])
    return float((outputs(method.prediction_task, params, site.data["test"])["score"] - published).abs().max())


@departs(
    "fedmri",
    "compares with the own last encoder unless others = true",
    "the encoder after 3 rounds, relative to its change",
)
def fedmri_others() -> float:
    sites, start, local = segmentation_sites(), UNET.first(), LocalTraining(1, 5, "adam", 1e-3)
    found, published = (moves(fedmri(UNET, local, others=o), sites, start, 3) for o in (False, True))
    return apart(*(tree.select(m, UNET.network.in_encoder) for m in (found, published, start)))


@departs("lc-fed", "a softmax over classes instead of sigmoids", SCORES + " of the first head after 4 rounds")
def lcfed_softmax() -> float:
    sites, local = segmentation_sites(), LocalTraining(1, 5, "adam", 0.01)
    params = moves(FedAvg(UNET, local), sites, UNET.first(), 4)
    z, _ = answers(UNET, params, sites["site-0"].data["test"])
    return float((z.softmax(1)[:, 1] - z[:, 1].sigmoid()).abs().max())


@departs(
    "lc-fed",
    "the second head is trained in every round",
    "mean difference of a predicted probability of a site after 4 rounds from a second head that starts at the end and "
    "takes as many steps",
)
def lcfed_rounds() -> float:
    sites, rounds = segmentation_sites(), 4
    method = LCFed(UNET, NAMES, LocalTraining(1, 5, "adam", 0.01), head_steps=2)
    step, engine = run(method, sites, UNET.first(), rounds)
    site, request = sites["site-0"], method.evaluation_request(step.state)
    found = method.site_model(request, engine.memory["site-0"])
    longer = replace(method.local, epochs=rounds)
    fresh = {**found, **method._fresh()}
    end = longer.fit(method.prediction_task, fresh, site, 0, trainable=lambda n: n.startswith("calibrate."))
    one, two = (answers(method.prediction_task, m, site.data["test"])[0].softmax(1) for m in (found, end))
    return float((one - two).abs().mean())


@departs(
    "lc-fed",
    "channel selection is trained and averaged, as in the paper, whereas no optimizer of the published code holds it",
    "the other layers of the body after 2 rounds, relative to their change",
)
def lcfed_selection() -> float:
    """Each site of the published code has a random selection."""
    assert _selecting(trained=True) < 1e-4
    return _selecting(trained=False)


def _selecting(trained: bool, rounds: int = 2) -> float:
    sites, local = segmentation_sites(), LocalTraining(2, 4, "sgd", 0.05)
    method, in_head = LCFed(UNET, NAMES, local, head_steps=2), UNET.network.in_head
    task = method.selecting
    start = {n: x for n, x in {**task.first(), **UNET.first()}.items() if not in_head(n) and n != "site"}
    body, heads = start, [{n: x for n, x in UNET.first().items() if in_head(n)} for _ in sites]
    for round in range(rounds):
        ends = []
        for k, site in enumerate(sites.values()):
            chosen = {} if trained else {n: x for n, x in task.first(10 + k).items() if n.startswith("select.")}
            model = load(task.model(), {**body, **heads[k], **chosen, "site": torch.eye(3)[k]}).train()
            named = [(n, p) for n, p in model.named_parameters() if trained or not n.startswith("select.")]
            optimizer = torch.optim.SGD([p for _, p in named], 0.05)
            for i, (x, y) in enumerate(minibatches(local, site, round)):
                model.zero_grad()
                task.loss(model, (x, y)).backward()
                for n, p in named:
                    p.grad = None if i < 2 and not in_head(n) else p.grad
                optimizer.step()
            ends.append(params_of(model))
            heads[k] = {n: x for n, x in ends[-1].items() if in_head(n)}
        body = {n: torch.stack([end[n] for end in ends]).mean(0) for n in body}
    compared = [n for n in body if not n.startswith("select.")]
    found = moves(method, sites, UNET.first(), rounds)
    return apart(*({n: t[n] for n in compared} for t in (found, body, start)))


@departs(
    "fedproto",
    "prototypes are computed after training instead of during it",
    "prototypes of a site after 10 rounds, relative",
)
def fedproto_prototypes() -> float:
    task, site, seen = small(), little_sites()["site-1"], list[Tensor]()

    def record(network: Any, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h, z = represent(network, model, x)
        seen.append(pooled(h).detach())
        return h, z

    method = FedProto(task, LOCAL)
    step, engine = run(method, little_sites(), task.first(), 9)
    with patch("polyclinic.methods.personalization.fedproto.represent", record):
        reply, _ = method.site_update(method.request(step.state), engine.memory[site.name], site)
    labels = torch.cat([y for _, y in minibatches(LOCAL, site, 9)])
    published = torch.stack([torch.cat(seen)[labels == c].mean(0) for c in range(2)])
    found = reply.leaf_mean("prototypes").value["mean"]
    return float((found - published).norm() / published.norm())


class Dropping(PerFedAvg):
    """Per-FedAvg without minibatches that are not full, as with ``drop_last``."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 2 * self.local.batch_size:
            return super().loss(model, batch)
        return torch.stack([p.sum() for p in model.parameters()]).sum() * 0


@departs(
    "per-fedavg",
    "minibatches that are not full are halved",
    MODEL.format("2 rounds") + "; 2 × 4 examples, sites of 12, 17 and 22",
)
def per_fedavg_halves() -> float:
    start, local = small().first(), replace(LOCAL, batch_size=4)
    found, published = (moves(kind(small(), local), little_sites(), start, 2) for kind in (PerFedAvg, Dropping))
    return apart(found, published, start)


@departs(
    "per-fedavg",
    "exact second derivative instead of differences",
    "meta-gradient of one minibatch, relative to differences with δ = 10⁻³ in double precision",
)
def per_fedavg_differences() -> float:
    """The published step: ∇f(w') − α (∇f(w + δ v) − ∇f(w − δ v)) / 2δ with v = ∇f(w'), on two minibatches."""
    task, alpha, delta = small("none"), 0.1, 1e-3
    x, y = (part[:16] for part in (blobs(3, 16, (1, 8, 8)).x.double(), blobs(3, 16, (1, 8, 8)).y))
    model = ready(task, task.first()).double()
    method = PerFedAvg(task, replace(LOCAL, batch_size=8), alpha=alpha, second_order=True)
    names, weights = zip(*trainable(model).items(), strict=True)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(method.loss(model, (x, y)), weights)])

    def slope(at: Any, half: slice) -> Any:
        leaves = [p.detach().requires_grad_() for p in at]
        z = functional_call(model, dict(zip(names, leaves, strict=True)), (x[half],))
        return torch.autograd.grad(F.cross_entropy(z, y[half]), leaves)

    first, second = slice(0, 8), slice(8, 16)
    there = [p - alpha * g for p, g in zip(weights, slope(weights, first), strict=True)]
    v = slope(there, second)
    up, down = (slope([p + s * delta * d for p, d in zip(weights, v, strict=True)], first) for s in (1, -1))
    published = torch.cat([(g - alpha * (a - b) / (2 * delta)).flatten() for g, a, b in zip(v, up, down, strict=True)])
    return float((found - published).norm() / published.norm())


class OwnStatistics(FedALA):
    """FedALA whose sites keep their running statistics, as the published loop over parameters does."""

    def mixed(self, shared: Tree, own: Tree, *rest: Any) -> Any:
        start, weights = super().mixed(shared, own, *rest)
        return {**start, **{n: leaf for n, leaf in own.items() if "running" in n}}, weights


@departs(
    "fedala",
    "running statistics are the shared model's",
    "a site's running statistics after 3 rounds, relative to their change",
)
def fedala_statistics() -> float:
    start, ends = small().first(), []
    for kind in (FedALA, OwnStatistics):
        _, engine = run(kind(small(), LOCAL), little_sites(), start, 3)
        ends.append(tree.select(engine.memory["site-0"]["own"], lambda n: "running" in n))
    return apart(ends[0], ends[1], tree.select(start, lambda n: "running" in n))


@departs("fedala", "sites predict after training instead of before it", SCORES + " at a site after 3 rounds")
def fedala_time() -> float:
    method, sites, begun = FedALA(small(), LOCAL), little_sites(), list[Tree]()
    mixed = FedALA.mixed

    def note(self: Any, *given: Any) -> Any:
        start, weights = mixed(self, *given)
        begun.append(start)
        return start, weights

    with patch.object(FedALA, "mixed", note):
        _, engine = run(method, sites, small().first(), 3)
    ends = [begun[-1], engine.memory["site-2"]["own"]]  # sites train in the order of their names
    one, two = (outputs(small(), end, sites["site-2"].data["test"])["score"] for end in ends)
    return float((one - two).abs().max())


@departs(
    "fedsoup",
    "selects by the validation loss, whereas the code uses test accuracy",
    "share of 30 decisions that differ (3 sites, 10 rounds, 12 images each)",
)
def fedsoup_selection() -> float:
    differ = []

    class Both(FedSoup):
        def interpolated(self, own: Tree, shared: Tree, soup: Any, site: Any, round: int) -> Any:
            found, kept = super().interpolated(own, shared, soup, site, round)
            with patch("polyclinic.methods.local_adaptation.fedsoup.risk", _error):
                _, other = super().interpolated(own, shared, soup, site, round)
            differ.append(kept.size != other.size)
            return found, kept

    run(Both(small(), 10, replace(LOCAL, epochs=4, lr=0.3), begin=0.0), little_sites(), small().first(), 10)
    assert len(differ) == 30
    return sum(differ) / 30


def _error(task: Any, params: Tree, site: Any, round: int, role: str = "val") -> float:
    found = outputs(task, params, site.data["test"])
    return float((found["score"].argmax(1) != found["target"]).float().mean())
