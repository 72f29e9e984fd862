"""The mask of the previous stage lies where the image shows it, whatever the two grids are."""

from typing import Any

import pytest
import torch

from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing import previous_stage
from polyclinic.data.preprocessing.nnunet_steps import CropNonzero, ResampleNnunet, Transpose
from polyclinic.data.preprocessing.pipeline_config import apply, fingerprint
from polyclinic.data.preprocessing.previous_stage import NEW, SEEN, PreviousStage, image_key
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.errors import DataError

ONE, OTHER = "1" * 64, "2" * 64
VALUES = (0.0, 1.0, -1.0)
"""The value of each label in the image."""


class Threshold(torch.nn.Module):
    """A network that knows the truth: the label whose value is the nearest."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of three classes."""
        return torch.cat([-((x - value) ** 2) for value in VALUES], 1) * self.factor


def volume(size: tuple[int, ...] = (34, 46, 40), spacing: tuple[float, ...] = (2.0, 1.0, 1.0)) -> Picture:
    """A volume of two balls, with an empty border."""
    pixels = torch.full((1, *size), 0.02)
    pixels[:, :3], pixels[:, :, :5], pixels[..., -4:] = 0, 0, 0
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(n) * mm for n, mm in zip(size, spacing, strict=True)), indexing="ij")
    )
    for value, center in ((1, (27, 17, 12)), (-1, (46, 29, 25))):
        distance = (grid - torch.tensor(center).view(3, 1, 1, 1)).square().sum(0).sqrt()
        pixels[0][distance < 9] = value
    affine = torch.diag(torch.tensor([*reversed(spacing), 1.0], dtype=torch.float64))
    return Picture(pixels, None, spacing, Geometry.of_file(affine, size, (0, 1, 2), (False,) * 3, spacing))


def stage(**changes: Any) -> PreviousStage:
    """A stage at twice the voxel size."""
    how: dict[str, Any] = {
        "network": "unet",
        "inputs": (1, 16, 16, 16),
        "outputs": 3,
        "steps": (CropNonzero(), ResampleNnunet((4.0, 2.0, 2.0))),
        "models": (ONE,),
    }
    return PreviousStage(**{**how, **changes})


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.nn.Module]:
    """The models of the store."""
    found: dict[str, torch.nn.Module] = {ONE: Threshold(), OTHER: Threshold()}
    monkeypatch.setattr(previous_stage, "_built", lambda task, sha256: found[sha256].eval())
    return found


@pytest.mark.parametrize("steps", [(CropNonzero(),), (), (CropNonzero(), ResampleNnunet((1.5, 1.2, 0.9)))])
def test_the_channels_are_the_labels_of_the_image_on_its_own_grid(models: Any, steps: Any) -> None:
    found = apply((*steps, stage()), volume())
    assert found.pixels.shape == (3, *found.size)
    assert found.original is None
    assert found.geometry is not None
    assert found.geometry.stored == found.size
    for label in (1, 2):
        mask, truth = found.pixels[label] > 0, (found.pixels[0] - VALUES[label]).abs() < 0.5
        assert _dice(mask, truth) > 0.9
        centers = [where.nonzero().double().mean(0) for where in (mask, truth)]
        assert float((centers[0] - centers[1]).abs().max()) < 0.3  # of a voxel
    assert torch.equal(found.pixels[:1], apply(steps, volume()).pixels)


def test_the_grid_outside_of_what_the_first_stage_sees_is_background(models: Any) -> None:
    found = apply((stage(),), volume())
    assert float(found.pixels[1:, :2].abs().max()) == 0
    assert float(found.pixels[1:].sum()) > 0


def test_a_known_case_is_predicted_by_the_models_that_held_it_out(models: Any) -> None:
    models[OTHER] = Threshold(-1)  # predicts another label everywhere
    key, elsewhere = image_key(volume()), "0" * 16
    new = apply((stage(),), volume())
    known = {"models": (ONE, OTHER), "known": key + elsewhere}
    first = apply((stage(**known, held_out=(key, elsewhere)),), volume())
    second = apply((stage(**known, held_out=(elsewhere, key)),), volume())
    assert torch.equal(first.pixels, new.pixels)
    assert not torch.equal(second.pixels, new.pixels)
    assert first.notes == second.notes == new.notes == ()
    models[OTHER] = Threshold(-3)
    both = apply((stage(models=(ONE, OTHER)),), volume())  # of the mean of the scores
    assert torch.equal(both.pixels, second.pixels)
    models[OTHER] = Threshold(0.5)
    trained = apply((stage(**known, held_out=("", elsewhere)),), volume())
    assert trained.notes == (SEEN,)
    assert torch.equal(trained.pixels, new.pixels)  # of both models
    other = volume()
    other.pixels[0, 13, 17, 12] = 1.25
    assert apply((stage(**known, held_out=("", elsewhere)),), other).notes == (NEW,)


def test_a_stage_of_regions_gives_their_labels(models: Any) -> None:
    """The whole object and its part, as logits; the channels are the labels that regions are painted with."""

    class Regions(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.abs() - 0.5, -x - 0.5], 1)

    classes = apply((stage(),), volume())
    models[ONE] = Regions()
    found = apply((stage(outputs=2, regions=((1, 2), (2,))),), volume())
    assert found.pixels.shape == classes.pixels.shape
    for label in (1, 2):
        assert _dice(found.pixels[label] > 0, classes.pixels[label] > 0) > 0.95


def test_the_order_of_a_tables_keys_does_not_matter(models: Any) -> None:
    one, other = {"width": 4, "norm": "batch"}, {"norm": "batch", "width": 4}
    assert fingerprint([stage(options=one)]) == fingerprint([stage(options=other)])
    assert fingerprint([stage(options=one)]) != fingerprint([stage(options={"width": 4})])


def test_what_does_not_fit_is_refused(models: Any) -> None:
    with pytest.raises(DataError, match="the image has 2 channels, and the previous stage takes 1"):
        apply((stage(),), Picture(volume().pixels.expand(2, -1, -1, -1), None, (2.0, 1.0, 1.0), volume().geometry))
    with pytest.raises(DataError, match="needs an image from a file"):
        apply((stage(),), Picture(volume().pixels, None, (2.0, 1.0, 1.0)))
    with pytest.raises(DataError, match="the same order of axes"):
        apply((Transpose((2, 0, 1)), stage()), volume())
    models[ONE] = Threshold(float("nan"))
    with pytest.raises(DataError, match="output of the previous stage is not finite"):
        apply((stage(),), volume())
    with pytest.raises(DataError, match="held_out: give one entry for each of the 1 models"):
        stage(held_out=("", ""))


def test_the_threads_of_pytorch_are_as_before(models: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        apply((stage(),), volume())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def _dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
