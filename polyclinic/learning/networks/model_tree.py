"""Models as trees: which tensors of a network are trained, which are statistics, and which are counters.

A network's state contains tensors that must not be averaged. DenseNet-121 has 121 integer counters; DynUNet lists
nearly every tensor twice; ``resnet18(norm="group")`` has 19 batch normalizations. ``inspect`` classifies all tensors;
other modules access a model's state only through ``params_of`` and ``load``, and its trained parameters only through
``trainable``.

Tensors that ``freeze`` marks are constants of the network: they are in no tree, so that they are neither trained, sent,
merged, clipped nor counted, and methods need no notion of freezing.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import Protocol

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.tree import Tree

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_FROZEN = "_frozen_leaves"

_cache = threading.local()


class BuildsModel(Protocol):
    """A hashable object that builds a model, such as a task."""

    def model(self) -> nn.Module: ...


@dataclass(frozen=True)
class Inspection:
    """Classification of a model's tensors, by name.

    Attributes:
        trainable: Parameters, which an optimizer changes. Frozen tensors are in none of these groups.
        statistics: Floating-point state that no optimizer changes, such as running means, and parameters that the
            network excludes by ``requires_grad = False``.
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
    parameters = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    constant = frozen(model)
    kinds: dict[str, list[str]] = {"trainable": [], "statistics": [], "counters": [], "aliases": []}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, leaf in model.state_dict().items():
        if name in constant:
            continue
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
    if batch := len(live_batch_norms(model)):
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


def first_names(model: nn.Module) -> dict[str, str]:
    """Return, for each name of a floating-point tensor, the one under which ``params_of`` lists the tensor."""
    leaves = _leaves(model)
    listed = {(leaf.data_ptr(), tuple(leaf.shape)): name for name, leaf in _floating(leaves).items()}
    return {
        name: listed[leaf.data_ptr(), tuple(leaf.shape)] if leaf.numel() else name
        for name, leaf in leaves
        if leaf.is_floating_point()
    }


def params_of(model: nn.Module, memory: Tree = MappingProxyType({})) -> Tree:
    """Copy the state that may be sent: each trainable tensor and statistic once, on the CPU.

    Args:
        memory: Tensors from ``take_gradients``, which are overwritten with the copies that fit them. Large tensors are
            written many times faster to memory that the process has used already.
    """
    copies: dict[str, Tensor] = {}
    for name, leaf in _floating(_leaves(model)).items():
        own = memory.get(name)
        copies[name] = leaf.detach().to("cpu", copy=True) if own is None else own.copy_(leaf.detach())
    return copies


def changes_of(model: nn.Module, memory: Tree, start: Tree) -> Tree:
    """Return ``params_of(model, memory) - start``, to the bit, without a copy of the parameters."""
    fitting = {name: own for name, own in memory.items() if name in start and start[name].dtype == own.dtype}
    with torch.no_grad():
        leaves = {name: leaf.to("cpu") for name, leaf in _floating(_leaves(model)).items()}
        return tree.sub(leaves, start, fitting)


def parameter_count(model: nn.Module) -> int:
    """Return the number of numbers in ``params_of(model)``."""
    return sum(leaf.numel() for leaf in _floating(_leaves(model)).values())


def load(model: nn.Module, params: Tree) -> nn.Module:
    """Copy ``params`` into ``model``, reset its counters to 0, and return it.

    Counters are integer tensors with one element. Larger ones, such as tables of indices, are constants of the network.

    Raises:
        ValueError: If the names or shapes differ from the model's.
    """
    leaves = _leaves(model)
    own = _floating(leaves)
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
        for _, leaf in leaves:
            if leaf.numel() == 1 and not leaf.is_floating_point():
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
    names, parameters = zip(*trainable(model).items(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, gradients, parameters, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for name, g, p in pairs}


def initial(build: Callable[[], nn.Module], seed: int) -> Tree:
    """Return the initial parameters of a model for ``seed``, independent of the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return params_of(build())


def freeze(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Make every floating-point tensor of ``model`` that ``chosen`` does not select a constant, and return the model.

    Parts without any selected tensor, and batch normalizations with frozen running statistics, stay in evaluation mode
    whatever calls ``train()``: their statistics do not move and their dropout has no effect. A tensor with several
    names is selected if one of its names is.
    """
    state = {name: leaf for name, leaf in model.state_dict(keep_vars=True).items() if leaf.is_floating_point()}
    kept = {id(leaf) for name, leaf in state.items() if chosen(name)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {n: state[name] for n in _own_names(module) if (name := f"{prefix}.{n}" if prefix else n) in state}
        fixed = frozenset(n for n, leaf in own.items() if id(leaf) not in kept)
        if fixed:
            setattr(module, _FROZEN, fixed)
            for n in fixed:
                own[n].requires_grad_(False)
    constant = frozen(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = {name for name in state if name.startswith(f"{prefix}.") or not prefix}
        wholly = bool(inside) and inside <= constant
        if wholly or (isinstance(module, BATCH_NORMS) and "running_mean" in getattr(module, _FROZEN, ())):
            module.eval()
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]  # pinned, also in copies
    return model


def frozen(model: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that ``freeze`` made constants of the network."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module.__dict__.get(_FROZEN, ())  # getattr takes five times as long for what a module lacks
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` that an optimizer may change, by name and in the model's order.

    Frozen ones are left out, and those that the network itself excludes by ``requires_grad = False``.
    """
    constant = frozen(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in constant}


def live_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch normalizations of ``model`` that normalize by their batches in training."""
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and not _pinned(m)]


def _pinned(module: nn.Module) -> bool:
    return isinstance(module.train, MethodType) and module.train.__func__ is _stay


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace ``train`` of a frozen part, which stays in evaluation mode."""
    return module


def _own_names(module: nn.Module) -> Iterator[str]:
    yield from module._parameters
    yield from module._buffers


def _leaves(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors of the model's state that are not frozen, by name and in the order of ``state_dict``.

    Modules that define their own state are asked for it; for all others this is many times faster than
    ``state_dict``, which every site calls several times a round.
    """
    leaves: list[tuple[str, Tensor]] = []
    if _append(leaves, model, ""):
        return leaves
    constant = frozen(model)
    return [(name, leaf) for name, leaf in model.state_dict(keep_vars=True).items() if name not in constant]


def _append(leaves: list[tuple[str, Tensor]], module: nn.Module, prefix: str) -> bool:
    """Append the tensors of ``module`` to ``leaves``; return False if it, or a module in it, defines its own state."""
    if _has_own_state(module):
        return False
    constant = module.__dict__.get(_FROZEN, ())
    for name, leaf in (*module._parameters.items(), *module._buffers.items()):
        if leaf is not None and name not in module._non_persistent_buffers_set and name not in constant:
            leaves.append((prefix + name, leaf))
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    return all(_append(leaves, child, f"{prefix}{name}.") for name, child in children)


def _has_own_state(module: nn.Module) -> bool:
    """Return whether a module, or a hook, changes what ``state_dict`` returns."""
    kind, hooks = type(module), module.__dict__
    own = kind.state_dict is not nn.Module.state_dict or kind._save_to_state_dict is not nn.Module._save_to_state_dict
    return own or bool(hooks["_state_dict_hooks"] or hooks["_state_dict_pre_hooks"])


def _floating(leaves: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the floating-point tensors among ``leaves``, each under its first name."""
    floating: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, leaf in leaves:
        place = (leaf.data_ptr(), tuple(leaf.shape))
        if leaf.is_floating_point() and not (leaf.numel() and place in seen):
            floating[name] = leaf
            seen.add(place)
    return floating
