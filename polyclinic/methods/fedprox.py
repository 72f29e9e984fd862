"""FedProx: sites are held near where they started.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2 and equation 2. https://arxiv.org/abs/1812.06127.
"""

from polyclinic.errors import ConfigError
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.local import Local, Proximal
from polyclinic.tasks.task import Task


def fedprox(task: Task, local: Local, *, mu: float = 0.01, lr: float = 1.0, uniform: bool = False) -> FedAvg:
    """FedAvg whose sites are held near where they started, by μ/2 · ‖w − w₀‖².

    Args:
        mu: μ, the pull towards where a site started; from 0.001 to 1 in the paper.

    Raises:
        ValueError: Where ``mu`` is negative, which would push sites away.
    """
    if mu < 0:
        raise ConfigError(f"mu must be at least 0, not {mu:g}")
    return FedAvg(task, local.with_penalty(Proximal(mu)), lr, uniform)
