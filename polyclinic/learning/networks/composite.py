"""Networks composed of other networks, for use in a task like any other network."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from polyclinic.learning.networks.architectures import Architecture
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.network_parts import Parts


@dataclass(frozen=True)
class Composed:
    """A composition with the inputs and outputs of ``network``. Calling it builds the module."""

    network: Network

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return self.network()

    @property
    def name(self) -> str:
        """The network's name."""
        return self.network.name

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """The network's options."""
        return self.network.options

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of the network's inputs."""
        return self.network.inputs

    @property
    def outputs(self) -> int:
        """The number of the network's outputs."""
        return self.network.outputs

    @property
    def architecture(self) -> Architecture:
        """The network's architecture."""
        return self.network.architecture

    @property
    def parts(self) -> Parts:
        """The names of the network's head and encoder."""
        return self.network.parts

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's head."""
        return self.network.in_head(name)

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's encoder."""
        return self.network.in_encoder(name)
