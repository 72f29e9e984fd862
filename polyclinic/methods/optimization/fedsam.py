"""FedSAM: sites train for flat minima, which suit the mean of their models and other sites.

Qu, Li, Duan, Liu, Tang and Lu, "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, Algorithm
1, https://arxiv.org/abs/2206.02618, and Caldarola, Caputo and Ciccone, "Improving Generalization in Federated Learning
by Seeking Flat Minima", ECCV 2022, https://arxiv.org/abs/2203.11834 (FedASAM with ``adaptive``). Around the local
training of any method. Departure: the first pass of a step does not update running statistics.
"""

from dataclasses import dataclass, fields
from typing import Any

from polyclinic.core.method import Method
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining, Loss, Trainable
from polyclinic.learning.training.sharpness import sharpened
from polyclinic.methods.catalog import OWN_STEPS
from polyclinic.methods.registry import Setting, build, entry


@dataclass(frozen=True)
class SharpnessAware(LocalTraining):
    """Local training whose steps follow the gradient at ``θ + ρ ∇L(θ) / ‖∇L(θ)‖``; a penalty is taken at θ.

    Attributes:
        rho: ρ, the length of the perturbation.
        adaptive: Whether each coordinate of the perturbation is scaled by the size of its weight.
    """

    rho: float = 0.05
    adaptive: bool = False

    def fit(
        self, task: Trainable, start: Tree, site: Site, round: int, *, loss: Loss | None = None, **how: Any
    ) -> Tree:
        """Return the parameters after training from ``start``. Arguments as in ``LocalTraining.fit``."""
        return super().fit(task, start, site, round, loss=sharpened(loss or task.loss, self.rho, self.adaptive), **how)


FLAT = ("fedsam", "fedlesam", "fedspeed", "harmofl")
"""Methods that take the gradient at perturbed weights themselves."""


def sharpness_aware(local: LocalTraining, rho: float, adaptive: bool = False) -> SharpnessAware:
    """Return ``local`` with the gradient taken at the perturbed weights.

    Raises:
        ConfigError: If ρ is negative, or the training is private: the perturbation needs the gradient of a minibatch.
    """
    if rho < 0:
        raise ConfigError(f"fedsam: rho must be at least 0, not {rho:g}")
    refuse_private(local, "fedsam", "the weights are perturbed along the gradient of a minibatch")
    kept = {field.name: getattr(local, field.name) for field in fields(LocalTraining)}
    return SharpnessAware(**kept, rho=rho, adaptive=adaptive)


def fedsam(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    rho: float = 0.05,
    adaptive: bool = False,
    uniform: bool = False,
) -> Method[Any]:
    """Build the method ``over`` with sharpness-aware local training.

    Args:
        over: The method whose local training is changed, with that method's own defaults.
        rho: ρ, the length of the perturbation of the weights; the papers choose it between 0.01 and 0.7.
        adaptive: Whether each coordinate of the perturbation is scaled by the size of its weight (FedASAM).
        uniform: Whether all sites have equal weight. If false, ``over`` weights them as it does by default.

    Raises:
        ConfigError: If the method takes training steps of its own, or perturbs weights too.
    """
    if over in FLAT:
        raise ConfigError(f'fedsam: over = "{over}" perturbs the weights itself: use it without fedsam')
    if OWN_STEPS in entry(over).exposes:
        raise ConfigError(f'fedsam: over = "{over}" takes training steps of its own, which fedsam does not change')
    setting = Setting(task, sharpness_aware(local, rho, adaptive), tuple(sites), rounds)
    return build(over, setting, {"uniform": True} if uniform else {})
