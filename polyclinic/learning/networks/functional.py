"""Evaluation of a model with other parameters, for methods that look ahead: sharpness, episodes, mixtures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import live_batch_norms


class _Computes(nn.Module):
    """Wraps a function of a model and a batch as a module, so that parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        """Apply the function to the model and the batch."""
        return self.function(self.model, batch)


def at(model: nn.Module, params: Tree, function: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
    """Evaluate ``function(model, batch)`` with ``params`` in ``model``; gradients propagate to ``params``.

    Leaves that are not in ``params`` are the model's own. A tensor that several modules share is replaced in each.
    """
    places = _places(model)
    replaced = {f"model.{place}": leaf for name, leaf in params.items() for place in places[name]}
    value: Tensor = functional_call(_Computes(model, function), replaced, (batch,), tie_weights=False)
    return value


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Return the names by which a tensor is replaced in every module that has it, for each of its names.

    A module that can be reached under several names, as in MONAI's DynUNet, counts once. ``tie_weights`` of PyTorch
    would replace its tensors once for each name, and then restore them to the first replacement.
    """
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, leaf in (*module.named_parameters(prefix, False), *module.named_buffers(prefix, False)):
            places.setdefault(id(leaf), []).append(name)
    names = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: places[id(leaf)] for name, leaf in names}


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Freeze running statistics within the context: batch normalization uses its batches without recording them."""
    layers: list[Any] = live_batch_norms(model)
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
