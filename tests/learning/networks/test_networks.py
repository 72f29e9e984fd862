"""Every network of the table, and any other module: parts are found by rule, and every personalized method trains."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks import latent, model_tree
from polyclinic.learning.networks.architectures import ARCHITECTURES
from polyclinic.learning.networks.model_tree import initial, inspect, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.network_parts import find_parts
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import FAMILIES, METHODS
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_method
from tests.conftest import Rows

VIT = (("hidden_size", 12), ("mlp_dim", 24), ("num_heads", 2))
SMALL: dict[str, tuple[tuple[tuple[str, Any], ...], int]] = {
    "mlp": ((), 6),
    "cnn": ((("width", 4), ("depth", 2)), 8),
    "attention-mil": ((("width", 4), ("attention", 3)), 5),
    "vit": ((*VIT, ("num_layers", 2), ("patch_size", 4)), 8),
    "timm-vit": ((("width", 12), ("heads", 2), ("depth", 2), ("patch_size", 4)), 8),
    "nnunet": ((("width", 4),), 16),
    "resenc": ((("width", 4),), 16),
    "unet": ((("width", 4),), 32),
    "unet++": ((("width", 4),), 32),
    "residual-unet": ((("width", 4), ("levels", 3)), 16),
    "dynunet": ((("levels", 3), ("filters", (4, 8, 8))), 16),
    "attention-unet": ((("width", 4), ("levels", 3)), 16),
    "segresnet": ((("init_filters", 8),), 16),
    "segresnet-ds": ((("init_filters", 8),), 16),
    "mednext": (
        (("init_filters", 4), ("blocks_down", (1,) * 4), ("blocks_up", (1,) * 4), ("blocks_bottleneck", 1)),
        32,
    ),
    "highresnet": ((), 16),
    "flexible-unet": ((), 64),
    "unetr": ((*VIT, ("feature_size", 4)), 32),
    "swin-unetr": ((("feature_size", 12),), 64),
}
"""Small options, and the side of an image; other networks take the default options and 32 pixels."""


LARGE = (
    {"densenet169", "densenet201", "densenet264", "senet154", "seresnext50"}
    | {f"resnet{n}" for n in (34, 50, 101, 152, 200)}
    | {f"efficientnet-b{n}" for n in (1, 2, 3, 4)}
)
"""Networks whose smaller siblings are tested each time; these are tested with the slow tests."""
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in ARCHITECTURES]


def small(name: str, dims: int = 2, outputs: int = 3) -> Network:
    """The network at a small size."""
    options, side = SMALL.get(name, ((), 32))
    if name == "attention-mil":
        return Network(name, (side, 6), outputs, options)
    return Network(name, (side,) if name == "mlp" else (1,) + (side,) * dims, outputs, options)


def examples(network: Network, seed: int, n: int = 4) -> Rows:
    """Random inputs and targets for it."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *network.inputs, generator=rng)
    if ARCHITECTURES[network.name].purpose == "segmentation":
        return Rows(x, (x[:, 0] > 0.5).long())
    return Rows(x, torch.arange(n) % network.outputs)


def task_of(network: Network) -> Task:
    kind: Any = Segmentation if ARCHITECTURES[network.name].purpose == "segmentation" else Classification
    found: Task = kind(network)
    return found


@pytest.mark.parametrize("name", EACH)
def test_parts_are_found_and_features_have_the_width_they_say(name: str) -> None:
    network = small(name)
    names = list(task_of(network).first())
    head, encoder = ([n for n in names if inside(n)] for inside in (network.in_head, network.in_encoder))
    assert 0 < len(head) < len(names)
    assert encoder
    assert not set(head) & set(encoder)
    model, x = network().eval(), torch.randn(2, *network.inputs)
    with torch.no_grad():
        h, z = latent.represent(network, model, x)
        e = latent.encoded(network, model, x)
    spatial = network.inputs[1:] if ARCHITECTURES[name].purpose == "segmentation" else ()
    assert z.shape == (2, 3, *spatial)
    assert h.shape[1] == latent.head_width(network)
    assert e.shape == (2, latent.encoded_width(network))
    assert not any(name in inspect(model).aliases for name in head)


HEADS = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name, a in ARCHITECTURES.items() if a.head
]


@pytest.mark.parametrize("name", HEADS)
def test_the_rule_finds_what_the_table_says(name: str) -> None:
    network = small(name)
    found = find_parts(network, small(name, outputs=4), network.inputs, 3)
    names = [n for n, _ in (*network().named_parameters(),)]
    by_rule, in_table = ({n for n in names if one.in_head(n)} for one in (found, network))
    assert by_rule <= in_table
    assert by_rule == in_table or name == "segresnet"  # whose table includes the normalization before the last layer
    if name in ("unet", "dynunet", "cnn", "resnet18"):
        assert [n for n in names if found.in_encoder(n)] == [n for n in names if network.in_encoder(n)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.dims == (2, 3) and a.purpose != "tables"])
