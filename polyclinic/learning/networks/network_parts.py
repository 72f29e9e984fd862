"""Parts of a network, found by rule: its head, and the encoder of a network that predicts images.

The head consists of the tensors whose shape depends on the number of outputs. The encoder consists of the modules that
run up to the last one with the smallest number of spatial positions, other than the head: of a U-Net, the part up to
and including the bottleneck. Both need one or two models and one prediction, on PyTorch's meta device if possible,
where tensors have shapes but no values.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import NORMALIZATIONS


@dataclass(frozen=True)
class Parts:
    """Parts of a network, as prefixes of the names of tensors; ``fc.`` is the module ``fc`` with all that it contains.

    Attributes:
        head: From the representation to the prediction.
        encoder: Before the representation; all but the head if empty.
        entrance: The module of the head that the representation enters; the head's first if empty.
    """

    head: tuple[str, ...]
    encoder: tuple[str, ...] = ()
    entrance: str = ""

    def in_head(self, name: str) -> bool:
        """Return whether the tensor ``name``, or a module with a dot after its name, belongs to the head."""
        return _among(self.head, name)

    def in_encoder(self, name: str) -> bool:
        """Return whether the tensor ``name``, or a module with a dot after its name, belongs to the encoder."""
        return _among(self.encoder, name) if self.encoder else not self.in_head(name)


def _among(names: tuple[str, ...], name: str) -> bool:
    return name.startswith(names)


@dataclass(frozen=True)
class Called:
    """A module as it ran in one prediction.

    Attributes:
        name: Its name.
        leaf: Whether it has no children.
        parametric: Whether it has parameters of its own or in its children.
        module: The module.
        given: The tensor that it received.
        found: The tensor that it returned.
    """

    name: str
    leaf: bool
    parametric: bool
    module: nn.Module
    given: Tensor | None
    found: Tensor | None


def find_parts(
    build: Callable[[], nn.Module],
    other: Callable[[], nn.Module] | None,
    inputs: tuple[int, ...],
    outputs: int,
    head: tuple[str, ...] = (),
    encoder: tuple[str, ...] = (),
) -> Parts:
    """Return the parts of the network that ``build`` builds.

    Args:
        build: Builds a model.
        other: Builds the model with one output more, if that is possible.
        inputs: Shape of one input.
        outputs: Number of outputs.
        head: Names that are known; found by rule if empty.
        encoder: The same.

    Raises:
        ConfigError: If the network does not predict [b, outputs, ...], or the head cannot be found.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), shapes(build) as model:
        calls, prediction = trace(model, inputs)
        if prediction.ndim < 2 or prediction.shape[1] != outputs:
            raise ConfigError(
                f"the network maps inputs of shape {inputs} to {tuple(prediction.shape[1:])} for each example, where "
                f"{outputs} outputs come first"
            )
        known = _tensors(model)
        for part, names in (("head", head), ("encoder", encoder)):
            if lost := [n for n in names if not any(_among((n,), name) for name in known)]:
                raise ConfigError(f"{part}: no tensor of the network is named {lost[0]}...; names are {known[:3]}, ...")
        if not head:
            changed = set[str]()
            if other is not None:
                with shapes(other) as larger:
                    changed = _changed(model, larger)
                changed |= _between(calls, changed, outputs)
            changed = changed or _last(calls, outputs)  # none changes if the number of outputs is fixed
            if not changed:
                raise ConfigError("the head cannot be found by its shape: name its tensors, such as head = ('fc.',)")
            head = _lifted(model, changed)
        entrance = _entrance(calls, head)
        if not encoder and len(inputs) > 2 and prediction.ndim == len(inputs) + 1:
            encoder = _encoder(model, calls, head, len(inputs) - 1, prediction)
    return Parts(head, encoder, entrance)


