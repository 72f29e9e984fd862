"""Matching of start weights: every tensor of the file and of the network is accounted for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.weights.matching import Matched, Mismatch, StartWeights, match

OWN = {"body.0.weight": torch.zeros(4, 3), "body.0.bias": torch.zeros(4), "head.weight": torch.zeros(2, 4)}


def matched(own: dict[str, Tensor], given: dict[str, Tensor], **how: object) -> Matched:
    return match(own, given, StartWeights("0" * 64, **how), lambda name: name.startswith("head."))  # type: ignore[arg-type]


def given(prefix: str = "") -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {prefix + name: torch.randn(leaf.shape, generator=rng) for name, leaf in OWN.items()}


def test_every_tensor_is_accounted_for() -> None:
    account = matched(OWN, given())
    assert account.loaded == ("body.0.weight", "body.0.bias")
    assert account.new == ("head.weight",)
    assert account.unused == ("head.weight",)
    assert account.numbers == (16, 24)
    assert torch.equal(account.leaves["body.0.weight"], given()["body.0.weight"])
    assert account.summary == (
        "2 of 3 tensors loaded (66.7 % of the numbers); 1 start at random (head.weight); 1 of the file not used (head.weight)"
    )


def test_a_head_of_equal_shape_is_loaded_only_if_asked() -> None:
    assert "head.weight" not in matched(OWN, given()).leaves
    assert "head.weight" in matched(OWN, given(), head=True).leaves
    other = {**given(), "head.weight": torch.zeros(9, 4)}
    assert matched(OWN, other).new == ("head.weight",)
    with pytest.raises(Mismatch, match=r"head\.weight has shape 9x4 in the file and 2x4 in the network"):
        matched(OWN, other, head=True)


def test_all_that_does_not_fit_is_listed_together() -> None:
    wrong = {"body.0.weight": torch.zeros(5, 3), "decoder.1": torch.zeros(2)}
    with pytest.raises(Mismatch) as error:
        matched(OWN, wrong)
    text = str(error.value)
    assert text.startswith("3 tensors do not fit:")
    assert "body.0.weight has shape 5x3 in the file and 4x3 in the network" in text
    assert "body.0.bias 4 is not in the file" in text
    assert "decoder.1 2 of the file is not in the network" in text


@pytest.mark.parametrize("prefix", ["module.", "visual.trunk.", "teacher.backbone."])
def test_a_common_prefix_is_suggested_and_strip_removes_it(prefix: str) -> None:
    with pytest.raises(Mismatch, match=f'Did you mean strip = "{prefix}"'):
        matched(OWN, given(prefix))
    account = matched(OWN, {**given(prefix), "text.weight": torch.zeros(3)}, strip=prefix)
    assert len(account.loaded) == 2
    assert "text.weight" in account.unused
    with pytest.raises(Mismatch, match="no name in the file begins with strip"):
        matched(OWN, given(), strip=prefix)


def test_rename_replaces_prefixes_and_a_suggestion_names_it() -> None:
    bare = {name.removeprefix("body."): leaf for name, leaf in given().items() if name.startswith("body.")}
    with pytest.raises(Mismatch, match=r'Did you mean rename = \{ "" = "body." \}'):
        matched(OWN, bare)
    assert len(matched(OWN, bare, rename=(("", "body."),)).loaded) == 2
    with pytest.raises(Mismatch, match="two tensors of the file become"):
        matched(OWN, {**given(), "x.weight": torch.zeros(1)}, rename=(("x.", "body.0."),))


def test_skip_covers_both_sides_and_cannot_skip_everything() -> None:
    extra = {**given(), "decoder.1": torch.zeros(2)}
    with pytest.raises(Mismatch, match=r'set skip = \["decoder.\*"\]'):
        matched(
            {**OWN, **{f"body.{i}.weight": torch.zeros(1) for i in range(1, 6)}},
            extra | {f"body.{i}.weight": torch.zeros(1) for i in range(1, 6)},
        )
    account = matched(OWN, extra, skip=("decoder.*", "body.0.bias"))
    assert account.unused == ("body.0.bias", "decoder.1", "head.weight")
    assert account.new == ("body.0.bias", "head.weight")
    with pytest.raises(Mismatch, match="only 4 of the 16 numbers before the head come from the file"):
        matched(OWN, given(), skip=("body.0.weight",))


def test_stems_are_exact_for_replicated_gray_images() -> None:
    rgb, gray = torch.randn(4, 3, 3, 3), torch.randn(2, 1, 8, 8)
    own = {"stem": torch.zeros(4, 1, 3, 3)}
    with pytest.raises(
        Mismatch, match='stem has shape 4x3x3x3 in the file and 4x1x3x3 in the network; set stem = "sum"'
    ):
        matched(own, {"stem": rgb})
    account = matched(own, {"stem": rgb}, stem="sum")
    assert account.adapted == {"stem": "3 input channels to 1 (sum)"}
    assert torch.allclose(F.conv2d(gray, account.leaves["stem"]), F.conv2d(gray.expand(-1, 3, -1, -1), rgb), atol=1e-5)
    assert torch.allclose(matched(own, {"stem": rgb}, stem="mean").leaves["stem"], rgb.mean(1, keepdim=True))
    back = matched({"stem": rgb}, {"stem": rgb[:, :1]}, stem="sum").leaves["stem"]
    assert torch.allclose(F.conv2d(gray.expand(-1, 3, -1, -1), back), F.conv2d(gray, rgb[:, :1]), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_inflation_is_exact_for_volumes_that_are_constant_along_the_axis(axis: int) -> None:
    flat, image = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 8, 8)
    own = {"c": torch.zeros(4, 2, 3, 3, 3)}
    with pytest.raises(Mismatch, match='set inflate = "mean" or "center"'):
        matched(own, {"c": flat})
    volume = image.unsqueeze(2 + axis).repeat_interleave(5, 2 + axis)
    for how in ("mean", "center"):
        kernel = matched(own, {"c": flat}, inflate=how, inflate_axis=axis).leaves["c"]
        out = F.conv3d(volume, kernel)
        assert torch.allclose(out.select(2 + axis, 1), F.conv2d(image, flat), atol=1e-5)
    center = matched(own, {"c": flat}, inflate="center", inflate_axis=axis).leaves["c"]
    assert torch.equal(center.select(2 + axis, 1), flat)
    assert float(center.select(2 + axis, 0).abs().sum()) == 0


def test_inflation_and_stem_together() -> None:
    account = matched({"c": torch.zeros(4, 1, 3, 3, 3)}, {"c": torch.ones(4, 3, 3, 3)}, inflate="mean", stem="sum")
    assert torch.allclose(account.leaves["c"], torch.ones(4, 1, 3, 3, 3))
    assert account.adapted["c"] == "inflated to 3 along axis 2 (mean), 3 input channels to 1 (sum)"


@pytest.mark.parametrize(("tokens", "old", "new", "dims"), [(1, 4, 6, 2), (0, 4, 2, 2), (5, 3, 5, 2), (0, 2, 3, 3)])
def test_position_grids_are_interpolated_and_tokens_are_not(tokens: int, old: int, new: int, dims: int) -> None:
    leaf = torch.randn(1, tokens + old**dims, 6)
    own = {"pos": torch.zeros(1, tokens + new**dims, 6)}
    with pytest.raises(Mismatch, match='set grid = "interpolate"'):
        matched(own, {"pos": leaf})
    moved = matched(own, {"pos": leaf}, grid="interpolate").leaves["pos"]
    assert torch.equal(moved[:, :tokens], leaf[:, :tokens])
    image = leaf[0, tokens:].T.reshape(1, 6, *[old] * dims)
    mode = "bicubic" if dims == 2 else "trilinear"
    expected = F.interpolate(image, [new] * dims, mode=mode, align_corners=False).flatten(2)[0].T
    assert torch.allclose(moved[0, tokens:], expected)
    constant = matched(own, {"pos": torch.ones_like(leaf)}, grid="interpolate").leaves["pos"]
    assert torch.allclose(constant, torch.ones_like(constant), atol=1e-6)


def test_a_grid_that_is_no_square_is_refused() -> None:
    with pytest.raises(Mismatch, match="are not square or cubic grids"):
        matched({"pos": torch.zeros(1, 16, 6)}, {"pos": torch.zeros(1, 15, 6)}, grid="interpolate")
