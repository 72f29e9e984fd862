"""FedHarmony: features from which the scanner cannot be identified.

Dinsdale, Jenkinson and Namburete, "FedHarmony: Unlearning Scanner Bias with Distributed Data", MICCAI 2022: three
updates for each minibatch, others' features drawn from Gaussians, FedProx's penalty with a norm that is not squared,
and equal weights ("FedEqual"). https://arxiv.org/abs/2205.15970.

As in the published code, the Gaussians describe the features of the aggregated encoder in evaluation mode: from the
second round on, sites are first asked for them, and then train.

Departures: in the first round no Gaussians are available, and only the main task is trained. A site draws as many
features of others as it has of its own, evenly. The paper's factors of 10 and 100 on the second and third loss have no
effect under Adam, which it uses, and are 1 here; the third learning rate is half the others', as in the paper.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import encode_all, encoded, encoded_width
from polyclinic.learning.networks.model_tree import cached_model, params_of, trainable
from polyclinic.learning.objectives.adversarial import Discriminator, confusion, moments
from polyclinic.learning.tasks.task import InEncoder, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded


@savable("fedharmony.State", 2)
class State(NamedTuple):
    """The model, the domain classifier, each site's Gaussian of features, and whether these are of this model."""

    round: int
    params: Tree
    judge: Tree
    gaussians: Trees
    described: bool


@dataclass(frozen=True)
class FedHarmony(Method[State]):
    """Sites unlearn the scanner: a shared classifier predicts a feature's site, and encoders learn to confuse it.

    Other sites' features are drawn from a mean and a standard deviation per feature, which is all that sites exchange
    of them.

    Attributes:
        sites: The training sites, in the order of the classifier's outputs.
        mu: μ, the weight of the distance to the received model; 0.1 in the paper.
        domain: Weight of the classifier's loss.
        unlearn: Weight of the confusion loss.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    mu: float = 0.1
    domain: float = 1.0
    unlearn: float = 1.0

    capabilities = Capabilities(needs_each_reply=True)

    @property
    def judge(self) -> Discriminator:
        """The domain classifier."""
        return Discriminator(encoded_width(self.task.network), len(self.sites), 32)

    def init(self, params: Tree) -> State:
        return State(0, params, self.judge.first(), {}, True)  # the first round needs no Gaussians

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("describe", first=1), Job("train")

    def request(self, state: State) -> Request:
        if not state.described:
            return Request(state.round, {"params": state.params}, "describe")
        known = {f"gaussian.{name}": leaves for name, leaves in state.gaussians.items()}
        return Request(state.round, {"params": state.params, "judge": state.judge, **known})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, here = request.trees["params"], self.sites.index(site.name)
        model = cached_model(self.task, start, site.device)
        if request.job == "describe":
            features = encode_all(self.task.network, model, site.data["train"], site.device)
            return Reply({"gaussian": PerSite({site.name: moments(features)})}), memory
        judge = cached_model(self.judge, request.trees["judge"], site.device)
        origin = {name: leaf.to(site.device) for name, leaf in start.items()}
        learn, guess = self.local.stepper(model, request.round), self.local.stepper(judge, request.round)
        slower = replace(self.local, lr=self.local.lr / 2)
        forget = slower.stepper(model, request.round, trainable=InEncoder(self.task))
        rng, gaussian_rng = site.rng(request.round, "train", "train", ""), site.rng(request.round, "gaussians")
        others = [k for k, name in enumerate(self.sites) if name != site.name and f"gaussian.{name}" in request.trees]
        with seeded(rng, site.device):
            for batch in self.local.batches(site.data["train"], rng, site.device):
                learn(self.task.loss(model, batch) + self.mu * _distance(model, origin))
                if not others:
                    continue
                with still(model):
                    own = encoded(self.task.network, model, batch[0])
                drawn, places = self._draw(request, others, len(own), gaussian_rng)
                features = torch.cat([own.detach(), drawn.to(own)])
                truth = torch.cat([torch.full((len(own),), here), places]).to(site.device)
                guess(self.domain * F.cross_entropy(judge(features), truth))
                forget(self.unlearn * confusion(judge(own)))
        reply = {
            "update": tree.sub(params_of(model), start),
            "judge": tree.sub(params_of(judge), request.trees["judge"]),
        }
        return Reply({part: WeightedMean.of(leaves) for part, leaves in reply.items()}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.described:
            return state._replace(gaussians={**state.gaussians, **reply.gather("gaussian")}, described=True)
        params, judge = reply.mean("update").apply_to(state.params), reply.mean("judge").apply_to(state.judge)
        return State(state.round + 1, params, judge, state.gaussians, False)

    def _draw(self, request: Request, others: list[int], count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return about ``count`` features ``f ~ N(μ_k, diag σ_k²)`` of the other sites k, and those k."""
        each, found = max(1, count // len(others)), []
        for k in others:
            known = request.trees[f"gaussian.{self.sites[k]}"]
            found.append(known["mean"] + known["std"] * torch.randn(each, len(known["mean"]), generator=rng))
        return torch.cat(found), torch.tensor(others).repeat_interleave(each)


def _distance(model: nn.Module, origin: Tree) -> Tensor:
    """Return ``‖θ − θ_g‖``, not squared."""
    distance: Tensor = torch.linalg.vector_norm(
        torch.cat([(p - origin[n]).flatten() for n, p in trainable(model).items()])
    )
    return distance
