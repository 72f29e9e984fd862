"""The memory of gradients that are no longer needed, for values of the same parameters.

Large tensors are written many times faster to memory that the process has used already than to new pages.
"""

from collections import Counter

import torch
from torch import nn

from polyclinic.core.tree import Tree

LARGE = 2**16
"""Bytes from which on the memory of a gradient is used again; smaller tensors are allocated faster."""


def take_gradients(model: nn.Module) -> Tree:
    """Remove the gradients from ``model``, and return those whose memory can hold new values of their parameters.

    They are large, on the CPU, have the type and layout of the parameter, and share no memory with each other. The
    caller knows that no one else refers to them.
    """
    gradients = []
    for name, p in model.named_parameters():
        if (gradient := p.grad) is not None:
            p.grad = None
            if gradient.nbytes >= LARGE:
                gradients.append((name, p, gradient))
    places = Counter(g.untyped_storage().data_ptr() for _, _, g in gradients if g.layout == torch.strided)
    return {
        name: g
        for name, p, g in gradients
        if g.layout == torch.strided
        and g.device.type == p.device.type == "cpu"
        and not g.requires_grad
        and g.dtype == p.dtype
        and g.is_contiguous()
        and p.is_contiguous()
        and g.untyped_storage().nbytes() == g.nbytes
        and places[g.untyped_storage().data_ptr()] == 1
    }
