"""FedIRM: sites without labels match the relations between classes at sites with labels.

Liu, Yang, Dou and Heng, "Federated Semi-supervised Medical Image Classification via Inter-client Relation Matching",
MICCAI 2021, https://arxiv.org/abs/2106.08600, equations 2 to 6, with the official settings
(https://github.com/liuquande/FedIRM). The passes for the entropy need dropout: a network without any drops features in
front of its head. Running statistics are updated by the first pass of a step alone. Departures: rows of the relation
matrix are averaged over the sites that have the class, whereas the official code counts a missing class as a uniform
row; a labeled site's matrix comes from one pass with the trained model instead of from its minibatches; a site with
both kinds of data learns from both; the largest entropy is a share of ln C, because the paper's 2.0 exceeds ln 5 and
therefore excluded nothing.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import head_name
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
    """Labeled sites train and send class relations; unlabeled ones match these while they train on their predictions.

    An unlabeled image is seen in two views: the model's prediction on one follows its exponential moving average's
    prediction on the other, and the classes of its confident predictions must relate as they do at the labeled sites.
    All sites have equal weight, as in the paper; during the warm-up, those without labels have weight 0.

    Attributes:
        rounds: Number of planned rounds.
        warmup: Share of the rounds in which unlabeled images are not used; 0.1 in the paper. At least one round.
        consistency: Final weight of both unsupervised losses, 15.
        growth: Share of the rounds after which that weight is reached; 0.15.
        keep: Momentum of the moving average; 0.99.
        confidence: Least probability of a pseudo-label; 0.3.
        entropy: Largest entropy of a pseudo-label, as a share of ln C, in the mean of several forward passes.
        passes: Number of these forward passes, with dropout; 10. The published code averages 11.
        dropout: Probability with which features in front of the head are dropped in these passes if the network has no
            dropout of its own; 0.2 in the published network.
        temperature: T of the relation matrix; 2.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    warmup: float = 0.1
    consistency: float = 15.0
    growth: float = 0.15
    keep: float = 0.99
    confidence: float = 0.3
    entropy: float = 0.9
    passes: int = 10
    dropout: float = 0.2
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"fedirm: dropout must be a probability from 0 to less than 1, not {self.dropout:g}")
        if not self.dropout and not drops(self.task):
            raise ConfigError(
                "fedirm: without dropout all passes are equal and the entropy says nothing of a model's uncertainty: "
                "set dropout above 0, or the network's option dropout"
            )

    def init(self, params: Tree) -> State:
        classes = self.task.network.outputs
        return State(0, params, {"matrix": torch.full((classes, classes), 1 / classes)})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "relation": state.relation})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "views")
        teacher = cached_model(self.task, memory.get("teacher", start), site.device, "teacher")
        shared = request.trees["relation"]["matrix"].to(site.device)
        by = self.consistency * ramp(request.round, math.ceil(self.growth * self.rounds))

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
            wait=request.round < max(math.ceil(self.warmup * self.rounds), 1),
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
        """Return the loss of unlabeled inputs ``x``: inconsistency with the teacher, and mismatch of relations."""
        one, other = WEAK.view(x, rng), WEAK.view(x, rng)
        logits = model(one)
        with torch.no_grad():
            target = teacher(other).softmax(1)
            of = reliable(logits, self._passes(model, one), self.confidence, self.entropy)
        inconsistency: Tensor = (logits.softmax(1) - target).square().sum(1).mean()
        return inconsistency + mismatch(matrix(logits, of, self.temperature), shared, (of.sum(0) > 0).float())

    def _passes(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits [passes, b, C] of forward passes with dropout, which do not change running statistics."""
        head = model.get_submodule(head_name(self.task.network, model))
        hook = head.register_forward_pre_hook(lambda _, given: (F.dropout(given[0], self.dropout), *given[1:]))
        try:
            if drops(self.task):
                hook.remove()
            with still(model):
                return torch.stack([model(x) for _ in range(self.passes)])
        finally:
            hook.remove()


@lru_cache(maxsize=64)
def drops(task: Task) -> bool:
    """Return whether the network of ``task`` has dropout."""
    return any(isinstance(m, _DropoutNd) and m.p > 0 for m in task.model().modules())
