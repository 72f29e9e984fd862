"""Networks as values: a name from the table or a module of one's own, and the options that determine its shape."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from polyclinic.errors import ConfigError, PolyclinicError
from polyclinic.learning.networks.architectures import Architecture, architecture
from polyclinic.learning.networks.network_parts import Parts, find_parts, takes_outputs

CUSTOM = "custom"
"""Name of networks that are not in the table."""
_CUSTOM = Architecture("network_catalog:_custom", "classification", "a network from Python")


@dataclass(frozen=True)
class Network:
    """Specification of a network: its name and the options that determine its shape. Calling it builds the module.

    Attributes:
        name: One of ``ARCHITECTURES``, or of an installed package; of a module of one's own, ``CUSTOM`` (see ``of``).
        inputs: Shape of one input: (C, *spatial), or (F,) for tables.
        outputs: Number of predicted classes, labels or values.
        options: Further options of the architecture, as pairs such as ``(("width", 32),)``.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: int
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        build: Callable[..., nn.Module],
        inputs: tuple[int, ...],
        outputs: int,
        head: tuple[str, ...] | str = (),
        encoder: tuple[str, ...] | str = (),
    ) -> "Network":
        """Return the specification of a network of one's own, which every method and task can use.

        Args:
            build: Builds the module: a class or a function, called with ``outputs`` if it has such an argument, else
                without arguments. A module is copied, and every run then begins with its weights. To be sent to worker
                processes it must be picklable, unlike a lambda.
            inputs: Shape of one input: (C, *spatial), or (F,) for tables.
            outputs: Number of outputs: the module maps [b, *inputs] to [b, outputs, ...].
            head: Name prefixes of the tensors from the representation to the prediction, such as ``"fc."``. By default
                the tensors whose shape depends on ``outputs``, or the last layer.
            encoder: Name prefixes of the tensors before the representation. By default, of a network that predicts
                images, the modules up to the bottleneck; of others, all but the head.

        Raises:
            ConfigError: If the network does not map such inputs to such outputs, or has no head that can be found.
        """
        if isinstance(build, nn.Module):
            build = _Copied(build)
        names = {
            "head": (head,) if isinstance(head, str) else tuple(head),
            "encoder": (encoder,) if isinstance(encoder, str) else tuple(encoder),
        }
        network = cls(CUSTOM, tuple(inputs), outputs, (("build", build), *names.items()))
        network.parts  # noqa: B018 - finds the parts, and checks the network
        return network

    def __call__(self) -> nn.Module:
        """Build a module with random parameters.

        Raises:
            ConfigError: If the options or the shape of the inputs do not suit the network.
        """
        architecture, options = self.architecture, dict(self.options)
        try:
            module: nn.Module = architecture.build(self.inputs, self.outputs, **options)
        except PolyclinicError:
            raise
        except Exception as error:  # of PyTorch or MONAI, whatever an option or a shape leads to
            if self.name == CUSTOM:
                raise
            known = ", ".join(architecture.options) or "none"
            reason = f"for inputs of {' x '.join(map(str, self.inputs))}: {type(error).__name__}: {error}"
            raise ConfigError(f"the network {self.name} cannot be built {reason}; its options are {known}") from error
        return module

    @property
    def architecture(self) -> Architecture:
        """The entry in ``ARCHITECTURES``, or of an installed package."""
        return _CUSTOM if self.name == CUSTOM else architecture(self.name)

    @property
    def parts(self) -> Parts:
        """The names of head and encoder: those of the table, and by rule where it has none."""
        return _parts(Network(self.name, self.inputs, self.outputs, self.options))

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the head: the last layers, from representation to prediction."""
        return self.parts.in_head(name)

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the encoder: the layers before the representation or bottleneck."""
        return self.parts.in_encoder(name)


@dataclass(frozen=True)
class _Copied:
    """Builds copies of a module."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        return deepcopy(self.module)


def _custom(
    inputs: tuple[int, ...],
    outputs: int,
    build: Callable[..., nn.Module],
    head: tuple[str, ...] = (),
    encoder: tuple[str, ...] = (),
) -> nn.Module:
    return build(outputs=outputs) if takes_outputs(build) else build()


@lru_cache(maxsize=256)
def _parts(network: Network) -> Parts:
    architecture, options = network.architecture, dict(network.options)
    head, encoder = architecture.head, architecture.encoder
    other: Callable[[], nn.Module] | None = Network(network.name, network.inputs, network.outputs + 1, network.options)
    if network.name == CUSTOM:
        head, encoder = options["head"], options["encoder"]
        other = other if takes_outputs(options["build"]) else None
    elif head and (encoder or architecture.purpose != "segmentation"):
        return Parts(head, encoder)
    return find_parts(network, other, network.inputs, network.outputs, head, encoder)
