"""Recompute the running statistics of batch normalization from inputs alone.

Li, Wang, Shi, Hou and Liu, "Adaptive Batch Normalization for practical domain adaptation", Pattern Recognition 2018,
https://arxiv.org/abs/1603.04779; SiloBN (Andreux et al., 2020, https://arxiv.org/abs/2008.07424, section 2.2) does this
at a center that did not train.
"""

from typing import Any

import torch

from polyclinic.core.tree import Tree
from polyclinic.errors import DataError
from polyclinic.learning.networks.model_tree import BuildsModel, cached_model, live_batch_norms, params_of


def recomputed(task: BuildsModel, params: Tree, data: Any, device: str = "cpu", size: int = 64) -> Tree:
    """Return ``params`` with the running statistics of ``data``, averaged over batches in proportion to their sizes.

    Targets are not used. Without batch normalization, ``params`` are returned.

    Args:
        size: Examples in a batch, as in evaluation.

    Raises:
        DataError: If there is one example only and a layer has one value of each channel, without a variance.
    """
    model = cached_model(task, params, device, "recomputed")
    layers: list[Any] = [layer for layer in live_batch_norms(model) if layer.track_running_stats]
    if not layers:
        return params
    model.eval()
    for layer in layers:
        layer.train()
    usual, count = [layer.momentum for layer in layers], 0
    try:
        with torch.no_grad():
            for chunk in batches(len(data), size):
                count += len(chunk)
                for layer in layers:
                    layer.momentum = len(chunk) / count  # the first batch replaces what was there
                model(data[chunk][0].to(device))
    except ValueError as error:
        raise DataError(f"normalization cannot be recomputed from {len(data)} example: {error}") from error
    finally:
        for layer, momentum in zip(layers, usual, strict=True):
            layer.momentum = momentum
    return params_of(model)


def batches(count: int, size: int) -> list[torch.Tensor]:
    """Return the indices of batches of ``size`` in order; a single example at the end joins the batch before it."""
    chunks = list(torch.arange(count).split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks
