"""Representations of inputs: one vector for each example, from the encoder or before the head."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task, represent


@dataclass(frozen=True)
class _OfNetwork:
    network: Network

    def model(self) -> nn.Module:
        return self.network()


def of(network: Network) -> Task:
    """Wrap ``network`` as a task that suffices to compute its representation."""
    return cast(Task, _OfNetwork(network))


def pooled(h: Tensor) -> Tensor:
    """Average [b, F, *spatial] over space to [b, F]; [b, F] is unchanged."""
    return h.flatten(2).mean(2) if h.ndim > 2 else h


def features(task: Task, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the pooled input of the head: [b, F]."""
    return pooled(represent(task, model, inputs)[0])


def encoded(task: Task, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the pooled output of the encoder: [b, F]. For a U-Net this is the bottleneck; else the head's input."""
    return pooled(_leaving(task, model, inputs)[1])


def _leaving(task: Task, model: nn.Module, inputs: Tensor) -> tuple[str, Tensor]:
    """Return the name of the encoder's last module, and its output."""
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, given: outputs.append((name, given)))

    hooks = [record(name, m) for name, m in model.named_modules() if name and task.network.in_encoder(f"{name}.")]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[-1]


def encode_all(task: Task, model: nn.Module, data: Any, device: str = "cpu", which: Tensor | None = None) -> Tensor:
    """Return ``encoded`` for all examples, or those at ``which``, in evaluation mode without gradients: [n, F]."""
    model.eval()
    index = torch.arange(len(data)) if which is None else which
    with torch.no_grad():
        return torch.cat([encoded(task, model, data[chunk][0].to(device)).cpu() for chunk in index.split(64)])


@lru_cache(maxsize=64)
def head_width(task: Task) -> int:
    """Return F, the number of features that enter the head."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return features(task, task.model().eval(), torch.zeros(2, *task.network.inputs)).shape[1]


def encoded_width(task: Task) -> int:
    """Return F, the number of features of ``encoded``."""
    return _probe(task)[1]


def bottleneck(task: Task) -> str:
    """Return the name of the encoder's last module."""
    return _probe(task)[0]


@lru_cache(maxsize=64)
def _probe(task: Task) -> tuple[str, int]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        name, given = _leaving(task, task.model().eval(), torch.zeros(2, *task.network.inputs))
    return name, given.shape[1]
