"""Augmentation: laws that hold whatever is drawn, and maps that are known."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import STILL, STRONG, WEAK, Augment, move
from polyclinic.learning.training.local import LocalTraining

SHAPES = [(3, 2, 9, 12), (3, 1, 6, 7, 8), (5, 11)]


def dice(key: Any = "x") -> Any:
    return Site("a").rng(key)


@pytest.mark.parametrize("shape", SHAPES)
def test_still_changes_nothing(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=dice())
    assert torch.allclose(STILL.view(x, dice()), x, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("augment", [WEAK, STRONG])
def test_same_dice_same_view_and_other_dice_another(shape: tuple[int, ...], augment: Any) -> None:
    x = torch.randn(shape, generator=dice())
    before = x.clone()
    first, again, other = (augment.view(x, dice(key)) for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert torch.equal(x, before)
    assert first.shape == x.shape
    assert first.isfinite().all()
    if augment is STRONG or len(shape) > 2:
        assert not torch.equal(first, other)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_a_flip_is_a_flip(axis: int) -> None:
    x = torch.randn((16, 1, 4, 5, 6), generator=dice())
    seen = Augment((axis,), 0, 0, 0).view(x, dice())
    kinds = [
        0 if torch.allclose(v, o, atol=1e-4) else 1 if torch.allclose(v, o.flip(axis), atol=1e-4) else 2
        for v, o in zip(seen, x, strict=True)
    ]
    assert set(kinds) == {0, 1}


def test_a_quarter_turn_is_numpys() -> None:
    x = torch.randn((1, 1, 8, 8), generator=dice())
    where = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]])
    turned = move(x, where)[0, 0].numpy()
    assert np.allclose(turned, np.rot90(x[0, 0].numpy(), -1), atol=1e-4) or np.allclose(
        turned, np.rot90(x[0, 0].numpy(), 1), atol=1e-4
    )


def test_masks_move_with_their_images() -> None:
    mask = torch.zeros(8, 16, 16, dtype=torch.long)
    mask[:, 3:9, 4:12] = 1
    x = mask[:, None].float()
    seen, moved = Augment((-1, -2), 25, 0.2, 0.1)((x, mask), dice())
    assert moved.dtype == torch.long
    assert set(moved.unique().tolist()) <= {0, 1}
    assert ((seen[:, 0] > 0.5).long() == moved).float().mean() > 0.98
    assert not torch.equal(moved, mask)


def test_recolour_moves_nothing_and_keeps_targets_of_other_kinds() -> None:
    x = torch.zeros(6, 1, 10, 10)
    x[:, :, 4:6, 4:6] = 1
    for view in (Augment(contrast=0.5, gamma=0.5).recolour(x, dice()), Augment(brightness=0.9).recolour(x, dice())):
        assert torch.equal(view.flatten(1).argmax(1), x.flatten(1).argmax(1))
        assert (view[:, 0, 0, 0] < view[:, 0, 5, 5]).all()
    y = torch.arange(6)
    assert torch.equal(STRONG((x, y), dice())[1], y)


def test_noise_and_cutout_are_as_large_as_said() -> None:
    x = torch.randn((64, 1, 20, 20), generator=dice())
    noise = (Augment(noise=0.5).recolour(x, dice()) - x).flatten(1).std(1) / x.flatten(1).std(1)
    assert noise.max() < 0.55
    assert 0.15 < noise.mean() < 0.35
    blank = Augment(cutout=0.5).recolour(x, dice())
    share = (blank != x).flatten(1).float().mean(1)
    assert share.max() <= 0.26 + 1e-6
    assert share.mean() > 0.02
    changed = blank[0][blank[0] != x[0]]
    assert changed.numel() == 0 or torch.allclose(changed, x[0].mean().expand_as(changed), atol=1e-5)


def test_it_stands_in_a_training(task: Classification, sites: dict[str, Site]) -> None:
    local = LocalTraining(epochs=1, batch_size=8, augment=STRONG)
    site, start = sites["site-1"], task.first(0)
    first, again = (local.fit(task, start, site, 3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    plain = LocalTraining(epochs=1, batch_size=8).fit(task, start, site, 3)
    assert any(not torch.equal(first[name], plain[name]) for name in first)
