"""Sites learn from the labels and from a teacher that is fixed while they train.

Kumar et al., 2021, as the survey describes it: for the detection of COVID-19, an existing network is the teacher and
the sites' models are its students. The paper's details were not available; the loss is that of Hinton, Vinyals and
Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531: ``(1 − a) · CE + a · T² ·
KL``.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import Said, divergence
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("teacher-student.State", 1)
class State(NamedTuple):
    """The students' model, and the teacher if it is another."""

    round: int
    params: Tree
    teacher: Tree


@dataclass(frozen=True)
class TeacherStudent(SizeWeighted[State]):
    """FedAvg whose sites also learn a teacher's predictions on their images.

    Attributes:
        teacher: ``first``: the study's initial network, for a study that starts from a trained one; ``global``: the
            server's model at the start of the round.
        share: a, the weight of the teacher relative to the labels; 0.5.
        temperature: T; 2 to 4.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    teacher: Literal["first", "global"] = "global"
    share: float = 0.5
    temperature: float = 3.0
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.teacher not in ("first", "global"):
            raise ConfigError(
                f"no teacher is called {self.teacher!r}: there are global, the server's model before the round, and "
                "first, the study's initial network"
            )

    def init(self, params: Tree) -> State:
        return State(0, params, params if self.teacher == "first" else {})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "teacher": state.teacher})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        teacher = cached_model(self.task, request.trees["teacher"] or start, site.device, "teacher").eval()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0])
            with torch.no_grad():
                t = teacher(batch[0])
            # (1 − a) CE(z, y) + a T² KL( softmax(t / T) ‖ softmax(z / T) )
            taught = divergence(self.task.kind, z, t, self.temperature)
            return (1 - self.share) * self.task.loss(Said(z), batch) + self.share * taught

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return state._replace(round=state.round + 1, params=reply.mean("update").apply_to(state.params))
