"""Federated masked image modeling, then federated training on the labels there are.

Yan, Qu, Wei, Huang, Shen, Rubin, Xing and Zhou, "Label-Efficient Self-Supervised Federated Learning for Tackling Data
Heterogeneity in Medical Imaging", IEEE TMI 2023, https://arxiv.org/abs/2205.08576: a vision transformer learns to fill
in hidden patches (its Fed-MAE), is averaged whole, and is then trained on labels, federated too. Departures: plain
FedAvg fine-tunes, without layer-wise decay of the learning rate, drop-path or warm-up; networks that are no
transformers learn by SimMIM's rule (see ``learning.objectives.masked_modeling``). Fed-BEiT, the paper's other half, is
not here: it needs a tokenizer trained elsewhere.
"""

from dataclasses import replace

from polyclinic.errors import ConfigError
from polyclinic.learning.objectives.masked_modeling import Masked
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import Pretrained, Then, share_of
from polyclinic.methods.optimization.fedavg import FedAvg


def fedmae(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    pretrain: float = 0.5,
    pretrain_lr: float = 0.0,
    pretrain_optimizer: str = "",
    hidden: float = 0.75,
    grid: int = 8,
    width: int = 64,
    depth: int = 1,
    uniform: bool = False,
) -> Then:
    """Learns to fill in what is hidden for the first share ``pretrain`` of the rounds, then trains on labels.

    Args:
        pretrain: The share of them in which every image of a site is used, labeled or not.
        pretrain_lr: The learning rate in those; 0 for that of training. 1e-3 with ``adamw`` in the paper.
        pretrain_optimizer: The optimizer in those; that of training where empty.
        hidden: How much of each image is hidden; 0.75.
        grid: How finely, for networks that are no transformers.
        width: The decoder's.
        depth: How many layers it has.
        uniform: Whether sites count the same.
    """
    if pretrain_optimizer not in ("", "sgd", "adam", "adamw"):
        raise ConfigError(f"no optimizer is called {pretrain_optimizer!r}; there are sgd, adam, adamw")
    chosen = {"optimizer": pretrain_optimizer} if pretrain_optimizer else {}
    first = replace(local, lr=pretrain_lr or local.lr, **chosen)  # type: ignore[arg-type]
    learner = Pretrained(Masked(task, hidden, grid, width, depth), first, uniform)
    return Then(learner, FedAvg(task, local, uniform=uniform), share_of(rounds, pretrain))
