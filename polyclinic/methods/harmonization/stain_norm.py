"""Stain normalization with one generator and many discriminators.

Ke, Shen and Lu, "Style Normalization in Histology with Federated Learning", ISBI 2021; extended in Shen, Sowmya, Luo,
Liang, Shen and Ke, "A Federated Learning System for Histopathology Image Analysis With an Orchestral
Stain-Normalization GAN", IEEE Transactions on Medical Imaging 2023, https://doi.org/10.1109/TMI.2022.3221724.

The full texts were not available; this follows the abstracts. A generator is averaged over sites, a discriminator stays
at each. The generator receives an image without its style (each channel standardized), and its output must be
classified as real by every site's discriminator while preserving the structure. The network then trains on normalized
images. Self-distillation over time, of the second paper, is omitted. The generator is trained before the first round.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.style_translation import (
    Stain,
    Translator,
    images_only,
    in_judges,
    in_turn,
    outside_judges,
)
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.harmonization.input_front import fronted
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("stain-norm.State", 1)
class State(NamedTuple):
    """The number of times that the generator was averaged, and the generator."""

    exchanged: int
    generator: Tree


@dataclass(frozen=True)
class OneStyle:
    """Trains one generator for all sites, whose images every site's discriminator classifies as real.

    Attributes:
        exchanges: Number of times that the generator is averaged.
        epochs: Epochs over a site's images between two of them.
        lr: Step size of Adam.
        structure: λ, the weight of preserving the structure.
        width: Width of the generator and the discriminators.
    """

    task: Task
    exchanges: int = 5
    epochs: int = 4
    lr: float = 1e-3
    structure: float = 10.0
    width: int = 16
    batch_size: int = 16

    capabilities = Capabilities(uniform=False)

    @property
    def stain(self) -> Stain:
        """The generator and a discriminator."""
        return Stain(self.task.network.inputs, self.width, self.structure)

    def init(self, params: Tree) -> State:
        return State(0, tree.select(self.stain.first(), outside_judges))

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(once(f"style {k}", static=False) for k in range(self.exchanges))

    def request(self, state: State) -> Request | None:
        if state.exchanged >= self.exchanges:
            return None
        return Request(0, {"generator": state.generator}, f"style {state.exchanged}")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, stain = request.trees["generator"], self.stain
        judge = memory["judge"] if "judge" in memory else tree.select(stain.first(), in_judges)
        model: Any = cached_model(stain, {**start, **judge}, site.device)
        local = LocalTraining(self.epochs, self.batch_size, "adam", self.lr)
        in_turn(model, local, site, request.job, partial(stain.judge, model), partial(stain.restyle, model))
        end = params_of(model)
        update = WeightedMean.of(tree.sub(tree.select(end, outside_judges), start), float(len(site.data["train"])))
        return Reply({"generator": update}), {**memory, "judge": tree.select(end, in_judges)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return State(state.exchanged + 1, reply.mean("generator").apply_to(state.generator))

    def front(self, state: State) -> Tree:
        return tree.prefixed("front", tree.under("made", state.generator))


def stain_norm(
    task: Task,
    local: LocalTraining,
    *,
    exchanges: int = 5,
    epochs: int = 4,
    lr: float = 1e-3,
    structure: float = 10.0,
    width: int = 16,
    uniform: bool = False,
) -> Prepared:
    """Compose the training of the generator with FedAvg on normalized images.

    Args:
        exchanges: Number of times that the generator is averaged.
        epochs: Epochs over a site's images between two of them.
        lr: Step size of the generator's Adam.
        structure: λ, the weight of preserving the structure.
        width: Width of the generator and the discriminators.
    """
    images_only(task.network.inputs)
    found = OneStyle(task, exchanges, epochs, lr, structure, width, local.batch_size)
    task = fronted(task, Translator(task.network.inputs, width, standardize=True))
    return Prepared(found, FedAvg(task, local, uniform=uniform), task)
