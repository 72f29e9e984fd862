"""Steps: millimeters, middles and intensities against plain arithmetic; and how they are declared."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from polyclinic.data.examples import DataError
from polyclinic.data.preprocessing.pipeline_config import STEPS, Steps, apply, fingerprint
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import (
    Channels,
    CropPad,
    Foreground,
    Percentiles,
    Relabel,
    Resample,
    Resize,
    Scale,
    Window,
    ZScore,
)


def picture(*size: int, channels: int = 1, spacing: tuple[float, ...] | None = None) -> Picture:
    """Random pixels, and a mask of the brighter half."""
    pixels = torch.rand(channels, *size, generator=torch.Generator().manual_seed(len(size)))
    return Picture(pixels, (pixels[0] > 0.5).long(), spacing)


def ramp(size: int, mm: float) -> Picture:
    """A square whose value is the distance in mm from its left edge, at the pixels' centers."""
    line = (torch.arange(size) + 0.5) * mm
    return Picture(line.expand(1, size, size).clone(), None, (mm, mm))


@given(st.integers(8, 60), st.floats(0.4, 3.0), st.floats(0.4, 3.0))
@settings(max_examples=60, deadline=None)
def test_resampling_keeps_places_in_millimeters(size: int, old: float, new: float) -> None:
    """A ramp in mm is the same ramp in mm on the new grid, except within a pixel of the border."""
    before = ramp(size, old)
    after = Resample(new)(before)
    assert after.spacing_mm is not None
    mm = after.spacing_mm[1]
    assert after.size[1] == max(1, round(size * old / new))
    assert mm * after.size[1] == pytest.approx(old * size)  # the field of view is unchanged
    inner = [i for i in range(after.size[1]) if 1.5 * max(old, mm) < (i + 0.5) * mm < size * old - 1.5 * max(old, mm)]
    for i in inner:
        assert float(after.pixels[0, 0, i]) == pytest.approx((i + 0.5) * mm, abs=max(old, mm) * 0.5 + 1e-3)


def test_resampling_to_what_it_is_changes_nothing() -> None:
    """The identity, for images and masks, in two and three dimensions."""
    for one in (picture(9, 7, spacing=(1.0, 2.0)), picture(5, 6, 7, spacing=(3.0, 1.0, 1.0))):
        assert one.spacing_mm is not None
        same = Resample(one.spacing_mm)(one)
        assert torch.equal(same.pixels, one.pixels)
        assert torch.equal(same.mask, one.mask)  # type: ignore[arg-type]
        assert torch.equal(Resize(one.size)(one).pixels, one.pixels)


def test_shrinking_averages_and_never_aliases() -> None:
    """A chessboard shrunk by four is gray everywhere, not black or white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    assert float((Resize(16)(Picture(board[None].float())).pixels - 0.5).abs().max()) < 1e-6


def test_masks_keep_their_labels() -> None:
    """Nearest neighbor: no label that was missing; volume in mm³ is kept to a few percent."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(40)] * 3, indexing="ij")).float()
    ball = ((grid - 19.5).square().sum(0) < 15**2).long() * 7
    after = Resample((2.0, 1.3, 0.7))(Picture(ball[None].float(), ball, (1.0, 1.0, 1.0)))
    assert after.mask is not None
    assert set(after.mask.unique().tolist()) == {0, 7}
    assert after.spacing_mm is not None
    assert int((after.mask == 7).sum()) * math.prod(after.spacing_mm) == pytest.approx(int((ball == 7).sum()), rel=0.05)


