"""FedIRM: sites without labels learn how classes relate to one another at sites with labels.

Liu, Yang, Dou and Heng, "Federated Semi-supervised Medical Image Classification via Inter-client Relation Matching",
MICCAI 2021, https://arxiv.org/abs/2106.08600, equations 2 to 6, with the official settings
(https://github.com/liuquande/FedIRM). Departures: rows of the relation matrix are averaged over the sites that have the
class, where the official code lets a missing class count as a uniform row; a labeled site's matrix comes from one pass
with the trained model instead of from its minibatches; a site with both kinds of data learns from both; the largest
entropy is a share of ln C, because the paper's 2.0 lies above ln 5 and so excluded nothing.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_momentum import follow_, ramp
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.class_relations import matrix, mismatch, relation_of, reliable
from polyclinic.learning.tasks.example_pool import fit_both
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import WEAK
from polyclinic.learning.training.local import LocalTraining


@savable("fedirm.State", 1)
class State(NamedTuple):
    """The model, and the relation matrix [C, C] of the labeled sites."""

    round: int
    params: Tree
    relation: Tree


@dataclass(frozen=True)
class FedIRM(Method[State]):
    """Labeled sites train and say how classes relate; sites without labels keep to that while they teach themselves.

    An unlabeled image is seen twice: what the model says of one view follows its own slow average's word on the
    other, and the classes of its confident predictions must relate as they do at the labeled sites. Sites count the
    same, as in the paper; during the warm-up, those without labels do not count.

    Attributes:
        warmup: Rounds in which unlabeled images wait; 20 of 200 in the paper. At least 1, for the first matrix.
        consistency: What both unsupervised losses count when grown, 15; ``growth``: rounds until then, 30.
        keep: How slowly the average moves; 0.99.
        confidence: The least probability of a pseudo-label; 0.3. ``entropy``: its largest entropy, as a share of ln C,
            in the mean of ``passes`` (10) forward passes with dropout.
        temperature: T of the relation matrix; 2.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    warmup: int = 20
    consistency: float = 15.0
    growth: int = 30
    keep: float = 0.99
    confidence: float = 0.3
    entropy: float = 0.9
    passes: int = 10
    temperature: float = 2.0

    def init(self, params: Tree) -> State:
        classes = self.task.network.outputs
        return State(0, params, {"matrix": torch.full((classes, classes), 1 / classes)})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "relation": state.relation})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "views")
        teacher = cached_model(self.task, memory.get("teacher", start), site.device, "teacher")
        shared, by = (
            request.trees["relation"]["matrix"].to(site.device),
            self.consistency * ramp(request.round, self.growth),
        )

        def known(model: nn.Module, batch: Batch) -> Tensor:
            return torch.stack([self.task.loss(model, (WEAK.view(batch[0], rng), batch[1])) for _ in range(2)]).mean()

        end, labels, free = fit_both(
            self.local,
            self.task,
            start,
            site,
            request.round,
            known,
            lambda model, x: by * self.alone(model, teacher, x, shared, rng),
            wait=request.round < max(self.warmup, 1),
            after_step=lambda model: follow_(teacher, model, self.keep),
        )
        update = WeightedMean.of(tree.sub(end, start), float(bool(labels or free)))
        relation = relation_of(self.task, end, site.data.get("train", ()), self.temperature, site.device)
        kept = {**memory, "teacher": params_of(teacher)} if free else memory
        return Reply({"update": update, "relation": relation}), kept

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        found = reply.leaf_mean("relation")
        fresh = torch.where(found.weight["matrix"] > 0, found.value["matrix"], state.relation["matrix"])
        params = reply.mean("update").apply_to(state.params)
        return State(state.round + 1, params, {"matrix": fresh})

    def alone(self, model: nn.Module, teacher: nn.Module, x: Tensor, shared: Tensor, rng: torch.Generator) -> Tensor:
        """What an unlabeled minibatch ``x`` costs: inconsistency with the teacher, and mismatch of relations."""
        one, other = WEAK.view(x, rng), WEAK.view(x, rng)
        logits = model(one)
        with torch.no_grad():
            target = teacher(other).softmax(1)
            of = reliable(logits, torch.stack([model(one) for _ in range(self.passes)]), self.confidence, self.entropy)
        inconsistency: Tensor = (logits.softmax(1) - target).square().sum(1).mean()
        return inconsistency + mismatch(matrix(logits, of, self.temperature), shared, (of.sum(0) > 0).float())


def fedirm(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    warmup: float = 0.1,
    consistency: float = 15.0,
    growth: float = 0.15,
    keep: float = 0.99,
    confidence: float = 0.3,
    entropy: float = 0.9,
    passes: int = 10,
    temperature: float = 2.0,
) -> FedIRM:
    """Sites without labels match how classes relate elsewhere. ``warmup`` and ``growth`` are shares of the rounds.

    Args:
        warmup: The share of them in which unlabeled images wait; 0.1 in the paper.
        growth: The share of the rounds after which they are; 0.15.
        passes: How many forward passes with dropout its mean is taken of; 10.
    """
    wait, grow = math.ceil(warmup * rounds), math.ceil(growth * rounds)
    return FedIRM(task, local, wait, consistency, grow, keep, confidence, entropy, passes, temperature)