@contextmanager
def shapes(build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Provide a model on the meta device, or on the CPU if it needs values when it is built; in evaluation mode."""
    try:
        with torch.device("meta"):
            model = build().eval()
    except (RuntimeError, TypeError, ConfigError):  # values are needed, as by Tensor.item
        model = build().eval()
    yield model


def trace(model: nn.Module, inputs: tuple[int, ...]) -> tuple[list[Called], Tensor]:
    """Return the modules in the order in which they end, and a prediction for two inputs of 0."""
    calls: list[Called] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], found: Any) -> None:
            entering = next((item for item in given if isinstance(item, Tensor)), None)
            leaf, parametric = not any(True for _ in module.children()), any(True for _ in module.parameters())
            calls.append(Called(name, leaf, parametric, module, entering, found if isinstance(found, Tensor) else None))

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        found = model(torch.zeros(2, *inputs, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    prediction = found if isinstance(found, Tensor) else found[0]
    if not isinstance(prediction, Tensor):
        raise ConfigError(f"the network returns {type(prediction).__name__}, not a tensor or a list of tensors")
    return calls, prediction


def _tensors(model: nn.Module) -> list[str]:
    """Return the names of all tensors but counters, each once."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [name for name, leaf in named if leaf.is_floating_point()]


def _changed(model: nn.Module, larger: nn.Module) -> set[str]:
    """Return the tensors of ``model`` that ``larger`` has with another shape, or does not have."""
    new = {name: leaf.shape for name, leaf in (*larger.named_parameters(), *larger.named_buffers())}
    old = {name: leaf.shape for name, leaf in (*model.named_parameters(), *model.named_buffers())}
    return {name for name, shape in old.items() if new.get(name) != shape}


def _between(calls: list[Called], changed: set[str], outputs: int) -> set[str]:
    """Return the tensors of modules that run between two modules of the head and have ``outputs`` channels."""
    ran, found, waiting = [c for c in calls if c.leaf and c.parametric], set[str](), list[str]()
    inside = False
    for call in ran:
        own = {f"{call.name}.{name}" for name in call.module.state_dict()}
        if own & changed:
            found |= set(waiting)
            waiting, inside = [], True
        elif inside and call.found is not None and call.found.ndim > 1 and call.found.shape[1] == outputs:
            waiting += own
        else:
            waiting, inside = [], False
    return found


def _last(calls: list[Called], outputs: int) -> set[str]:
    """Return the tensors of the last module that ran, if it makes the outputs, with normalizations after it."""
    changed = set[str]()
    for call in reversed([c for c in calls if c.leaf and c.parametric]):
        if call.found is None or call.found.ndim < 2 or outputs not in (call.found.shape[1], call.found.shape[-1]):
            break
        changed |= {f"{call.name}.{name}" for name in call.module.state_dict()}
        if not isinstance(call.module, NORMALIZATIONS):
            return changed
    return set()


def _lifted(model: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """Return ``chosen`` tensors as the largest modules that contain no others, and the rest by name."""
    names, lifted = _tensors(model), list[str]()
    for place, _ in model.named_modules():
        inside = [name for name in names if name.startswith(f"{place}.")]
        if place and inside and all(name in chosen for name in inside) and not _among(tuple(lifted), f"{place}."):
            lifted.append(f"{place}.")
    single = tuple(name for name in names if name in chosen and not _among(tuple(lifted), name))
    if mixed := [name for name in names if name not in chosen and _among(single, name)]:
        raise ConfigError(f"the names of the network do not distinguish its parts: {mixed[0]} begins as another tensor")
    return (*lifted, *single)


def _entrance(calls: list[Called], head: tuple[str, ...]) -> str:
    """Return the module of the head that the representation enters: where the head's last run of modules begins."""
    leaves = [call for call in calls if call.leaf]
    inside = [call for call in leaves if _among(head, f"{call.name}.")]
    if not inside:
        return ""
    makers = {id(call.found): call for call in leaves if call.found is not None}
    first = at = inside[-1]
    while (before := makers.get(id(at.given))) is not None and before is not at:
        if before.parametric and not _among(head, f"{before.name}."):
            break
        at = before
        first = at if _among(head, f"{at.name}.") else first
    around = [c.name for c in calls if f"{first.name}.".startswith(f"{c.name}.") and _among(head, f"{c.name}.")]
    return min(around, key=len)


def _encoder(
    model: nn.Module, calls: list[Called], head: tuple[str, ...], dims: int, prediction: Tensor
) -> tuple[str, ...]:
    """Return the modules up to the last one with the fewest positions; none if no module reduces them."""
    ran = [c for c in calls if c.leaf and c.parametric and not _among(head, f"{c.name}.")]
    sizes = [_positions(call.found, dims) for call in ran]
    known = [size for size in sizes if size is not None]
    if not known or min(known) >= prediction[0, 0].numel():
        return ()
    last = max(i for i, size in enumerate(sizes) if size == min(known))
    inside = {call.name for call in ran[: last + 1]}
    chosen = set[str]()
    for place, module in model.named_modules():
        own = [name for name, _ in (*module.named_parameters(place, False), *module.named_buffers(place, False))]
        leaf = not any(True for _ in module.children())
        begins = leaf and place in inside
        begins |= not leaf and (not place or any(name.startswith(f"{place}.") for name in inside))
        chosen |= {name for name in own if begins and not _among(head, name)}
    return _lifted(model, chosen)


def _positions(found: Tensor | None, dims: int) -> int | None:
    """Return the number of positions of features [b, C, *spatial] or [b, tokens, C]; None of anything else."""
    if found is None:
        return None
    if found.ndim == dims + 2:
        return found[0, 0].numel()
    return found.shape[1] if found.ndim == 3 else None


def takes_outputs(build: Callable[..., nn.Module]) -> bool:
    """Return whether ``build`` has an argument ``outputs``."""
    try:
        return "outputs" in inspect.signature(build).parameters
    except (TypeError, ValueError):
        return False
