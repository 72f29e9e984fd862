"""Writes the table of network sizes, ``polyclinic/learning/networks/network_sizes.json``, and the picture of it.

    python tools/networks.py            writes both
    python tools/networks.py --draw     writes the picture from the table
    python tools/networks.py --check    fails if the table is not what it should be

Everything is measured on PyTorch's meta device, where tensors have no values: the number of parameters, and the bytes
that PyTorch keeps from a forward pass for the backward pass, for one example in float32.
"""

import argparse
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyclinic.learning.networks.architectures import ARCHITECTURES, Architecture
from polyclinic.learning.networks.network_catalog import Network

TABLE = Path(__file__).parents[1] / "polyclinic" / "learning" / "networks" / "network_sizes.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "networks.png"
OUTPUTS = 2


def example(architecture: Architecture, dims: int) -> tuple[int, ...]:
    """Return the shape of the example that a network is measured with."""
    if dims < 2:
        return (32,) if dims == 0 else (1000, 512)
    side = 96 if dims == 3 else 256 if architecture.purpose == "segmentation" else 224
    return (1,) + (side,) * dims


def kept_bytes(model: nn.Module, shape: tuple[int, ...], batch: int = 1) -> int:
    """Return the bytes that a forward pass in training keeps for the backward pass, without the parameters."""
    device = next(model.parameters()).device
    held: dict[int, Any] = {}
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model.train()(torch.zeros(batch, *shape, device=device))
    del found
    return sum(storage.nbytes() for key, storage in held.items() if key not in own)


def measured(name: str, dims: int) -> dict[str, Any]:
    """Return the size of one network with its default options."""
    shape = example(ARCHITECTURES[name], dims)
    network = Network(name, shape, OUTPUTS)
    model: nn.Module | None = None
    with torch.random.fork_rng(devices=[]), suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        model = network()
    model = network() if model is None else model
    batch = 2 if "cnn" not in name and ARCHITECTURES[name].purpose == "classification" else 1  # batch normalization
    return {
        "input": list(shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept_bytes": math.ceil(kept_bytes(model, shape, batch) / batch),
    }


def table() -> dict[str, Any]:
    """Return the sizes of all networks."""
    return {
        name: {str(dims): measured(name, dims) for dims in architecture.dims}
        for name, architecture in ARCHITECTURES.items()
    }


def draw(sizes: dict[str, Any]) -> None:
    """Draw the memory of training with one example: of the parameters, and of what is kept for the backward pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 8.5), layout="constrained")
    for ax, dims in zip(axes, ("2", "3"), strict=True):
        found = {name: one[dims] for name, one in sizes.items() if dims in one}
        order = sorted(found, key=lambda name: (ARCHITECTURES[name].purpose, -_total(found[name])))
        weights = [16 * found[name]["parameters"] / 2**30 for name in order]
        kept = [found[name]["kept_bytes"] / 2**30 for name in order]
        ax.barh(order, weights, color="#0072B2", label="parameters, gradients and Adam's moments")
        ax.barh(order, kept, left=weights, color="#E69F00", label="kept for the backward pass")
        for at, name in enumerate(order):
            text = f"{found[name]['parameters'] / 1e6:.3g} M"
            ax.annotate(text, (weights[at] + kept[at], at), xytext=(3, -3), textcoords="offset points", fontsize=7)
        shapes = {ARCHITECTURES[name].purpose: found[name]["input"][-1] for name in order}
        named = [f"{purpose} {side}" for purpose, side in shapes.items()]
        sides = ", ".join(map(str, set(shapes.values())) if len(set(shapes.values())) == 1 else named)
        ax.set(xlabel=f"GiB for one example (sides: {sides})", title=f"{dims}-D")
        ax.tick_params(axis="y", labelsize=8)
        ax.margins(x=0.12, y=0.01)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(PICTURE, dpi=100)


def _total(one: dict[str, Any]) -> int:
    return 16 * int(one["parameters"]) + int(one["kept_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--draw", action="store_true")
    if parser.parse_args().draw:
        draw(json.loads(TABLE.read_text()))
        return
    found = json.dumps(table(), indent=1) + "\n"
    if parser.parse_args().check:
        sys.exit(f"{TABLE} is out of date: run python tools/networks.py" if TABLE.read_text() != found else 0)
    TABLE.write_text(found)
    draw(json.loads(found))


if __name__ == "__main__":
    main()
