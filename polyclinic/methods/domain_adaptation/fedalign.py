"""Fed-Align: features whose site discriminators cannot identify.

Li, Gu, Dvornek, Staib, Ventola and Duncan, "Multi-site fMRI analysis using privacy-preserving federated learning and
domain adaptation: ABIDE results", Medical Image Analysis 2020, section 2.3.3 (adversarial domain alignment).
https://arxiv.org/abs/2001.05647.

Departure: in the paper one process trains all sites in lockstep. Here each site sends noisy features of its examples
and its discriminator, and in the next round every site trains its discriminator on the others' last features and its
encoder against its own and the others' last discriminators. The noise on features is not differential privacy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import encode_all, encoded, encoded_width
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.adversarial import Discriminator, pass_for_real, tell_apart
from polyclinic.learning.tasks.task import InEncoder, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fed-align.State", 1)
class State(NamedTuple):
    """The model and, for each site, the last features [m, F] and the last discriminator."""

    round: int
    params: Tree
    features: Trees
    judges: Trees


@dataclass(frozen=True)
class FedAlign(SizeWeighted[State]):
    """FedAvg whose encoders also learn features that every other site's discriminator takes for that site's own.

    Attributes:
        start: The round in which alignment begins; 5 of 50 epochs in the paper.
        noise: Standard deviation of the noise on features, relative to their own; 0.001 in the paper.
        share: Number of examples whose features a site sends in a round.
        weight: Weight of the discriminator's loss; 0.1 in the paper.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    start: int = 1
    noise: float = 0.001
    share: int = 64
    weight: float = 0.1
    uniform: bool = True

    needs_each_reply = True

    @property
    def judge(self) -> Discriminator:
        """The discriminator of each site: F → 4 → 1, as in the paper."""
        return Discriminator(encoded_width(self.task.network), 1, 4)

    def init(self, params: Tree) -> State:
        return State(0, params, {}, {})

    def request(self, state: State) -> Request:
        known = {f"features.{name}": leaves for name, leaves in state.features.items()}
        judges = {f"judge.{name}": leaves for name, leaves in state.judges.items()}
        return Request(state.round, {"params": state.params, **known, **judges})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        begin, mine, device = request.trees["params"], memory.get("judge", self.judge.first()), site.device
        others = [
            k.removeprefix("judge.") for k in request.trees if k.startswith("judge.") and k != f"judge.{site.name}"
        ]
        others = others if request.round >= self.start else []
        model, judge = cached_model(self.task, begin, device), cached_model(self.judge, mine, device, "own")
        theirs = [
            cached_model(self.judge, request.trees[f"judge.{name}"], device, f"other {i}")
            for i, name in enumerate(others)
        ]
        foreign = torch.cat([request.trees[f"features.{name}"]["h"] for name in others]).to(device) if others else None
        learn, guess = self.local.stepper(model, request.round), self.local.stepper(judge, request.round)
        align = self.local.stepper(model, request.round, trainable=InEncoder(self.task))
        rng = site.rng(request.round, "train", "train", "")
        with seeded(rng, device):
            for batch in self.local.batches(site.data["train"], rng, device):
                learn(self.task.loss(model, batch))
                if foreign is None:
                    continue
                with still(model):
                    h = encoded(self.task.network, model, batch[0])
                # L_D = −log D_i(f_i) − log(1 − D_i(f_j))
                guess(self.weight * tell_apart(judge(h.detach()), judge(foreign)))
                # L_G = −log D_i(f_i) − Σ_j log D_j(f_i)
                align(torch.stack([pass_for_real(other(h)) for other in (judge, *theirs)]).sum())
        update = WeightedMean.of(tree.sub(params_of(model), begin), self.site_weight(site))
        held = params_of(judge)
        sent = {"features": {"h": self._features(model, site, request.round)}, "judge": held}
        gathered = {part: PerSite({site.name: leaves}) for part, leaves in sent.items()}
        return Reply({"update": update, **gathered}), {**memory, "judge": held}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return State(
            state.round + 1,
            reply.mean("update").apply_to(state.params),
            {**state.features, **reply.gather("features")},
            {**state.judges, **reply.gather("judge")},
        )

    def _features(self, model: nn.Module, site: Site, round: int) -> torch.Tensor:
        """Return features of ``share`` random training examples, plus ``N(0, (noise · std)²)``."""
        rng, data = site.rng(round, "features"), site.data["train"]
        chosen = torch.randperm(len(data), generator=rng)[: self.share]
        h = encode_all(self.task.network, model, data, site.device, chosen)
        return h + self.noise * h.std() * torch.randn(h.shape, generator=rng)
