"""Low-rank adapters (LoRA) parallel to the linear layers and convolutions of any network.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
section 4.1, https://arxiv.org/abs/2106.09685: ``h = W x + (α / r) B A x`` with W constant, A random and B = 0 at the
start, so that the adapted network begins as the given one. Departure: A is drawn from the uniform distribution of
``nn.Linear`` (Kaiming with a = √5), as in the authors' code. For a convolution A has its kernel and B is 1 x 1.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError

DOWN, UP = ".lora_down.weight", ".lora_up.weight"
"""The ends of the names of the factors A and B."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Types of layers that take adapters. Subclasses may compute something else and do not."""


@dataclass(frozen=True)
class LowRank:
    """Adapters of a network.

    Attributes:
        where: Patterns of the names of layers. By default all that take adapters, outside the head.
        rank: r, the rank of the change; less than the inputs and outputs of each layer.
        alpha: α; the change is scaled by α / r.
    """

    where: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0


class Adapted(nn.Module):
    """A layer and a low-rank change parallel to it: ``base(x) + (α / r) · B A x``."""

    base: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.base = base  # type: ignore[assignment]
        if isinstance(base, nn.Linear):
            down: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            up: nn.Module = nn.Linear(rank, base.out_features, bias=False)
        else:
            kind, conv = type(base), self.base
            assert isinstance(conv, nn.modules.conv._ConvNd)
            shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
            down = kind(conv.in_channels, rank, *shape, bias=False, padding_mode=conv.padding_mode)
            up = kind(rank, conv.out_channels, 1, bias=False)
        self.lora_down, self.lora_up = down, up
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        nn.init.zeros_(up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the low-rank change."""
        changed: Tensor = self.base(x) + self.scale * self.lora_up(self.lora_down(x))
        return changed

    def merged(self) -> nn.Module:
        """Add the change to the layer's weights, in place, and return the layer."""
        with torch.no_grad():
            down, up = self.lora_down.weight, self.lora_up.weight
            assert isinstance(down, Tensor)
            assert isinstance(up, Tensor)
            self.base.weight += self.scale * product(down, up)
        return self.base


def product(down: Tensor, up: Tensor) -> Tensor:
    """Return ``B A`` in the shape of the layer's weights, for A [r, in, *kernel] and B [out, r, 1, ...]."""
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def factorized(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors A and B of ``weight`` of rank ``rank``, by its singular value decomposition.

    Both factors get the square roots of the singular values.

    Args:
        weight: [out, in, *kernel].

    Returns:
        A [r, in, *kernel], B [out, r, 1, ...], and the norm of what was cut off.
    """
    u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = (root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)
    missing = rank - len(s[:rank])
    if missing > 0:
        down, up = nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))
    ones = [1] * (weight.ndim - 2)
    return down.reshape(rank, *weight.shape[1:]), up.reshape(len(weight), rank, *ones), float(s[rank:].norm())


def adapt(model: nn.Module, spec: LowRank, head: tuple[str, ...]) -> tuple[str, ...]:
    """Put adapters parallel to the layers of ``model`` that ``spec`` names, in place, and return their names.

    Args:
        spec: The adapters.
        head: Name prefixes of the head, which gets none unless ``spec.where`` names its layers.

    Raises:
        ConfigError: If a pattern names no layer, or a named layer cannot take adapters. The message lists every reason.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in modules.items() if isinstance(module, LAYERS)}
    refused = {name: reason for name in layers if (reason := _refusal(name, modules, spec.rank))}
    if spec.where:
        chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in spec.where)]
        problems = [
            f"where: {pattern!r} matches no linear layer and no convolution. There are {_some(list(layers))}"
            for pattern in spec.where
            if not any(fnmatchcase(name, pattern) for name in layers)
        ]
        problems += [f"{name} {refused[name]}" for name in chosen if name in refused]
        if problems:
            raise ConfigError("lora: " + "; ".join(problems))
    else:
        chosen = [name for name in layers if name not in refused and not f"{name}.".startswith(head)]
        if not chosen:
            why = "; ".join(f"{name} {reason}" for name, reason in list(refused.items())[:3])
            raise ConfigError(f"lora: no layer outside the head takes adapters of rank {spec.rank}: {why or 'none'}")
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapted(layers[name], spec.rank, spec.alpha))
    return tuple(chosen)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge all adapters of ``model`` into its layers, in place; return the model, a network as before ``adapt``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.merged())
    return model


def is_factor(name: str) -> bool:
    """Return whether a tensor is a factor of an adapter, by its name."""
    return name.endswith((DOWN, UP))


def factors(tree: Tree) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each adapter in ``tree``, by the name of its layer."""
    layers = [name.removesuffix(DOWN) for name in tree if name.endswith(DOWN) and name.removesuffix(DOWN) + UP in tree]
    return {layer: (tree[layer + DOWN], tree[layer + UP]) for layer in layers}


def _refusal(name: str, modules: dict[str, nn.Module], rank: int) -> str:
    """Return why a layer cannot take adapters; empty if it can."""
    layer = modules[name]
    parts = name.split(".")
    above = [modules.get(".".join(parts[:i])) for i in range(len(parts))]
    if any(isinstance(module, nn.MultiheadAttention) for module in above):
        return "is inside nn.MultiheadAttention, which reads its weights and does not call it"
    if type(layer) not in LAYERS:
        return f"is a {type(layer).__name__}, which may not compute what its base class does"
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups != 1:
        return "is a grouped convolution"
    if sum(module is layer for module in modules.values()) > 1:
        return "is used under two names"
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if sum(getattr(module, "weight", None) is weight for module in modules.values()) > 1:
        return "shares its weights with another layer"
    if rank >= min(weight.shape[0], weight[0].numel()):
        return f"has {weight.shape[0]} outputs of {weight[0].numel()} numbers each, too few for rank {rank}"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
