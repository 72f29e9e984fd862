"""Sites learn from the labels and from a teacher that stands still while they train.

Kumar et al., 2021, as the survey describes it: for the detection of COVID-19, an existing network is the teacher and
the sites' models are its students. The paper's details were not at hand; the loss is that of Hinton, Vinyals and Dean,
"Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531: (1 − a) · CE + a · T² · KL.
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
from polyclinic.learning.objectives.distillation_loss import Said, divergence
from polyclinic.learning.tasks.task import Batch, Task, cached_model
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("teacher-student.State", 1)
class State(NamedTuple):
    """The students' model, and the teacher where it is another."""

    round: int
    params: Tree
    teacher: Tree


@dataclass(frozen=True)
class TeacherStudent(SizeWeighted[State]):
    """FedAvg whose sites also learn what a teacher says of their images.

    Attributes:
        teacher: ``first``: the network with which the study begins, for a study that begins from a trained one;
            ``global``: the server's model as the round began, which needs none.
        share: a, what the teacher counts instead of the labels; 0.5.
        temperature: T; 2 to 4.
        uniform: Whether every site counts the same, instead of in proportion to its examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    teacher: Literal["first", "global"] = "global"
    share: float = 0.5
    temperature: float = 3.0
    uniform: bool = False

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


def teacher_student(
    task: Task,
    local: LocalTraining,
    *,
    teacher: str = "global",
    share: float = 0.5,
    temperature: float = 3.0,
    uniform: bool = False,
) -> TeacherStudent:
    """FedAvg with a teacher: ``global`` or ``first``."""
    if teacher == "first":
        return TeacherStudent(task, local, "first", share, temperature, uniform)
    if teacher != "global":
        raise ConfigError(
            f"no teacher is called {teacher!r}: there are global, the server's model as it was before a "
            "round, and first, the network that the study begins with"
        )
    return TeacherStudent(task, local, "global", share, temperature, uniform)
