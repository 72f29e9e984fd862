"""FL-MRCM: latent features of the sites with references, aligned to those of a site without.

Guo, Wang, Zhou, Jiang and Patel, "Multi-institutional Collaborations for Improving Deep Learning-based Magnetic
Resonance Image Reconstruction Using Federated Learning", CVPR 2021, section 3.3 and Algorithm 2 (cross-site modeling).
https://arxiv.org/abs/2103.02148. A round takes two requests: the target sends latent features of its inputs, then each
source trains, with its own discriminator between its features and the target's. All sources have equal weight, as in
the paper. As in the published code, one step follows the sum of both losses, and the discriminator's learning rate is
10 times the network's. Features are averaged over spatial axes.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import encode_all, encoded, encoded_width
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.adversarial import Discriminator, pass_for_real, tell_apart
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded


@savable("fl-mrcm.State", 1)
class State(NamedTuple):
    """The model; and the target's latent features [m, F] of this round, once received."""

    round: int
    params: Tree
    latent: Tree


@dataclass(frozen=True)
class MRCM(Method[State]):
    """FedAvg over the sources, whose encoders learn features that resemble the target's.

    The target's references are never used: it is a hospital that has images only.

    Attributes:
        sites: All sites; the sources are those other than the target.
        target: The site that the model is for; the last of ``sites`` if empty.
        adversarial: Weight of the alignment.
        share: Number of examples whose features the target sends in a round.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    target: str = ""
    adversarial: float = 1.0
    share: int = 64

    capabilities = Capabilities(needs_each_reply=True)

    def __post_init__(self) -> None:
        if self.aligned_to not in self.sites or len(self.sites) < 2:
            there = ", ".join(self.sites)
            raise ConfigError(f"target: {self.aligned_to!r} must be one of two or more sites; there are {there}")

    @property
    def aligned_to(self) -> str:
        """The target site."""
        return self.target or self.sites[-1]

    @property
    def sources(self) -> tuple[str, ...]:
        """The sites that train."""
        return tuple(name for name in self.sites if name != self.aligned_to)

    @property
    def judge(self) -> Discriminator:
        """The discriminator of each source; its score is high for the target's features."""
        return Discriminator(encoded_width(self.task.network), 1, 16)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("latent", sites=(self.aligned_to,)), Job("train", sites=self.sources)

    def request(self, state: State) -> Request:
        if not state.latent:
            return Request(state.round, {"params": state.params}, "latent", recipients=(self.aligned_to,))
        return Request(state.round, {"params": state.params, "latent": state.latent}, "train", recipients=self.sources)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        model = cached_model(self.task, start, site.device)
        if request.job == "latent":
            chosen = torch.randperm(len(data), generator=site.rng(request.round, "latent"))[: self.share]
            latent = encode_all(self.task.network, model, data, site.device, chosen)
            return Reply({"latent": PerSite({site.name: {"z": latent}})}), memory
        judge = cached_model(self.judge, memory.get("judge", self.judge.first()), site.device)
        foreign = request.trees["latent"]["z"].to(site.device)
        learn = self.local.stepper(model, request.round)
        guess = replace(self.local, lr=10 * self.local.lr).stepper(judge, request.round)
        rng = site.rng(request.round, "train", "train", "")
        with seeded(rng, site.device):
            for batch in self.local.batches(data, rng, site.device):
                loss = self.task.loss(model, batch)
                if not self.adversarial:
                    learn(loss)
                    continue
                with still(model):
                    z = encoded(self.task.network, model, batch[0])
                learn(loss + self.adversarial * pass_for_real(judge(z)))
                guess(tell_apart(judge(foreign), judge(z.detach())))
        update = WeightedMean.of(tree.sub(params_of(model), start))
        return Reply({"update": update}), {**memory, "judge": params_of(judge)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.latent:
            return state._replace(latent=reply.gather("latent")[self.aligned_to])
        return State(state.round + 1, reply.mean("update").apply_to(state.params), {})
