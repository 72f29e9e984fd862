"""Loss and gradient of a model over all of a site's data."""

from functools import lru_cache
from typing import Any

import torch

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model, gradient, trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.seeding import seeded

CHUNK = 256  # examples in memory at once


def risk(task: Task, params: Tree, site: Site, round: int, role: str = "train", data: Any = None) -> float:
    """Compute F_k(w): the task's loss averaged over all of a site's examples, in evaluation mode.

    Args:
        round: Seeds the random numbers of the loss, if it uses any.
        role: The role of the data.
        data: Data to use instead of those of ``role``.

    Raises:
        ValueError: If there are no examples.
    """
    data = site.data.get(role, ()) if data is None else data
    if not len(data):
        raise ConfigError(f"{site.name} has no {role} data: this method needs some at every site")
    model, total = cached_model(task, params, site.device).eval(), 0.0
    with torch.inference_mode(), seeded(site.rng(round, "risk", role), site.device):
        for chunk in chunks(data, CHUNK):
            x, y = data[chunk]
            total += float(task.loss(model, (x.to(site.device), y.to(site.device)))) * len(chunk)
    return total / len(data)


def full_gradient(task: Task, params: Tree, site: Site, round: int, role: str = "train", training: bool = True) -> Tree:
    """Compute ∇F_k(w): the gradient of the loss averaged over all of a site's examples, by parameter name.

    Batch normalization sees up to 256 examples together, or with ``training=False`` its running statistics.
    """
    data, model = site.data[role], cached_model(task, params, site.device).train(training)
    total: dict[str, torch.Tensor] = {}
    with seeded(site.rng(round, "gradient", role), site.device):
        for chunk in chunks(data, CHUNK):
            x, y = data[chunk]
            share = len(chunk) / len(data)
            for name, g in gradient(task.loss(model, (x.to(site.device), y.to(site.device))) * share, model).items():
                total[name] = total[name] + g if name in total else g
    return {name: g.detach().cpu() for name, g in total.items()}


@lru_cache(maxsize=32)
def trained(task: Task) -> frozenset[str]:
    """Return the names of the parameters that train. All other leaves are statistics and constants."""
    with torch.random.fork_rng(devices=[]):
        return frozenset(trainable(task.model()))
