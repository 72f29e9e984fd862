"""FedNoRo: sites with wrong labels are found by their loss of each class, and trained and weighted differently.

Wu, Yu, Jiang, Cheng and Yan, "FedNoRo: Towards Noise-Robust Federated Learning by Addressing Class Imbalance and Label
Noise Heterogeneity", IJCAI 2023, Algorithm 1, https://arxiv.org/abs/2305.05230, after the published code: a warm-up
with a balanced softmax; a division of the sites by a Gaussian mixture of their normalized losses of each class; then
noisy sites learn from the received model and from their labels, and count less the farther they are from all clean
ones. Departure: the mixture starts from one division, at the mean of the losses, instead of nine random ones.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_momentum import ramp
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import Said, answers
from polyclinic.learning.tasks.data_sums import class_counts
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.visible_updates import VisibleUpdates
from polyclinic.methods.class_imbalance.logit_adjustment import FEWEST
from polyclinic.methods.label_noise.two_groups import higher_group
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@savable("fednoro.State", 1)
class State(NamedTuple):
    """The model, the sites that were found to be noisy, and whether the sites have been divided."""

    round: int
    params: Tree
    noisy: tuple[str, ...]
    divided: bool


@dataclass(frozen=True)
class FedNoRo(VisibleUpdates[State]):
    """FedAvg for sites some of which have many wrong labels.

    Attributes:
        rounds: Number of planned rounds.
        warmup: Share of the rounds before the sites are divided; 0.1 in the paper.
        growth: Share of the rounds in which the weight of the received model's probabilities reaches ``most``; 0.4.
        most: The largest weight of these probabilities at a noisy site, relative to its labels; 0.8 in the paper.
        temperature: T of these probabilities; 0.8 in the published code.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    warmup: float = 0.1
    growth: float = 0.4
    most: float = 0.8
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.warmup < 1 or not 0 <= self.most <= 1 or self.temperature <= 0:
            raise ConfigError(
                "fednoro: warmup must be a share of the rounds between 0 and 1, most between 0 and 1, and temperature "
                f"above 0, not {self.warmup:g}, {self.most:g} and {self.temperature:g}"
            )

    @property
    def wait(self) -> int:
        """Number of rounds before the sites are divided."""
        return max(math.ceil(self.warmup * self.rounds), 1)

    def init(self, params: Tree) -> State:
        return State(0, params, (), False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("losses", first=self.wait, last=self.wait), Job("train")

    def request(self, state: State) -> Request:
        if state.round >= self.wait and not state.divided:
            return Request(state.round, {"params": state.params}, "losses")
        share = self.most * ramp(state.round - self.wait, self.growth * self.rounds)
        noisy = {"noisy": {"share": torch.tensor(share, dtype=torch.float64)}}
        return Request(state.round, {"params": state.params}, per_site=dict.fromkeys(state.noisy, noisy))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        if request.job == "losses":
            return Reply({"losses": PerSiteUniform({site.name: self.class_losses(start, site)})}), memory
        prior = class_counts(data, self.task.network.outputs).clamp_min(FEWEST).log()
        noisy = "noisy" in request.trees
        share = float(request.trees["noisy"]["share"]) if noisy else 0.0
        shared = cached_model(self.task, start, site.device, "shared").eval() if noisy else None

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0]) + prior.to(batch[0])
            if shared is None:
                return self.task.loss(Said(z), batch)
            with torch.no_grad():
                soft = (shared(batch[0]) / self.temperature).softmax(1)
            learned = F.kl_div(z.log_softmax(1), soft, reduction="batchmean")
            return share * learned + (1 - share) * F.cross_entropy(z, batch[1])

        return self.visible(self.local.change(self.task, start, site, request.round, loss=loss), site), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.round >= self.wait and not state.divided:
            found = reply.gather("losses")
            names = sorted(found)
            table = normalized(*(torch.stack([found[site][part] for site in names]) for part in ("losses", "known")))
            noisy = tuple(site for site, high in zip(names, higher_group(table).tolist(), strict=True) if high)
            return state._replace(noisy=noisy, divided=True)
        changes, sizes = self.received(reply)
        weights = distance_weights(changes, dict(zip(changes, sizes.tolist(), strict=True)), state.noisy)
        shares = torch.tensor(list(weights.values()), dtype=torch.float64)
        mean = Updates.of(changes).blend(shares / shares.sum())
        return state._replace(round=state.round + 1, params=tree.shift(state.params, mean))

    def class_losses(self, params: Tree, site: Site) -> Tree:
        """Return the mean cross-entropy of each class [C] at ``site``, and which classes it has."""
        logits, y = answers(self.task, params, site.data["train"], site.device)
        of = F.one_hot(y, self.task.network.outputs).double()
        each = F.cross_entropy(logits, y, reduction="none").double()
        return {"losses": of.T @ each / of.sum(0).clamp_min(1), "known": (of.sum(0) > 0).double()}


def normalized(losses: Tensor, known: Tensor) -> Tensor:
    """Return losses [K, C] scaled to 0...1 over the sites; a class that a site does not have counts as the lowest."""
    low = losses.masked_fill(known == 0, torch.inf).amin(0).nan_to_num(posinf=0.0)
    filled = torch.where(known > 0, losses, low)
    spread = filled.amax(0) - low
    return torch.where(spread > 0, (filled - low) / spread.clamp_min(1e-300), 0.0)


def distance_weights(changes: Trees, sizes: dict[str, float], noisy: tuple[str, ...]) -> dict[str, float]:
    """Return the weight ``n_i exp(−D_i)`` of each site, D being the scaled distance of a noisy site to a clean one.

    The distance of two sites is the sum over tensors of the Euclidean distance of their changes; D_i is the smallest
    distance of a noisy site to a clean one, divided by the largest such number, and 0 for clean sites.
    """
    clean = [site for site in changes if site not in noisy]
    gaps = {
        site: min(sum(float((leaf - changes[c][n]).norm()) for n, leaf in changes[site].items()) for c in clean)
        for site in changes
        if site in noisy and clean
    }
    largest = max(gaps.values(), default=0.0)
    return {site: size * math.exp(-gaps.get(site, 0.0) / largest if largest else 0.0) for site, size in sizes.items()}
