"""FedProx: sites are held near where they started.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2 and equation 2. https://arxiv.org/abs/1812.06127.
"""

from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.methods.optimization.fedavg import FedAvg


def fedprox(task: Task, local: LocalTraining, *, mu: float = 0.01, lr: float = 1.0, uniform: bool = False) -> FedAvg:
    """FedAvg whose sites are held near where they started, by μ/2 · ‖w − w₀‖².

    Args:
        mu: μ, the pull towards where a site started; from 0.001 to 1 in the paper.

    Raises:
        ValueError: If ``mu`` is negative, which would push sites away.
    """
    if mu < 0:
        raise ConfigError(f"mu must be at least 0, not {mu:g}")
    return FedAvg(task, local.with_penalty(Proximal(mu)), lr, uniform)
