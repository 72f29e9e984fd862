"""Networks made of other networks, which a task may use like any other."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from polyclinic.learning.networks.network_catalog import Architecture, Network
from polyclinic.learning.tasks.task import Task

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Composed:
    """What is made of ``network`` takes its inputs and gives its outputs. Calling it builds the module."""

    network: Network

    def __call__(self) -> nn.Module:
        """A new module with random parameters."""
        return self.network()

    @property
    def inputs(self) -> tuple[int, ...]:
        """The network's."""
        return self.network.inputs

    @property
    def outputs(self) -> int:
        """The network's."""
        return self.network.outputs

    @property
    def architecture(self) -> Architecture:
        """The network's."""
        return self.network.architecture

    def in_head(self, name: str) -> bool:
        """Whether a tensor belongs to the network's head."""
        return self.network.in_head(name)

    def in_encoder(self, name: str) -> bool:
        """Whether a tensor belongs to the network's encoder."""
        return self.network.in_encoder(name)


def predicting_with(task: T, network: Any) -> T:
    """``task`` with another network."""
    return replace(task, network=network)
