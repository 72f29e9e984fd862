"""Start weights for tests: a store of its own, and weights of small networks in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights import conversion, importer, store
from polyclinic.learning.weights.matching import StartWeights


def stored(leaves: Mapping[str, Tensor], name: str = "given") -> StartWeights:
    """Add tensors to the store that the environment names."""
    from safetensors.torch import save_file

    store.root().mkdir(parents=True, exist_ok=True)
    file = Path(store.root()) / "new.safetensors"
    save_file({key: leaf.clone() for key, leaf in leaves.items()}, file)
    return StartWeights(store.add(file, store.Card(name, "MIT")).sha256)


def weights_of(network: Network, name: str = "given", seed: int = 5) -> StartWeights:
    """Add weights of ``network`` to the store. Running statistics are not 0 and 1, as after training."""
    return stored(random_state(network, seed), name)


def random_state(network: Network, seed: int = 5) -> dict[str, Tensor]:
    """The floating-point tensors of a network, with random running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {key: leaf.clone() for key, leaf in network().state_dict().items() if leaf.is_floating_point()}
        for key, leaf in state.items():
            if key.endswith("running_mean"):
                leaf.normal_()
            if key.endswith("running_var"):
                leaf.uniform_(0.5, 2)
    return state


def convert_here(patch: pytest.MonkeyPatch) -> None:
    """Convert weights in this process, which spares the start of another one, for tests of what comes before and after."""

    def converted(source: Path, target: Path, key: str) -> dict[str, Any]:
        try:
            return conversion.convert(source, target, key)
        except conversion.Refused as refusal:
            raise importer.NotImported(f"{source}: {refusal}") from None

    patch.setattr(importer, "_converted", converted)
