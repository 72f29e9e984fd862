"""Fine-tuning at each site: the shared model is trained on the site's own examples before it predicts there.

The most common personalization baseline, for example in Yu, Bagdasaryan and Shmatikov, "Salvaging Federated Learning by
Local Adaptation", 2020, https://arxiv.org/abs/2002.04758. Around any method; its replies and its shared model are
unchanged. The tuned model predicts at its site only and never leaves it, so that fine-tuning is not private training
even if the method's own training is. It is repeated for every evaluation, from the shared model of that round.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InHead, Not, Task
from polyclinic.learning.training.local import LocalTraining, plain
from polyclinic.methods.registry import Setting, build

Part = Literal["all", "head", "body"]


@dataclass(frozen=True)
class FineTuned(MethodWrapper[Any]):
    """Any method, whose model each training site fine-tunes before it predicts. Other sites use it unchanged.

    Attributes:
        task: The task of the model with which sites predict.
        local: The training settings; their optimizer, learning rate and minibatch size are used.
        epochs: Passes over the site's training examples.
        part: The layers to train: all, the head, or all but the head.
    """

    inner: Method[Any]
    task: Task
    local: LocalTraining = LocalTraining()
    epochs: int = 1
    part: Part = "all"

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ConfigError(f"fine-tuning takes 0 or more epochs, not {self.epochs}")

    @property
    def tuning(self) -> LocalTraining:
        """The training settings of the fine-tuning, without privacy."""
        return replace(plain(self.local), epochs=self.epochs, steps=None)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        params = self.inner.adapted_model(request, memory, site, role)
        if not self.epochs or not len(site.data.get("train", ())):
            return params
        task: Task = self.prediction_task or self.task
        head = InHead(task)
        trainable = {"all": None, "head": head, "body": Not(head)}[self.part]
        return self.tuning.fit(task, params, site, request.round, trainable=trainable, slot="fine-tuned")


def fine_tuned(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    epochs: int = 1,
    part: Part = "all",
    uniform: bool = False,
) -> FineTuned:
    """Build the method ``over`` with fine-tuning at each site.

    Args:
        over: The method whose model is fine-tuned, with that method's own defaults.
        epochs: Passes over the site's training examples; 0 for the method itself.
        part: The layers to train: "all", the "head", or the "body", which is all but the head.
        uniform: Whether all sites have equal weight. If false, ``over`` weights them as it does by default.
    """
    inner = build(over, Setting(task, local, tuple(sites), rounds), {"uniform": True} if uniform else {})
    return FineTuned(inner, task, local, epochs, part)
