"""Feature maps of an encoder, and their change while a network is trained.

Methods that change the statistics of feature maps find the places by resolution, so that they work with every
convolutional network of the catalog in two and three dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network


@lru_cache(maxsize=64)
def stages(network: Network) -> tuple[tuple[str, int], ...]:
    """Return the last encoder module of each resolution, by name and number of channels, in order.

    Raises:
        ConfigError: If the network has no feature maps, as transformers and networks for tables.
    """
    dims, found, tokens = len(network.inputs), dict[tuple[int, ...], tuple[str, int]](), list[str]()

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, given: Any) -> None:
            if isinstance(given, Tensor) and given.ndim == 3 and dims > 1:
                tokens.append(name)
            if isinstance(given, Tensor) and given.ndim == dims + 1 and dims > 1 and min(given.shape[2:]) > 1:
                found[tuple(given.shape[2:])] = name, given.shape[1]

        return note

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = network().eval()
        for name, module in model.named_modules():
            if name and network.in_encoder(f"{name}."):
                module.register_forward_hook(record(name))
        model(torch.zeros(2, *network.inputs))
    if not found or tokens:
        raise ConfigError("this network has no feature maps whose statistics could be changed: use a convolutional one")
    return tuple(found[size] for size in sorted(found, reverse=True))


def blocks(network: Network) -> tuple[str, ...]:
    """Return the places after the blocks of a residual network, ``layer1`` and so on; all stages of other networks."""
    names = [name for name, _ in stages(network)]
    first = [k for k, name in enumerate(names) if name.rpartition(".")[2] == "layer1"]
    return tuple(names[first[0] :] if first else names)


@contextmanager
def changed(model: nn.Module, names: Sequence[str], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of the modules ``names`` by ``change(name, output)`` within the context."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _, __, given: change(name, given)

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over space of each channel of [b, C, *spatial], both [b, C]."""
    flat = x.flatten(2)
    return flat.mean(2), (flat.var(2) + 1e-6).sqrt()


def standardized(x: Tensor, mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> Tensor:
    """Return ``(x − mean) / std · new_std + new_mean``, with [b, C] statistics of [b, C, *spatial]."""
    shape = (*mean.shape, *[1] * (x.ndim - 2))
    return (x - mean.view(shape)) / std.view(shape) * new_std.view(shape) + new_mean.view(shape)