def test_volumes(name: str) -> None:
    if name in ("swin-unetr", "senet154", "densenet264", "flexible-unet"):
        pytest.skip("measured in tools/networks.py only, for its time")
    network = small(name, dims=3)
    model = network().eval()
    assert [n for n, _ in model.named_parameters() if network.in_head(n)]
    with torch.no_grad():
        found = model(torch.randn(1, *network.inputs))
    assert found.shape == (1, 3, *(network.inputs[1:] if ARCHITECTURES[name].purpose == "segmentation" else ()))


OLD = {
    "mlp": ((6,), (), "068cf1c5e2cb6451"),
    "cnn": ((1, 16, 16), (), "0a4afc1d85bb6f1f"),
    "densenet121": ((1, 32, 32), (), "a7360d85fea9d1e5"),
    "resnet10": ((1, 32, 32), (), "f396114ec6f8cfcd"),
    "resnet18": ((1, 32, 32), (), "66510295d93a4442"),
    "efficientnet-b0": ((3, 32, 32), (), "db0cd8a96459ed89"),
    "vit": ((1, 16, 16), (*VIT, ("num_layers", 2), ("patch_size", 8)), "2cbef2a5839c8129"),
    "attention-mil": ((6, 5), (), "53856cc7a5a014f7"),
    "unet": ((1, 32, 32), (("norm", "group"),), "b313f07f359b69a0"),
    "segresnet": ((1, 16, 16, 16), (), "ca98ca0d811fc4af"),
    "dynunet": ((1, 32, 32), (), "ed079a3a2ba0c281"),
}
"""Networks of the first version: shape of an input, options, and hash of the initial tensors and their names."""


@pytest.mark.parametrize("name", OLD)
def test_networks_keep_their_tensors_and_bits(name: str) -> None:
    shape, options, expected = OLD[name]
    total = hashlib.sha256()
    for key, leaf in initial(Network(name, shape, 3, options), 7).items():
        total.update(key.encode())
        total.update(leaf.numpy().tobytes())
    assert total.hexdigest()[:16] == expected


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if "deep_supervision" in a.options])
def test_deep_supervision_gives_a_list_at_native_sizes_finest_first(name: str) -> None:
    plain = small(name)
    network = Network(name, plain.inputs, 3, (*plain.options, ("deep_supervision", True)))
    model, x = network(), torch.randn(2, *network.inputs)
    found = model.train()(x)
    assert isinstance(found, list)
    assert len(found) >= 2
    sides = [f.shape[-1] for f in found]
    assert sides == [network.inputs[-1] // 2**i for i in range(len(found))]
    assert all(f.shape[:2] == (2, 3) for f in found)
    sum(f.square().mean() for f in found).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (2, 3, *network.inputs[1:])
    assert network.parts.entrance or ARCHITECTURES[name].head


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-b0", "seresnet50", "densenet121", "vnet", "highresnet"])
def test_batch_normalization_can_be_replaced(name: str) -> None:
    network = small(name)
    for norm in ("group", "instance"):
        model = Network(name, network.inputs, 3, (("norm", norm),))()
        left = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert not left, left[:3]
    assert any("running_mean" in n for n in network().state_dict())


# Plain modules --------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A classifier from outside the catalog."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, stride=2)
        self.z = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs), nn.BatchNorm1d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.z(self.b(self.a(x) + self.token).relu().mean((2, 3)))
        return found


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))


def test_any_module_is_a_network() -> None:
    network = Network.of(Own, (1, 8, 8), 2)
    assert network == Network.of(Own, (1, 8, 8), 2)
    names = list(Classification(network).first())
    assert {n for n in names if network.in_head(n)} == {
        "z.2.weight",
        "z.2.bias",
        "z.3.weight",
        "z.3.bias",
        "z.3.running_mean",
        "z.3.running_var",
    }
    assert network.parts.entrance == "z.2"
    assert latent.head_width(network) == 5
    plainly = Network.of(plain, (1, 8, 8), 2)
    assert plainly.parts.head == ("3.",)
    assert Network.of(plain, (1, 8, 8), 2, head="1.").parts.head == ("1.",)
    instance = plain()
    copied = Network.of(instance, (1, 8, 8), 2)
    first = Classification(copied).first(5)
    assert all(torch.equal(leaf, instance.state_dict()[name]) for name, leaf in first.items())
    assert copied().get_parameter("1.weight") is not instance.get_parameter("1.weight")


@pytest.mark.parametrize("width", [3, 4, 6, 12, 16])
@pytest.mark.parametrize("name", ["cnn", "unet"])
def test_groups_divide_any_width(name: str, width: int) -> None:
    model = Network(name, (1, 32, 32), 2, (("width", width), ("norm", "group")))()
    groups = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert groups[0].num_groups == {3: 3, 4: 4, 6: 6, 12: 6, 16: 8}[width]


