"""Masks of a previous stage move with the image, stay masks, and are changed as in nnU-Net."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from polyclinic.learning.training import stage_masks
from polyclinic.learning.training.image_augmentation import RECIPES, ImageAugmentation, augmentation_of
from polyclinic.learning.training.minibatches import Sampler


def boxes(size: int = 24) -> torch.Tensor:
    """Two labels, the second in two components."""
    labels = torch.zeros(size, size, size, dtype=torch.int64)
    labels[4:12, 5:12, 6:14] = 1
    labels[15:20, 15:21, 3:9] = 2
    labels[4:9, 16:20, 16:20] = 2
    return labels


def generator(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def onehot(labels: torch.Tensor, count: int = 2) -> torch.Tensor:
    """The channels of the labels."""
    return torch.stack([labels == label for label in range(1, count + 1)]).float()


def test_the_operations_are_those_of_morphology() -> None:
    """Of a ball in voxels; outside of the patch, erosion sees foreground and dilation background."""
    mask, radius = boxes().numpy() > 0, 2.3
    mask[0:3, 0:4, 0:5] = True
    grid = np.indices((5, 5, 5)) - 2
    ball = (grid**2).sum(0) <= radius**2
    expected = [
        ndimage.binary_dilation(mask, ball),
        ndimage.binary_erosion(mask, ball, border_value=1),
        ndimage.binary_erosion(ndimage.binary_dilation(mask, ball), ball, border_value=1),
        ndimage.binary_dilation(ndimage.binary_erosion(mask, ball, border_value=1), ball),
    ]
    for operation, wanted in enumerate(expected):
        assert np.array_equal(stage_masks._operated(mask, operation, radius), wanted), operation
    for empty in (np.zeros((6, 6, 6), bool), np.ones((6, 6, 6), bool)):
        for operation in range(4):
            assert np.array_equal(stage_masks._operated(empty, operation, radius), empty)


def test_a_component_is_lost_unless_it_is_large() -> None:
    mask = boxes().numpy() == 2
    lost = {stage_masks._without_component(mask, generator(seed)).sum() for seed in range(12)}
    assert lost == {5 * 6 * 6, 5 * 4 * 4}  # one or the other is left
    large = np.zeros((10, 10, 10), bool)
    large[:2] = True
    assert np.array_equal(stage_masks._without_component(large, generator()), large)
    assert not stage_masks._without_component(np.zeros((4, 4, 4), bool), generator()).any()


def test_labels_remain_apart_and_probabilities_are_those_of_nnunet() -> None:
    same, operated, lost, n = 0, 0, 0, 400
    labels, channels = boxes(), onehot(boxes())
    for seed in range(n):
        found = stage_masks.changed(labels, 2, generator(seed))
        assert float(found.sum(0).max()) <= 1
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        removed = channels - found
        same += torch.equal(found, channels)
        operated += bool((found > channels).any())
        lost += float(removed.sum()) > 0
    # Nothing happens with probability 0.6 x 0.8, or if opening or closing leaves boxes nearly as they are.
    assert same / n == pytest.approx(0.48, abs=0.06)
    assert operated / n == pytest.approx(0.4 * (1 - 0.45**2), abs=0.12)
    assert lost > 0.2 * n


def test_masks_move_with_the_image_and_never_get_intensities() -> None:
    """With the same geometry, a mask channel is where a mask as the target is, and image and target as without it."""
    from unittest import mock

    augmentation = RECIPES["nnunet"]
    image = torch.rand(1, 24, 24, 24, generator=generator(3))
    with mock.patch.object(stage_masks, "changed", lambda labels, count, rng: onehot(labels, count)):
        moved = 0
        for seed in range(40):
            rng, size = generator(seed), (24, 24, 24)
            place = augmentation.place(size, rng, margin=False)
            state = rng.get_state()
            x, y = augmentation(torch.cat([image, onehot(boxes())]), boxes(), place, size, rng, 2)
            rng.set_state(state)
            alone, target = augmentation(image.clone(), boxes(), place, size, rng)
            assert torch.equal(x[:1], alone)
            assert torch.equal(y, target)
            assert torch.equal(x[1:], onehot(y))
            moved += not torch.equal(y, boxes())
        assert moved > 20


def test_only_data_with_masks_are_changed() -> None:
    """The channels of other data are images, and the masks are left alone without an augmentation."""

    class Data:
        patch, mask_channels = (24, 24, 24), 2

        def __len__(self) -> int:
            return 1

        def draw(
            self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([torch.rand(1, *size, generator=rng), onehot(boxes())]), boxes()

    noise = augmentation_of({"noise": {"probability": 1.0}})
    assert isinstance(noise, ImageAugmentation)
    for augmentation, few in ((None, 0), (noise, 10)):
        sampler = Sampler(Data(), augmentation)
        changed = sum(not torch.equal(sampler(0, seed)[0][1:], onehot(boxes())) for seed in range(40))
        assert (changed > few) == (augmentation is not None)
        assert changed < 40
    with_images = Data()
    with_images.mask_channels = 0
    x, _ = Sampler(with_images, noise)(0, 1)
    assert len(x[1:].unique()) > 1000
