"""Federated masked image modeling, then federated training on the available labels.

Yan, Qu, Wei, Huang, Shen, Rubin, Xing and Zhou, "Label-Efficient Self-Supervised Federated Learning for Tackling Data
Heterogeneity in Medical Imaging", IEEE TMI 2023, https://arxiv.org/abs/2205.08576: a vision transformer learns to
reconstruct masked patches (its Fed-MAE), is averaged whole, and is then trained on labels, also federated. Departures:
plain FedAvg fine-tunes, without layer-wise decay of the learning rate, drop-path or warm-up; networks other than
transformers learn by SimMIM's rule (see ``learning.objectives.masked_modeling``). Fed-BEiT, the paper's other half, is
not included, since it needs a separately trained tokenizer.
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
    """Compose masked image modeling, for the first share ``pretrain`` of the rounds, with FedAvg on labels.

    Args:
        pretrain: The share of the rounds in which every image of a site is used, labeled or not.
        pretrain_lr: The learning rate in those rounds; 0 for that of training. 1e-3 with ``adamw`` in the paper.
        pretrain_optimizer: The optimizer in those rounds; that of training if empty.
        hidden: The masked fraction of each image; 0.75.
        grid: Number of patches per axis, for networks other than transformers.
        width: Width of the decoder.
        depth: Number of layers of the decoder.
        uniform: Whether all sites have equal weight, instead of in proportion to their examples.
    """
    if len(task.network.inputs) == 2:
        raise ConfigError(f"fedmae hides parts of images or columns of tables, and {task.network.name} reads bags")
    if pretrain_optimizer not in ("", "sgd", "adam", "adamw"):
        raise ConfigError(f"no optimizer is called {pretrain_optimizer!r}; there are sgd, adam, adamw")
    chosen = {"optimizer": pretrain_optimizer} if pretrain_optimizer else {}
    first = replace(local, lr=pretrain_lr or local.lr, **chosen)  # type: ignore[arg-type]
    learner = Pretrained(Masked(task, hidden, grid, width, depth), first, uniform)
    return Then(learner, FedAvg(task, local, uniform=uniform), share_of(rounds, pretrain))
