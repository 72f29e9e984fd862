"""FedPerl: peers with similar models help each other to label images, anonymously.

Bdair, Navab and Albarqouni, "FedPerl: Semi-Supervised Peer Learning for Skin Lesion Classification", MICCAI 2021,
https://arxiv.org/abs/2103.03703, equations 2 to 6, with the official settings (https://github.com/tbdair/FedPerlV1.0):
a site's descriptor is the mean and standard deviation of each tensor of its model, running statistics included; each
entry is scaled to 0...1 over the sites; its T peers are those most similar by cosine; it receives the average of their
models, never one of them (peer anonymization). Sites are weighted by images. Departures: the published descriptor ends
with the accuracy and loss on images of the server, which a server does not have here; pseudo-labels are averaged over
all images instead of the confident ones, and the agreement with the peer has a gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.pseudo_labels import pseudo_loss, two_views
from polyclinic.learning.tasks.example_pool import fit_both
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import WEAK
from polyclinic.learning.training.local import LocalTraining


@savable("fedperl.State", 1)
class State(NamedTuple):
    """The model, and every site's own as it last sent it."""

    round: int
    params: Tree
    models: dict[str, Tree]


def descriptor(params: Tree) -> Tensor:
    """Return the mean and standard deviation of each tensor: [2 · tensors]."""
    leaves = [leaf.double() for leaf in params.values()]
    return torch.stack([x for leaf in leaves for x in (leaf.mean(), leaf.std(correction=0))])


def similarities(models: Trees) -> Tensor:
    """Return the cosine of each pair of descriptors [K, K], each entry of which is scaled to 0...1; -1 on the diagonal.

    An entry that is the same at all sites becomes 1.
    """
    d = torch.stack([descriptor(model) for model in models.values()])
    low, high = d.amin(0), d.amax(0)
    scaled = F.normalize(torch.where(high > low, (d - low) / (high - low), 1.0), dim=1)
    return (scaled @ scaled.T).fill_diagonal_(-1.0)


def anonymous_peers(models: Trees, count: int) -> dict[str, Tree]:
    """Return for each site the average of the ``count`` models most similar to its own, without its own.

    Empty with fewer than three sites: an average of one would be another site's model.
    """
    if len(models) < 3:
        return {}
    names, found = list(models), dict[str, Tree]()
    for name, row in zip(names, similarities(models), strict=True):
        nearest = row.argsort(descending=True, stable=True)[: min(count, len(names) - 1)].tolist()
        mean = WeightedMean.of(models[names[nearest[0]]])
        for i in nearest[1:]:
            mean = mean + WeightedMean.of(models[names[i]])
        found[name] = mean.value
    return found


@dataclass(frozen=True)
class FedPerl(Method[State]):
    """Sites pseudo-label their images together with the average of the models most similar to their own.

    Attributes:
        rounds: Number of planned rounds.
        peers: T, the number of models that are averaged into one peer; 2.
        warmup: Share of the rounds before unlabeled images and peers are used; none in the published code.
        threshold: Least probability of a pseudo-label; 0.6.
        trust: β, the weight of the loss on pseudo-labels; 0.5.
        agreement: Weight of the distance to the peer's predictions; 0.01.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    peers: int = 2
    warmup: float = 0.0
    threshold: float = 0.6
    trust: float = 0.5
    agreement: float = 0.01

    def __post_init__(self) -> None:
        if self.peers < 2:
            raise ConfigError(
                "fedperl: the average of one peer is that peer's model, shown to another site: set peers to 2 or more"
            )

    capabilities = Capabilities(needs_each_reply=True)

    @property
    def _wait(self) -> int:
        return math.ceil(self.warmup * self.rounds)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        peers = anonymous_peers(state.models, self.peers) if state.round >= self._wait else {}
        return Request(state.round, {"params": state.params}, per_site={name: {"peer": p} for name, p in peers.items()})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "views")
        peer = (
            cached_model(self.task, request.trees["peer"], site.device, "peer").eval()
            if "peer" in request.trees
            else None
        )

        def alone(model: nn.Module, x: Tensor) -> Tensor:
            weak, strong = two_views(self.task.kind, x, rng)
            own = model(weak).softmax(1)
            with torch.no_grad():
                other = own if peer is None else peer(weak).softmax(1)
            found = self.trust * pseudo_loss(model(strong), (own + other) / 2, self.threshold)
            return found + self.agreement * F.mse_loss(own, other.detach())

        def known(model: nn.Module, batch: Batch) -> Tensor:
            return self.task.loss(model, WEAK(batch, rng))

        wait = request.round < self._wait
        end, labels, free = fit_both(self.local, self.task, start, site, request.round, known, alone, wait=wait)
        n = torch.tensor(float(labels + free))
        return Reply({"model": PerSite({site.name: {**tree.prefixed("model", end), WEIGHT: n}})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent, mean = reply.gather("model"), WeightedMean(tree.zeros(state.params), 0.0)
        models = {name: tree.under("model", leaves) for name, leaves in sent.items()}
        for name, model in models.items():
            mean = mean + WeightedMean.of(model, float(sent[name][WEIGHT]))
        useful = {name: model for name, model in models.items() if sent[name][WEIGHT]}
        return State(state.round + 1, mean.value, dict(sorted({**state.models, **useful}.items())))
