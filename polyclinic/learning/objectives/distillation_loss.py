"""Distillation: divergences of model outputs by kind of task, and mutual learning of two models."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch, chunks
from polyclinic.learning.networks.latent import head_width, pooled, represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task


class Said(nn.Module):
    """A model that returns the precomputed output ``words``, so that a task's loss needs no second forward pass."""

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        """Return ``words`` for any ``x``."""
        return self.words


def divergence(kind: str, learner: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the divergence of the outputs ``learner`` from the outputs ``target``, both raw [b, C, ...].

    Classes (of images or pixels): ``T² · KL(softmax(target / T) ‖ softmax(learner / T))``, Hinton et al., 2015,
    averaged over batch and pixels. Labels, and the intervals of survival: the same for each one's Bernoulli variable.
    Regression, reconstructed images, and a single output of survival: half the mean squared error.
    """
    T = temperature
    match kind:
        case "survival" if learner.shape[1] > 1:
            return divergence("multilabel", learner, target, temperature)
        case "regression" | "reconstruction" | "survival":
            return F.mse_loss(learner, target) / 2
        case "multilabel":
            p, q = target / T, learner / T
            each = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (
                F.logsigmoid(-p) - F.logsigmoid(-q)
            )
            return T**2 * each.mean()
        case "classification" | "segmentation":
            p, q = (target / T).log_softmax(1), (learner / T).log_softmax(1)
            return T**2 * (p.exp() * (p - q)).sum(1).mean()
    raise ConfigError(
        f"outputs of kind {kind} cannot be distilled: the kinds are classification, multilabel, segmentation, "
        "regression, reconstruction and survival"
    )


def answers(task: Task, params: Tree, data: Any, device: str = "cpu", size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the outputs of the model with ``params`` for every example of ``data``, in order.

    Returns:
        Raw outputs [n, C, ...], and the second element that ``data`` yields [n, ...]; both on the CPU.
    """
    model = cached_model(task, params, device, "answers").eval()
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad():
        for chunk in chunks(data, size):
            if len(chunk):
                x, y = data[chunk]
                z = model(x.to(device))
                outputs.append((z if isinstance(z, Tensor) else z[0]).cpu())
                targets.append(y)
    if not outputs:
        return torch.zeros(0, task.network.outputs), torch.zeros(0, dtype=torch.long)
    return torch.cat(outputs), torch.cat(targets)


class Duo(nn.Module):
    """A teacher, a student, and a projection of the student's representation to the teacher's."""

    def __init__(self, teacher: nn.Module, student: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student, self.projection = teacher, student, projection


@dataclass(frozen=True)
class Dual:
    """Two models that learn from labels and from each other; each treats the other's outputs as constant.

    Attributes:
        teacher: The teacher's task.
        student: The student's task: the same with the same or another network.
        labels: Weights of the label losses of (teacher, student).
        decision: Weights of the divergence from the other's outputs, for (teacher, student).
        representation: Weight of the distance between representations.
        adaptive: Whether both distances are divided by the sum of the two task losses, so that inaccurate models
            contribute little.
        temperature: T of the outputs.
    """

    teacher: Task
    student: Task
    labels: tuple[float, float] = (1.0, 1.0)
    decision: tuple[float, float] = (1.0, 1.0)
    representation: float = 1.0
    adaptive: bool = True
    temperature: float = 1.0

    def model(self) -> nn.Module:
        """Build a ``Duo``."""
        projection = nn.Linear(head_width(self.student.network), head_width(self.teacher.network), bias=False)
        return Duo(self.teacher.model(), self.student.model(), projection)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the two models' losses."""
        assert isinstance(model, Duo)
        h_t, z_t = represent(self.teacher.network, model.teacher, batch[0])
        h_s, z_s = represent(self.student.network, model.student, batch[0])
        L_t, L_s = self.teacher.loss(Said(z_t), batch), self.student.loss(Said(z_s), batch)
        c = (L_t + L_s).detach().clamp_min(1e-8) if self.adaptive else torch.ones(())
        # KD_t = KL(softmax z_s ‖ softmax z_t) / c,  KD_s = KL(softmax z_t ‖ softmax z_s) / c
        KD_t = divergence(self.teacher.kind, z_t, z_s.detach(), self.temperature) / c
        KD_s = divergence(self.student.kind, z_s, z_t.detach(), self.temperature) / c
        # H = MSE(h_t, W_h h_s) / c
        H = F.mse_loss(model.projection(pooled(h_s)), pooled(h_t)) / c if self.representation else torch.zeros_like(c)
        own = self.labels[0] * L_t + self.labels[1] * L_s
        return own + self.decision[0] * KD_t + self.decision[1] * KD_s + self.representation * H


class _Either(nn.Module):
    """Two models, and the choice between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.choice: Tensor
        self.register_buffer("choice", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of ``second`` if ``choice`` is 1, else of ``first``."""
        answer: Tensor = (self.second if self.choice > 0.5 else self.first)(x)
        return answer


@dataclass(frozen=True)
class Either(Network):
    """A network that is one of two: its tensors are those of ``first``, of ``second``, and ``choice``."""

    pair: tuple[Network, ...] = ()

    def __call__(self) -> nn.Module:
        """Build a module that initially uses the first network."""
        return _Either(*(network() for network in self.pair))


def either(task: Task, second: Network) -> Task:
    """Return ``task`` with a model that is either its own or of the network ``second``."""
    own = task.network
    return replace(task, network=Either("either", own.inputs, own.outputs, pair=(own, second)))


def look(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's output [b, C, ...] and its attention map [b, places] of length 1, from its last convolution.

    The map is the mean square over channels at each place. Zagoruyko and Komodakis, "Paying More Attention to
    Attention", ICLR 2017, equation 2. https://arxiv.org/abs/1612.03928. Without convolutions it is empty.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    maps: list[Tensor] = []
    hook = convolutions[-1].register_forward_hook(lambda *given: maps.append(given[2])) if convolutions else None
    try:
        z = model(inputs)
    finally:
        if hook:
            hook.remove()
    places = maps[-1].square().mean(1).flatten(1) if maps else inputs.new_zeros(len(inputs), 0)
    return z if isinstance(z, Tensor) else z[0], F.normalize(places, dim=1)


@dataclass(frozen=True)
class Matching:
    """Distillation loss for inputs whose targets are indices into ``wanted``, the outputs of an ensemble.

    Attributes:
        kind: The kind of the task.
        wanted: Raw outputs [n, C, ...].
        temperature: T.
    """

    kind: str
    wanted: Tensor
    temperature: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the divergence of ``model``'s outputs from the wanted ones."""
        z = model(batch[0])
        target = self.wanted[batch[1].cpu()].to(batch[0].device)
        return divergence(self.kind, z if isinstance(z, Tensor) else z[0], target, self.temperature)
