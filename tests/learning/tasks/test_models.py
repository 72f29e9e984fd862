"""Models as trees: what may be averaged is found by kind, sent once, and loaded back to the bit."""

from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.learning.networks.architectures import ARCHITECTURES
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.networks.model_tree import inspect, load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import InHead, InNormalization, InRunningStatistics
from polyclinic.testing import equal

SMALL = {
    "mlp": ((6,), ()),
    "cnn": ((1, 16, 16), (("width", 4),)),
    "densenet121": ((1, 32, 32), ()),
    "resnet10": ((1, 32, 32), ()),
    "resnet18": ((3, 32, 32), ()),
    "efficientnet-b0": ((1, 32, 32), ()),
    "vit": (
        (1, 16, 16),
        (("hidden_size", 12), ("mlp_dim", 12), ("num_layers", 1), ("num_heads", 2), ("patch_size", 8)),
    ),
    "timm-vit": ((1, 16, 16), (("width", 12), ("heads", 2), ("depth", 1), ("patch_size", 8))),
    "attention-mil": ((5, 6), (("width", 4), ("attention", 3))),
    "unet": ((1, 32, 32), (("width", 4),)),
    "segresnet": ((1, 16, 16), (("init_filters", 8),)),
    "dynunet": ((1, 16, 16), (("levels", 3), ("filters", (4, 8, 8)))),
}


def test_the_table_is_covered() -> None:
    assert SMALL.keys() <= ARCHITECTURES.keys()  # of all networks: tests/learning/networks/test_networks.py


@pytest.mark.parametrize("name", SMALL)
def test_every_network_is_a_tree_and_back(name: str) -> None:
    shape, options = SMALL[name]
    network = Network(name, shape, 2, options)
    task = Classification(network)
    model, first = task.model(), task.first(3)
    assert equal(first, task.first(3))
    load(model, first)
    assert equal(params_of(model), first)
    found = inspect(model)
    named = {n for n, p in model.named_parameters()}
    assert named <= set(found.trainable) | set(found.aliases)
    assert set(first) == set(found.trainable) | set(found.statistics)
    storages = {leaf.data_ptr() for leaf in model.state_dict().values() if leaf.numel()}
    assert len(storages) == len([n for n in first if first[n].numel()]) + len(found.counters)
    head = [n for n in first if network.in_head(n)]
    assert 0 < len(head) < len(first)
    assert any(network.in_encoder(n) for n in first)
    assert not any(network.in_encoder(n) and network.in_head(n) for n in first)
    out = model.eval()(torch.zeros(2, *shape))
    out = out if isinstance(out, torch.Tensor) else out[0]
    assert out.shape[:2] == (2, 2)
    h, z = represent(task.network, model, torch.zeros(2, *shape))
    assert h.shape[0] == z.shape[0] == 2


def test_traps_of_known_networks_are_found() -> None:
    dense = inspect(Network("densenet121", (1, 32, 32), 2)())
    assert len(dense.counters) == 121
    assert sum("running_mean" in name for name in dense.running) == 121
    dyn = inspect(Network("dynunet", (1, 32, 32), 2)())
    assert len(dyn.aliases) > 20
    assert any("second name" in warning for warning in dyn.warnings)
    from monai.networks.nets import resnet18

    res = inspect(resnet18(spatial_dims=2, n_input_channels=1, num_classes=2, norm=("group", {"num_groups": 8})))
    assert any(warning.startswith("19 batch normalizations") for warning in res.warnings)


def test_normalization_is_found_by_type_not_by_name() -> None:
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn_but_a_convolution = nn.Conv2d(1, 2, 3)
            self.clean = nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.clean(self.bn_but_a_convolution(x)).mean((2, 3))

    network: Any = Misnamed
    task = Classification(network)
    inside = {name for name in task.first() if InNormalization(task)(name)}
    assert inside == {"clean.weight", "clean.bias", "clean.running_mean", "clean.running_var"}
    assert {n for n in inside if InRunningStatistics(task)(n)} == {"clean.running_mean", "clean.running_var"}


def test_a_wrong_tree_is_refused() -> None:
    task = Classification(Network("mlp", (3,), 2))
    first = task.first()
    with pytest.raises(ValueError, match=r"missing \['head.bias'\]"):
        load(task.model(), tree.select(first, lambda name: name != "head.bias"))
    with pytest.raises(ValueError, match="shape"):
        load(task.model(), {**first, "head.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match="downloaded"):
        Network("densenet121", (1, 32, 32), 2, (("pretrained", True),))()
    with pytest.raises(ValueError, match='no network is called "resnet"'):
        Network("resnet", (1, 32, 32), 2)()


def test_heads_are_heads() -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2))
    assert {name for name in task.first() if InHead(task)(name)} == {"head.weight", "head.bias"}
