"""FL-MRCM: latent features of the sites with truth, aligned to those of a site without.

Guo, Wang, Zhou, Jiang and Patel, "Multi-institutional Collaborations for Improving Deep Learning-based Magnetic
Resonance Image Reconstruction Using Federated Learning", CVPR 2021, section 3.3 and Algorithm 2 (cross-site modeling).
https://arxiv.org/abs/2103.02148. A round is two messages: the target sends latent features of its inputs, then each
source trains, with a discriminator of its own that tells its features from the target's. The plain mean, as there;
features are averaged over space.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import encode_all, encoded, encoded_width
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.adversarial import Discriminator, pass_for_real, tell_apart
from polyclinic.learning.tasks.task import InEncoder, Task
from polyclinic.learning.training.local import LocalTraining, seeded


@savable("fl-mrcm.State", 1)
class State(NamedTuple):
    """The model; and the target's latent features [m, F] in this round, where they have come."""

    round: int
    params: Tree
    latent: Tree


@dataclass(frozen=True)
class MRCM(Method[State]):
    """FedAvg over the sources, whose encoders learn to make features that pass for the target's.

    The target's truth is never used: it is the hospital that has images but no references.

    Attributes:
        sources: Who trains. ``target``: whom the model is for.
        adversarial: The weight of the alignment.
        share: How many examples' features the target sends in a round.
    """

    task: Task
    sources: tuple[str, ...]
    target: str
    local: LocalTraining = LocalTraining()
    adversarial: float = 1.0
    share: int = 64

    @property
    def judge(self) -> Discriminator:
        """What each source holds; its score is high for the target's features."""
        return Discriminator(encoded_width(self.task.network), 1, 16)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("latent", sites=(self.target,)), Job("train", sites=self.sources)

    def request(self, state: State) -> Request:
        if not state.latent:
            return Request(state.round, {"params": state.params}, "latent", recipients=(self.target,))
        return Request(state.round, {"params": state.params, "latent": state.latent}, "train", recipients=self.sources)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        model = cached_model(self.task, start, site.device)
        if request.job == "latent":
            chosen = torch.randperm(len(data), generator=site.rng(request.round, "latent"))[: self.share]
            latent = encode_all(self.task.network, model, data, site.device, chosen)
            return Reply({"latent": PerSite({site.name: {"z": latent}})}), memory
        judge = cached_model(self.judge, memory.get("judge", self.judge.first()), site.device)
        theirs = request.trees["latent"]["z"].to(site.device)
        learn, guess = self.local.stepper(model, request.round), self.local.stepper(judge, request.round)
        align = self.local.stepper(model, request.round, trainable=InEncoder(self.task))
        rng = site.rng(request.round, "train", "train", "")
        with seeded(rng, site.device):
            for batch in self.local.batches(data, rng, site.device):
                learn(self.task.loss(model, batch))
                if not self.adversarial:
                    continue
                with still(model):
                    z = encoded(self.task.network, model, batch[0])
                guess(tell_apart(judge(theirs), judge(z.detach())))
                align(self.adversarial * pass_for_real(judge(z)))
        update = WeightedMean.of(tree.sub(params_of(model), start))
        return Reply({"update": update}), {**memory, "judge": params_of(judge)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.latent:
            return state._replace(latent=reply.gather("latent")[self.target])
        return State(state.round + 1, reply.mean("update").apply_to(state.params), {})


def mrcm(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    *,
    target: str = "",
    adversarial: float = 1.0,
    share: int = 64,
) -> MRCM:
    """Sources aligned to a ``target`` whose truth is not used; the last site in order where none is named.

    Raises:
        ValueError: If the target is not a site, or there is no source.
    """
    target = target or sites[-1]
    if target not in sites or len(sites) < 2:
        raise ConfigError(f"target: {target!r} must be one of two or more sites; there are {', '.join(sites)}")
    return MRCM(task, tuple(name for name in sites if name != target), target, local, adversarial, share)