@given(st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_cropping_undoes_padding(size: int, more: int) -> None:
    """Pad by some, crop back: the same. What was padded is the fill, and background in the mask."""
    one = picture(size, size)
    padded = CropPad(size + more, fill=-3.0)(one)
    back = CropPad(size)(padded)
    assert torch.equal(back.pixels, one.pixels)
    assert torch.equal(back.mask, one.mask)  # type: ignore[arg-type]
    assert int((padded.pixels == -3).sum()) == (size + more) ** 2 - size**2
    assert int(padded.mask.sum()) == int(one.mask.sum())  # type: ignore[union-attr]


def test_the_middle_is_the_middle() -> None:
    """One crops, one pads, the third stays; the brightest voxel stays in the middle."""
    one = Picture(torch.zeros(1, 5, 9, 7))
    one.pixels[0, 2, 4, 3] = 1
    after = CropPad((9, 5, 7))(one)
    assert after.size == (9, 5, 7)
    assert after.pixels[0].nonzero().tolist() == [[4, 2, 3]]


def test_the_foreground_is_the_box_around_what_is_bright() -> None:
    """With its margin, within the image; the whole image if all of it is dark."""
    one = Picture(torch.zeros(2, 10, 10), torch.arange(100).reshape(10, 10), (1.0, 2.0))
    one.pixels[1, 3:5, 6:8] = 1
    assert Foreground()(one).size == (2, 2)
    assert Foreground()(one).mask.tolist() == [[36, 37], [46, 47]]  # type: ignore[union-attr]
    assert Foreground(margin=2)(one).size == (6, 6)
    assert Foreground(margin=50)(one).size == (10, 10)
    assert Foreground(above=2)(one).size == (10, 10)
    assert Foreground()(one).spacing_mm == (1.0, 2.0)


def test_intensities_against_plain_arithmetic() -> None:
    """Mean 0 and deviation 1; windows, lines and percentiles where they should be; constants do no harm."""
    one = picture(20, 20, channels=2)
    z = ZScore()(one).pixels
    assert z.mean(dim=(1, 2)).abs().max() < 1e-6
    assert (z.flatten(1).std(dim=1, correction=0) - 1).abs().max() < 1e-5
    brain = Picture(one.pixels * (one.pixels > 0.3))
    inside = ZScore(nonzero=True)(brain).pixels
    assert bool((inside[brain.pixels == 0] == 0).all())
    assert abs(float(inside[0][brain.pixels[0] > 0].mean())) < 1e-6
    hu = Picture(torch.tensor([[[-1000.0, -160, 40, 240, 3000]]]))
    assert Window(40, 400)(hu).pixels.flatten().tolist() == [0, 0, 0.5, 1, 1]
    assert Scale(-1000, 1000)(hu).pixels[0, 0, 2] == pytest.approx(0.52)
    hundred = Picture(torch.arange(101.0).reshape(1, 1, 101))
    scaled = Percentiles(10, 90)(hundred).pixels.flatten()
    assert (float(scaled[10]), float(scaled[50]), float(scaled[90]), float(scaled[100])) == pytest.approx(
        (0, 0.5, 1, 1)
    )
    flat = Picture(torch.full((1, 4, 4), 7.0))
    for step in (ZScore(), ZScore(nonzero=True), Percentiles()):
        assert float(step(flat).pixels.abs().max()) == 0


def test_channels() -> None:
    """Colors to gray by the mean; gray to colors; and back is the same."""
    one = picture(3, 3, channels=3)
    assert torch.allclose(Channels(1)(one).pixels[0], one.pixels.mean(0))
    gray = picture(3, 3)
    assert torch.equal(Channels(1)(Channels(3)(gray)).pixels.round(decimals=6), gray.pixels.round(decimals=6))


def test_order_matters_and_is_in_the_fingerprint() -> None:
    """Steps are applied from the left; another order, option or number of steps is another name."""
    one = picture(10, 12)
    a, b = CropPad(6), Resize(20)
    assert apply((a, b), one).size == (20, 20)
    assert apply((b, a), one).size == (6, 6)
    names = {fingerprint(steps) for steps in ((a, b), (b, a), (a,), (CropPad(6, fill=1),), (CropPad(7),), ())}
    assert len(names) == 6
    assert fingerprint((CropPad(6), Resize(20))) == fingerprint((a, b))


def test_steps_are_read_from_a_study_file_and_back() -> None:
    """Every step by its word, lists as tuples; written down they read the same."""
    adapter: TypeAdapter[Any] = TypeAdapter(Steps)
    given: list[dict[str, Any]] = [
        {"step": "resample", "mm": [1, 1, 2.5]},
        {"step": "foreground"},
        {"step": "crop_pad", "size": 32},
        {"step": "window", "center": 40, "width": 400},
        {"step": "channels", "count": 3},
    ]
    steps = adapter.validate_python(given)
    assert steps == (Resample((1.0, 1.0, 2.5)), Foreground(), CropPad(32), Window(40, 400), Channels(3))
    assert adapter.validate_python(adapter.dump_python(steps, mode="json")) == steps
    assert {item["step"] for item in given} <= set(STEPS)


@pytest.mark.parametrize(
    ("given", "where", "says"),
    [
        ([{"step": "zscor"}], (0, "step"), 'Did you mean "zscore"'),
        ([{"step": "zscore", "non_zero": True}], (0, "non_zero"), 'Did you mean "nonzero"'),
        ([{"step": "zscore"}, {"step": "resize", "size": -1}], (1, "size"), "above 0"),
        ([{"step": "window", "center": 1.0}], (0, "width"), "required"),
        ([{"step": "percentiles", "low": 60, "high": 40}], (0, "low"), "low < high"),
        ([{"step": "scale", "low": 1, "high": 1}], (0, "high"), "above low"),
        (["zscore"], (0, "step"), "no step is called"),
        ("zscore", (), "must be a list of steps"),
    ],
)
def test_mistakes_are_named_at_their_key(given: Any, where: tuple[Any, ...], says: str) -> None:
    """In one pass, in words."""
    with pytest.raises(ValidationError) as error:
        TypeAdapter(Steps).validate_python(given)
    (line,) = error.value.errors()
    assert line["loc"] == where
    assert says in line["msg"]


def test_what_cannot_be_done_to_an_image_is_said() -> None:
    """No spacing; another number of axes; too many voxels."""
    with pytest.raises(DataError, match="does not state its pixel size"):
        Resample(1.0)(picture(4, 4))
    with pytest.raises(DataError, match="has 3 numbers, but the image has 2 axes"):
        Resize((4, 4, 4))(picture(4, 4))
    with pytest.raises(DataError, match="too large"):
        Resample(1e-4)(picture(9, 9, spacing=(1.0, 1.0)))


def test_masks_are_relabeled() -> None:
    """In the order listed, or to the given values; the image stays; other values and other lengths are refused."""
    one = Picture(torch.rand(1, 2, 2), torch.tensor([[0, 1], [2, 4]]))
    after = Relabel((0, 1, 2, 4))(one)
    assert after.mask.tolist() == [[0, 1], [2, 3]]  # type: ignore[union-attr]
    assert torch.equal(after.pixels, one.pixels)
    assert Relabel((4, 2, 1, 0), (0, 0, 0, 1))(one).mask.tolist() == [[1, 0], [0, 0]]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"the mask contains \[4\]"):
        Relabel((0, 1, 2))(one)
    with pytest.raises(DataError, match="there is none"):
        Relabel((0, 1))(Picture(one.pixels))
    for bad in (((0, 0), ()), ((0, 1), (1,)), ((0, 1), (0, -1))):
        with pytest.raises(DataError, match=r"twice|give one number"):
            Relabel(*bad)