def test_a_module_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"to \(2,\) for each example, where 3 outputs come first"):
        Network.of(plain, (1, 8, 8), 3)
    with pytest.raises(ConfigError, match=r"head: no tensor of the network is named fc"):
        Network.of(plain, (1, 8, 8), 2, head="fc.")

    def sums() -> nn.Module:
        class Sums(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.flatten(1).mean(1, keepdim=True) * self.scale

        return Sums()

    with pytest.raises(ConfigError, match="the head cannot be found"):
        Network.of(sums, (1, 8, 8), 2)
    with pytest.raises(ConfigError, match="its options are width, depth, norm, dropout"):
        Network("cnn", (1, 8, 8), 2, (("wide", 3),))()
    with pytest.raises(ConfigError, match="use 24 x 24, or give kernels"):
        Network("nnunet", (1, 23, 24), 2)()


# Personalized methods --------------------------------------------------------------------------------------------------

PERSONAL = [entry.name for entry in FAMILIES["Client end: domain-specific learning"]]
FEATURES = ["fedmoco", "fedharmony", "fed-align", "private-heads", "fmtl"]
SAMPLE = {("nnunet", "fedper"), ("attention-mil", "fedsm")}
KNOWN = {"iop-fl": {"passes": 1}, "lc-fed": {"head_steps": 2}}


def pairs() -> list[Any]:
    """All pairs of a network and a method that supports its kind of task; all but a sample are slow."""
    found = []
    for network, architecture in ARCHITECTURES.items():
        kind = "segmentation" if architecture.purpose == "segmentation" else "classification"
        for method in (*PERSONAL, *FEATURES):
            if not METHODS[method].tasks or kind in METHODS[method].tasks:
                marks = () if (network, method) in SAMPLE else (pytest.mark.slow,)
                found.append(pytest.param(network, method, marks=marks, id=f"{network}-{method}"))
    return found


@pytest.mark.parametrize(("name", "method"), pairs())
def test_personalized_methods_train_every_network(name: str, method: str) -> None:
    network = small(name)
    task = task_of(network)
    roles = ("train", "val", "test", "unlabeled", "public")
    sites = {
        f"site-{k}": Site(f"site-{k}", {r: examples(network, 10 * k + i, 4) for i, r in enumerate(roles)})
        for k in range(2)
    }
    # With four images a batch, deep networks overflow at usual rates, and replies that are not finite have no order.
    setting = Setting(task, LocalTraining(epochs=1, batch_size=4, lr=0.0001), tuple(sites), rounds=3)
    try:
        built = build(method, setting, KNOWN.get(method, {}))
    except ConfigError as refusal:
        pytest.skip(f"refused before the first round: {refusal}")
    check_method(built, task.first(0), sites, server=Site("server", {"public": sites["site-0"].data["public"]}))


# The table of sizes ----------------------------------------------------------------------------------------------------


def _tool() -> Any:
    path = Path(__file__).parents[3] / "tools" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks_tool", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("cnn", "resnet18", "unet", "nnunet", "vit") else pytest.param(n, marks=pytest.mark.slow)
        for n in ARCHITECTURES
    ],
)
def test_the_table_of_sizes_is_what_is_measured(name: str) -> None:
    tool = _tool()
    known = json.loads(tool.TABLE.read_text())
    assert known.keys() == ARCHITECTURES.keys()
    assert known[name] == {str(dims): tool.measured(name, dims) for dims in ARCHITECTURES[name].dims}


def test_kept_memory_is_that_of_real_tensors() -> None:
    """The meta device counts what the CPU keeps: the inputs of convolutions, and of a ReLU its output."""
    tool = _tool()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    expected = 4 * (1 * 64 + 4 * 64)  # the input, and the ReLU's output, which the second convolution shares
    assert tool.kept_bytes(model, (1, 8, 8)) == expected
    assert tool.kept_bytes(model.to("meta"), (1, 8, 8)) == expected


def test_listing_imports_no_torch() -> None:
    code = "import sys; from polyclinic.cli import catalog; catalog.networks(json_=True); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["unet"]["sizes"]["2"]["training_bytes"] > 16 * listed["unet"]["sizes"]["2"]["parameters"] > 0


def test_leaves_are_those_of_state_dict_also_where_a_module_defines_its_own() -> None:
    class Own(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}doubled"] = 2 * self.weight.detach()

    shared = nn.Linear(3, 3)
    plain = nn.Sequential(nn.BatchNorm1d(3), shared, nn.Sequential(shared, nn.Linear(3, 2, bias=False)))
    plain.register_buffer("scratch", torch.zeros(2), persistent=False)

    def without_bias(module: Any, state: Any, prefix: str, meta: Any) -> None:
        del state["0.bias"]

    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked.register_state_dict_post_hook(without_bias)
    for model in (plain, nn.Sequential(Own(3, 2), nn.Linear(2, 2)), hooked):
        names = [name for name, _ in model_tree._leaves(model)]
        assert names == list(model.state_dict())
    assert len(names) == 1
    assert list(params_of(plain)) == [
        "0.weight",
        "0.bias",
        "0.running_mean",
        "0.running_var",
        "1.weight",
        "1.bias",
        "2.1.weight",
    ]
