"""FedCorr: sites with wrong labels are found by the dimension of their predictions, and correct their labels.

Xu, Chen, Quek and Chong, "FedCorr: Multi-Stage Federated Learning for Label Noise Correction", CVPR 2022, Algorithm 1,
https://arxiv.org/abs/2204.04677, after the published code: first all sites train and noisy ones correct their labels,
then clean sites train alone and noisy ones correct once more, then all train. Departures: mixtures start from one
division instead of random ones; in the first stage all sites of a round train from the same model; stages are shares of
the rounds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch, targets_of
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.objectives.distillation_loss import Said, answers
from polyclinic.learning.tasks.relabeled import Relabeled
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.label_noise.intrinsic_dimension import intrinsic_dimension
from polyclinic.methods.label_noise.two_groups import higher_group


@savable("fedcorr.State", 1)
class State(NamedTuple):
    """The model; by site, sums of dimensions and shares of wrong labels; noisy sites, and whether they correct now."""

    round: int
    params: Tree
    dimensions: dict[str, float]
    levels: dict[str, float]
    noisy: tuple[str, ...]
    correcting: bool


@dataclass(frozen=True)
class FedCorr(SizeWeighted[State]):
    """FedAvg in three stages, for sites some of which have many wrong labels.

    Attributes:
        rounds: Number of planned rounds.
        first: Share of the rounds of the first stage, at least one round.
        second: Share of the rounds of the second stage.
        beta: β, the weight of the distance to the received model, times the share of wrong labels; 5 in the paper.
        ratio: The share of the labels found to be wrong that may be corrected in a round; 0.5 in the paper.
        confidence: The least probability of a new label; 0.5 in the paper.
        clean: The largest share of wrong labels of a site that trains in the second stage; 0.1 in the paper.
        mixup: Whether examples are mixed, as in the published experiments.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    first: float = 0.05
    second: float = 0.5
    beta: float = 5.0
    ratio: float = 0.5
    confidence: float = 0.5
    clean: float = 0.1
    mixup: bool = True
    uniform: bool = False

    def __post_init__(self) -> None:
        refuse_private(self.local, "fedcorr", "labels follow from the losses of single examples")
        if min(self.first, self.second) < 0 or self.first + self.second > 1:
            raise ConfigError("fedcorr: first and second are shares of the rounds and add up to at most 1")

    needs_each_reply = True

    @property
    def ends(self) -> tuple[int, int]:
        """The rounds in which the first two stages have ended."""
        first = max(round(self.first * self.rounds), 1)
        return first, first + round(self.second * self.rounds)

    @property
    def jobs(self) -> tuple[Job, ...]:
        early, late = self.ends
        return Job("train"), Job("correct", last=early - 1, at_start=False), Job("correct all", first=late, last=late)

    def init(self, params: Tree) -> State:
        return State(0, params, {}, {}, (), False)

    def request(self, state: State) -> Request:
        early, late = self.ends
        if state.correcting:
            job = "correct" if state.round < early else "correct all"
            return Request(state.round, {"params": state.params}, job, recipients=state.noisy)
        calm = tuple(site for site, level in sorted(state.levels.items()) if level <= self.clean)
        own = {site: {"own": {"level": torch.tensor(level)}} for site, level in state.levels.items()}
        alone, own = calm if early <= state.round < late and calm else None, own if state.round < early else {}
        return Request(state.round, {"params": state.params}, recipients=alone, per_site=own)

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, known = request.trees["params"], site.data["train"]
        labels = memory["labels"]["y"] if "labels" in memory else targets_of(known)
        data = Relabeled(known, labels)
        if request.job != "train":
            wrong, level = suspects(memory.get("losses", {}).get("each", torch.zeros(len(labels))), self.ratio)
            sure, new = answers(self.task, start, data, site.device)[0].softmax(1).max(1)
            wrong = wrong if request.job == "correct" else torch.ones_like(wrong)
            corrected = {"labels": {"y": torch.where(wrong & (sure > self.confidence), new, labels)}}
            return Reply({"level": PerSiteUniform({site.name: {"share": torch.tensor(level)}})}), {
                **memory,
                **corrected,
            }
        pull = self.beta * float(request.trees["own"]["level"]) if "own" in request.trees else 0.0
        origin = {name: leaf.to(site.device) for name, leaf in start.items()}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = self.mixed(model, batch) if self.mixup else self.task.loss(model, batch)
            if not pull:
                return value
            gaps = torch.cat([(p - origin[n]).flatten() for n, p in trainable(model).items()])
            pulled: Tensor = value + pull * torch.linalg.vector_norm(gaps)
            return pulled

        end = self.local.fit(self.task, start, site, request.round, data=data, loss=loss)
        reply = Reply({"update": self.update(end, start, site)})
        if request.round >= self.ends[0]:
            return reply, memory
        z = answers(self.task, end, data, site.device)[0]
        dimension = {"mean": intrinsic_dimension(z.softmax(1)).mean()}
        shown = Reply({"dimension": PerSiteUniform({site.name: dimension})})
        return reply + shown, {**memory, "losses": {"each": F.cross_entropy(z, labels, reduction="none")}}

    def mixed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a minibatch mixed with itself: ``λ L(z, y) + (1 − λ) L(z, y')``, λ ~ U(0, 1)."""
        x, y = batch
        share, other = float(torch.rand(())), torch.randperm(len(x)).to(x.device)
        z = Said(model(share * x + (1 - share) * x[other]))
        return share * self.task.loss(z, (x, y)) + (1 - share) * self.task.loss(z, (x, y[other]))

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        early, late = self.ends
        if state.correcting:
            found = reply.gather("level") if state.round < early and reply.parts else {}
            levels = {**state.levels, **{site: float(leaves["share"]) for site, leaves in found.items()}}
            return state._replace(round=state.round + (state.round < early), levels=levels, correcting=False)
        state = state._replace(params=reply.applied("update", state.params))
        if state.round >= early:
            again = state.round + 1 == late and bool(state.noisy)
            return state._replace(round=state.round + 1, correcting=again)
        new = {site: float(leaves["mean"]) for site, leaves in reply.gather("dimension").items()}
        sums = {**state.dimensions, **{site: state.dimensions.get(site, 0.0) + x for site, x in new.items()}}
        high = higher_group(torch.tensor([[sums[site]] for site in sorted(sums)])).tolist()
        noisy = tuple(site for site, above in zip(sorted(sums), high, strict=True) if above)
        state = state._replace(dimensions=sums, levels=dict.fromkeys(sorted(sums), 0.0), noisy=noisy)
        return state._replace(correcting=True) if noisy else state._replace(round=state.round + 1)


def suspects(losses: Tensor, ratio: float) -> tuple[Tensor, float]:
    """Return which labels [n] may be corrected, those with the highest ``losses``, and the share of wrong ones."""
    level = float(higher_group(losses[:, None]).double().mean()) if len(losses) else 0.0
    chosen = losses.argsort(descending=True, stable=True)[: int(len(losses) * level * ratio)]
    return torch.zeros(len(losses), dtype=torch.bool).index_fill(0, chosen, True), level
