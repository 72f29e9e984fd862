"""Representations of inputs: one vector for each example, from the encoder or before the head."""

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.network_parts import Parts


def represent(network: Network, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the representation that enters the head of ``model``, which ``network`` built, and its prediction.

    Returns:
        h [b, features, ...] and z [b, outputs, ...], from one forward pass.
    """
    entering: list[Tensor] = []
    head = model.get_submodule(head_name(network, model))
    hook = head.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    try:
        prediction = model(inputs)
    finally:
        hook.remove()
    return entering[-1], prediction if isinstance(prediction, Tensor) else prediction[0]


class HasParts(Protocol):
    """A network, or one composed of it."""

    @property
    def parts(self) -> Parts: ...

    def in_head(self, name: str) -> bool: ...


def head_name(network: HasParts, model: nn.Module) -> str:
    """Return the name of the module of ``model`` that the representation enters.

    Args:
        network: The network, or one composed of it.
        model: The model, in which the network may have become a part, such as ``base``.
    """
    names: list[str] = [name for name, _ in model.named_modules() if name and network.in_head(f"{name}.")]
    entrance: str = network.parts.entrance
    return next((name for name in names if entrance and f".{name}".endswith(f".{entrance}")), names[0])


def pooled(h: Tensor) -> Tensor:
    """Average [b, F, *spatial] over space to [b, F]; [b, F] is unchanged."""
    return h.flatten(2).mean(2) if h.ndim > 2 else h


def features(network: Network, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the pooled input of the head: [b, F]."""
    return pooled(represent(network, model, inputs)[0])


def encoded(network: Network, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the pooled output of the encoder: [b, F]. For a U-Net this is the bottleneck; else the head's input."""
    if not network.parts.encoder:
        return features(network, model, inputs)
    return pooled(_leaving(network, model, inputs)[1])


def _leaving(network: Network, model: nn.Module, inputs: Tensor) -> tuple[str, Tensor]:
    """Return the name of the encoder's last module, and its output."""
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module) -> Any:
        def keep(_: nn.Module, __: Any, given: Any) -> None:
            if isinstance(given, Tensor) and given.ndim in (2, inputs.ndim):  # not a list, nor tokens
                outputs.append((name, given))

        return module.register_forward_hook(keep)

    hooks = [record(name, m) for name, m in model.named_modules() if name and network.in_encoder(f"{name}.")]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[-1]


def encode_all(
    network: Network, model: nn.Module, data: Any, device: str = "cpu", which: Tensor | None = None
) -> Tensor:
    """Return ``encoded`` for all examples, or those at ``which``, in evaluation mode without gradients: [n, F]."""
    model.eval()
    index = torch.arange(len(data)) if which is None else which
    with torch.no_grad():
        return torch.cat([encoded(network, model, data[chunk][0].to(device)).cpu() for chunk in index.split(64)])


@lru_cache(maxsize=64)
def head_width(network: Network) -> int:
    """Return F, the number of features that enter the head."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return features(network, network().eval(), torch.zeros(2, *network.inputs)).shape[1]


def encoded_width(network: Network) -> int:
    """Return F, the number of features of ``encoded``."""
    return _probe(network)[1] if network.parts.encoder else head_width(network)


def bottleneck(network: Network) -> str:
    """Return the name of the encoder's last module."""
    return _probe(network)[0]


@lru_cache(maxsize=64)
def _probe(network: Network) -> tuple[str, int]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        name, given = _leaving(network, network().eval(), torch.zeros(2, *network.inputs))
    return name, given.shape[1]
