"""Models as trees: which tensors of a network are trained, which are statistics, and which are counters.

A network's state contains tensors that must not be averaged. DenseNet-121 has 121 integer counters; DynUNet lists
nearly every tensor twice; ``resnet18(norm="group")`` has 19 batch normalizations. ``inspect`` classifies all tensors;
other modules access a model's state only through ``params_of`` and ``load``.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

_cache = threading.local()


class BuildsModel(Protocol):
    """A hashable object that builds a model, such as a task."""

    def model(self) -> nn.Module: ...


@dataclass(frozen=True)
class Inspection:
    """Classification of a model's tensors, by name.

    Attributes:
        trainable: Parameters, which an optimizer changes.
        statistics: Floating-point state that no optimizer changes, such as running means.
        counters: Integer state, which is never sent or averaged.
        aliases: Additional names of tensors that are listed under another name.
        normalization: The tensors of normalization layers, trainable or not, determined by module type.
        running: The running statistics of batch normalization.
        warnings: Warnings for the user, one sentence each.
    """

    trainable: tuple[str, ...]
    statistics: tuple[str, ...]
    counters: tuple[str, ...]
    aliases: tuple[str, ...]
    normalization: frozenset[str]
    running: frozenset[str]
    warnings: tuple[str, ...]


def inspect(model: nn.Module) -> Inspection:
    """Classify every tensor of ``model``'s state."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kinds: dict[str, list[str]] = {"trainable": [], "statistics": [], "counters": [], "aliases": []}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, leaf in model.state_dict().items():
        place = (leaf.data_ptr(), tuple(leaf.shape))
        if leaf.numel() and place in seen:
            kind = "aliases"
        elif not leaf.is_floating_point():
            kind = "counters"
        else:
            kind = "trainable" if name in parameters else "statistics"
        seen.add(place)
        kinds[kind].append(name)
    inside, running, warnings = set[str](), set[str](), list[str]()
    for prefix, module in model.named_modules():
        if isinstance(module, NORMALIZATIONS):
            inside |= {f"{prefix}.{name}" for name in module.state_dict()}
        if isinstance(module, BATCH_NORMS) and module.track_running_stats:
            running |= {f"{prefix}.running_mean", f"{prefix}.running_var"}
            if module.momentum is None:
                warnings.append(f"{prefix} averages its statistics by counting batches; counters are not sent")
    if batch := sum(isinstance(m, BATCH_NORMS) for m in model.modules()):
        warnings.append(
            f"{batch} batch normalizations: their statistics are averaged with the weights unless a method keeps "
            "them at the sites (fedbn, silobn), and differentially private training refuses them"
        )
    if kinds["aliases"]:
        warnings.append(f"{len(kinds['aliases'])} tensors have a second name; each is sent once")
    return Inspection(
        trainable=tuple(kinds["trainable"]),
        statistics=tuple(kinds["statistics"]),
        counters=tuple(kinds["counters"]),
        aliases=tuple(kinds["aliases"]),
        normalization=frozenset(inside),
        running=frozenset(running),
        warnings=tuple(warnings),
    )


def params_of(model: nn.Module) -> Tree:
    """Copy the state that may be sent: each trainable tensor and statistic once, on the CPU."""
    return {name: leaf.detach().to("cpu", copy=True) for name, leaf in _floating(model).items()}


def load(model: nn.Module, params: Tree) -> nn.Module:
    """Copy ``params`` into ``model``, reset its counters to 0, and return it.

    Raises:
        ValueError: If the names or shapes differ from the model's.
    """
    own = _floating(model)
    if own.keys() != params.keys():
        missing, extra = sorted(own.keys() - params.keys()), sorted(params.keys() - own.keys())
        raise ValueError(f"these are not this model's parameters: missing {missing[:3]}, unknown {extra[:3]}")
    with torch.no_grad():
        for name, leaf in own.items():
            if leaf.shape != params[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(params[name].shape)}, but the model's is {tuple(leaf.shape)}"
                )
            leaf.copy_(params[name])
        for leaf in model.state_dict().values():
            if not leaf.is_floating_point():
                leaf.zero_()
    return model


def cached_model(task: BuildsModel, params: Tree, device: str = "cpu", slot: str = "") -> nn.Module:
    """Return the thread's model for ``task`` with ``params`` loaded, in training mode.

    Models are built once and reused: the next call with the same task and ``slot`` changes the model that this call
    returned. Use a separate slot for each model of a task that is needed at the same time.
    """
    models: dict[tuple[BuildsModel, str, str], nn.Module] = _cache.__dict__.setdefault("models", {})
    if (key := (task, device, slot)) not in models:
        if len(models) >= 16:
            models.pop(next(iter(models)))
        models[key] = task.model().to(device)
    model = load(models[key], params).train()
    model.zero_grad(set_to_none=True)
    return model


def gradient(loss: Tensor, model: nn.Module) -> Tree:
    """Return ∂loss/∂w by name; 0 for parameters that do not affect the loss."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, gradients, parameters, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for name, g, p in pairs}


def initial(build: Callable[[], nn.Module], seed: int) -> Tree:
    """Return the initial parameters of a model for ``seed``, independent of the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return params_of(build())


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's floating-point tensors, each under its first name."""
    floating: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, leaf in model.state_dict().items():
        place = (leaf.data_ptr(), tuple(leaf.shape))
        if leaf.is_floating_point() and not (leaf.numel() and place in seen):
            floating[name] = leaf
            seen.add(place)
    return floating
