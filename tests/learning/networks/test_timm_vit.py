"""The vision transformer with timm's names: its names, its arithmetic, and a checkpoint that loads without renaming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.adapters import LowRank
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.timm_vit import Block, TimmViT
from polyclinic.learning.weights import importer
from polyclinic.learning.weights.matching import Mismatch, StartWeights
from polyclinic.learning.weights.store import Card
from tests.support.known import known
from tests.support.start_weights import convert_here

WIDTH, HEADS, PATCH = 12, 3, 4
SIZE = (("width", WIDTH), ("heads", HEADS), ("depth", 2), ("patch_size", PATCH))


def checkpoint(side: int, registers: int = 0, scaled: bool = False, positions: str = "all") -> dict[str, Tensor]:
    """A state of timm's ``VisionTransformer`` of this size, with ten classes, written by its names and shapes alone."""
    patches, extra = (side // PATCH) ** 2, 1 + registers if positions == "all" else 0
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH)}
    if registers:
        shapes["reg_token"] = (1, registers, WIDTH)
    shapes |= {
        "pos_embed": (1, patches + extra, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for i in range(2):
        layers = {
            "norm1": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm2": (WIDTH,),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }
        for layer, shape in layers.items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
        if scaled:
            shapes |= {f"blocks.{i}.ls1.gamma": (WIDTH,), f"blocks.{i}.ls2.gamma": (WIDTH,)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (10, WIDTH), "head.bias": (10,)}
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=rng) / 4 for name, shape in shapes.items()}


def added(state: dict[str, Tensor], folder: Path) -> str:
    """Add a checkpoint as ``torch.save`` writes it, and return its hash in the store."""
    torch.save(state, folder / "vit.pth")
    return importer.add(folder / "vit.pth", Card("vit", "MIT")).stored.sha256


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    convert_here(monkeypatch)


def test_a_layer_is_pytorchs_with_the_same_numbers() -> None:
    block = Block(WIDTH, HEADS, 4 * WIDTH, 0.0).eval()
    known = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
        "attn.proj": "self_attn.out_proj",
    }
    given = {name: torch.randn_like(leaf) for name, leaf in block.state_dict().items()}
    block.load_state_dict(given)
    same = {f"{other}.{end}": given[f"{own}.{end}"] for own, other in names.items() for end in ("weight", "bias")}
    same |= {f"self_attn.in_proj_{end}": given[f"attn.qkv.{end}"] for end in ("weight", "bias")}
    known.load_state_dict(same)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(block(x), known(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("positions", ["all", "patches"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_tokens_are_the_class_the_registers_and_the_patches(registers: int, positions: Any, pool: Any) -> None:
    """Against the sum of its parts, written out for one image."""
    model = TimmViT((3, 8, 12), 5, PATCH, WIDTH, 1, HEADS, 4.0, registers, 0.5, positions, pool).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.randn_like(leaf) / 3)
        x = torch.randn(1, 3, 8, 12)
        cells = [x[0, :, r : r + PATCH, c : c + PATCH].flatten() for r in (0, 4) for c in (0, 4, 8)]
        proj = model.patch_embed.proj
        patches = torch.stack(cells) @ proj.weight.flatten(1).T + known(proj.bias)
        extra = torch.cat([model.cls_token[0], *([model.reg_token[0]] if registers else [])])
        if positions == "all":
            h = torch.cat([extra, patches]) + model.pos_embed[0]
        else:
            h = torch.cat([extra, patches + model.pos_embed[0]])
        h = model.blocks(h[None])[0]
        if pool == "token":
            pooled = F.layer_norm(h, (WIDTH,), model.norm.weight, model.norm.bias, 1e-6)[0]  # type: ignore[arg-type]
        else:
            mean = h[1 + registers :].mean(0)
            pooled = F.layer_norm(mean, (WIDTH,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)  # type: ignore[arg-type]
        torch.testing.assert_close(model(x)[0], model.head(pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, ()),
        ({"registers": 4, "scaled": True}, (("registers", 4), ("layer_scale", 1e-5))),
        ({"registers": 4, "positions": "patches"}, (("registers", 4), ("positions", "patches"))),
    ],
)
def test_a_checkpoint_loads_without_renaming(more: dict[str, Any], options: Any, tmp_path: Path) -> None:
    state = checkpoint(16, **more)
    network = Network("timm-vit", (3, 16, 16), 10, (*SIZE, *options))
    tuned = FineTuned(network, StartWeights(added(state, tmp_path), head=True))
    account = tuned.account()
    assert account is not None
    assert (account.new, account.unused, dict(account.adapted)) == ((), (), {})
    found = params_of(tuned())
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], leaf) for name, leaf in state.items())


@pytest.mark.parametrize(("registers", "positions", "extra"), [(0, "all", 1), (4, "all", 5), (4, "patches", 0)])
def test_positions_are_interpolated_to_another_grid(registers: int, positions: str, extra: int, tmp_path: Path) -> None:
    state = checkpoint(16, registers, positions=positions)
    options = (*SIZE, ("registers", registers), ("positions", positions))
    network, sha256 = Network("timm-vit", (1, 24, 24), 2, options), added(state, tmp_path)
    with pytest.raises(Mismatch, match=r"pos_embed has shape .*set grid = \"interpolate\""):
        FineTuned(network, StartWeights(sha256, stem="sum"))()
    tuned = FineTuned(network, StartWeights(sha256, stem="sum", grid="interpolate"))
    account = tuned.account()
    assert account is not None
    assert account.adapted.keys() == {"pos_embed", "patch_embed.proj.weight"}
    assert set(account.new) == {"head.weight", "head.bias"}
    found, given = params_of(tuned())["pos_embed"], state["pos_embed"]
    grid = given[:, extra:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 36, WIDTH)
    assert torch.equal(found[:, :extra], given[:, :extra])
    torch.testing.assert_close(found[:, extra:], moved)


def test_adapters_stand_beside_the_attention_and_start_without_effect(tmp_path: Path) -> None:
    sha256 = added(checkpoint(16), tmp_path)
    network = Network("timm-vit", (3, 16, 16), 2, SIZE)
    lora = LowRank(("blocks.*.attn.qkv",), 2)
    adapted = FineTuned(network, StartWeights(sha256), ("adapters", "head"), lora)().eval()
    leaves = params_of(adapted)
    assert {name for name in leaves if ".lora_" not in name} == {"head.weight", "head.bias"}
    assert len(leaves) == 2 + 2 * 2
    plain = FineTuned(network, StartWeights(sha256))().eval()
    plain.load_state_dict({**plain.state_dict(), **{name: leaves[name] for name in ("head.weight", "head.bias")}})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(adapted(x), plain(x))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 18, 16), SIZE, "sides are multiples of patch_size = 4, not 18 x 16"),
        ((1, 16, 16, 16), SIZE, "sides are multiples"),
        ((1, 16, 16), (*SIZE, ("width", 13)), "width = 13 is not a multiple of heads = 3"),
        ((1, 16, 16), (*SIZE, ("pool", "max")), "pool = 'max' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Network("timm-vit", shape, 2, tuple(dict(options).items()))()
