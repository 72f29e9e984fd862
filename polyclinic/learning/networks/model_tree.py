"""Models as trees: which of a network's tensors are learned, which are statistics, which are counters.

Networks hold more than what may be averaged. DenseNet-121 has 121 integer counters; DynUNet lists nearly every
tensor twice; ``resnet18(norm="group")`` keeps 19 batch normalizations. ``inspect`` finds such things and says so,
and everything else in Polyclinic sees a model only through ``params_of`` and ``load``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found in a model, by tensor name.

    Attributes:
        trainable: What an optimizer changes.
        statistics: Floating-point state that no optimizer changes, such as running means.
        counters: Integer state, which is never sent or averaged.
        aliases: Second names of tensors that have another name already.
        normalization: The tensors, trainable or not, of normalization layers, found by module type.
        running: Those that are running statistics of batch normalization.
        warnings: What a person should know, in sentences.
    """

    trainable: tuple[str, ...]
    statistics: tuple[str, ...]
    counters: tuple[str, ...]
    aliases: tuple[str, ...]
    normalization: frozenset[str]
    running: frozenset[str]
    warnings: tuple[str, ...]


def inspect(model: nn.Module) -> Inspection:
    """Classifies every tensor of ``model``'s state."""
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
                warnings.append(f"{prefix} averages its statistics by counting batches; counters stay at the site")
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
    """A copy of what may be sent: each trainable tensor and statistic, once, on the CPU."""
    return {name: leaf.detach().to("cpu", copy=True) for name, leaf in _floating(model).items()}


def load(model: nn.Module, params: Tree) -> nn.Module:
    """``model`` itself, now carrying ``params``; its counters start at 0.

    Raises:
        ValueError: Where names or shapes are not the model's.
    """
    own = _floating(model)
    if own.keys() != params.keys():
        missing, extra = sorted(own.keys() - params.keys()), sorted(params.keys() - own.keys())
        raise ValueError(f"these are not this model's parameters: missing {missing[:3]}, unknown {extra[:3]}")
    with torch.no_grad():
        for name, leaf in own.items():
            if leaf.shape != params[name].shape:
                raise ValueError(f"{name} has the shape {tuple(params[name].shape)}, the model's {tuple(leaf.shape)}")
            leaf.copy_(params[name])
        for leaf in model.state_dict().values():
            if not leaf.is_floating_point():
                leaf.zero_()
    return model


def gradient(loss: Tensor, model: nn.Module) -> Tree:
    """∂loss/∂w by name, and 0 for parameters that the loss does not touch."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, found, parameters, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for name, g, p in pairs}


def initial(build: Callable[[], nn.Module], seed: int) -> Tree:
    """The parameters of a freshly built model, the same for the same ``seed`` and whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return params_of(build())


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """The model's own floating-point tensors, each under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, leaf in model.state_dict().items():
        place = (leaf.data_ptr(), tuple(leaf.shape))
        if leaf.is_floating_point() and not (leaf.numel() and place in seen):
            found[name] = leaf
            seen.add(place)
    return found
