"""Pictures of training samples: which examples, in which place, brightness and color, with which outlines."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from polyclinic.data.federation import federate
from polyclinic.errors import ConfigError
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.sample_pictures import CELL, GAP, LINE, SampleRow, picture, sample_rows
from tests.studies.run.test_patches import STUDY, write_volumes
from tests.studies.run.test_planning import registry
from tests.support import clinics
from tests.support.data_sets import loaded

BACKGROUND = (20, 24, 28)
NO_MASK = torch.tensor(0)
GRAY = torch.arange(64.0).reshape(1, 8, 8)


def drawn(*rows: SampleRow) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture(rows))).convert("RGB"))


def cell(pixels: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
    """The square of one view."""
    top, left = GAP + LINE + row * (CELL + GAP + LINE), GAP + column * (CELL + GAP)
    return pixels[top : top + CELL, left : left + CELL]


def row_of(x: Tensor, y: Tensor = NO_MASK, samples: Sequence[tuple[Tensor, Tensor]] = ()) -> SampleRow:
    return SampleRow("a caption", (x, y), tuple(samples))


def enlarged(values: np.ndarray, by: int) -> np.ndarray:
    return values.repeat(by, 0).repeat(by, 1)


def brightness(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (255 * ((values - low) / (high - low)).clip(0, 1)).astype(np.uint8)


def test_each_view_is_in_its_place_with_the_brightness_of_the_stored_one() -> None:
    second = 3 * GRAY.flip(1)
    pixels = drawn(
        row_of(GRAY, samples=[(GRAY + 9, NO_MASK), (GRAY / 2, NO_MASK)]), row_of(second, samples=[(second, NO_MASK)])
    )
    assert pixels.shape == (2 * (CELL + GAP + LINE) + GAP + LINE, 3 * (CELL + GAP) + GAP, 3)
    for r, c, x, stored in (
        (0, 0, GRAY, GRAY),
        (0, 1, GRAY + 9, GRAY),
        (0, 2, GRAY / 2, GRAY),
        (1, 0, second, second),
        (1, 1, second, second),
    ):
        low, high = np.percentile(stored, (0.5, 99.5))
        expected = enlarged(brightness(x[0].numpy().astype(np.float64), low, high), CELL // 8)
        assert (cell(pixels, r, c) == expected[..., None]).all(), (r, c)
    assert (cell(pixels, 1, 2) == BACKGROUND).all(), "the second row has one sample only"


def test_columns_have_titles_and_rows_captions() -> None:
    pixels = drawn(row_of(GRAY, samples=[(GRAY, NO_MASK)]))
    expected = Image.new("L", (pixels.shape[1], pixels.shape[0]))
    draw = ImageDraw.Draw(expected)
    draw.text((GAP, GAP), "stored", fill=255)
    draw.text((2 * GAP + CELL, GAP), "sample 1", fill=255)
    draw.text((GAP, GAP + LINE + CELL + 2), "a caption", fill=255)
    ink, text = np.asarray(expected), (pixels != BACKGROUND).any(-1)
    for column in range(2):
        cell(text, 0, column)[:] = False
    assert text[ink > 9].all()
    assert not text[ink == 0].any()


def test_colors_are_shown_and_long_images_stay_in_the_middle() -> None:
    x = torch.stack([torch.full((4, 8), value) for value in (0.0, 5.0, 10.0)])
    pixels = cell(drawn(row_of(x)))
    assert (pixels[44:132] == (0, 127, 255)).all()
    assert (pixels[:44] == BACKGROUND).all()
    assert (pixels[132:] == BACKGROUND).all()
    tall = cell(drawn(row_of(x.transpose(1, 2))))
    assert (tall[:, 44:132] == (0, 127, 255)).all()
    assert (tall[:, :44] == BACKGROUND).all()
    two = cell(drawn(row_of(torch.stack([GRAY[0], -GRAY[0]]))))
    assert (two[..., 0] == two[..., 1]).all(), "of two channels the first one is shown, in gray"
    assert two[0, 0, 0] < two[-1, -1, 0]


def test_an_image_of_one_value_is_black_and_a_large_one_fits() -> None:
    assert (cell(drawn(row_of(torch.full((1, 8, 8), 3.0)))) == 0).all()
    large = torch.zeros(1, 352, 352)
    large[:, :, 176:] = 1.0
    pixels = cell(drawn(row_of(large)))
    assert (pixels[:, :88] == 0).all()
    assert (pixels[:, 88:] == 255).all()


def test_masks_are_outlined_by_the_color_of_their_label() -> None:
    """One pixel wide, inside the label; the seventh label has the first color again."""
    given = (
        (230, 80, 60),
        (80, 160, 240),
        (250, 200, 60),
        (120, 210, 110),
        (210, 120, 230),
        (240, 140, 60),
        (230, 80, 60),
    )
    colors = dict(enumerate(given, 1))
    for label, color in colors.items():
        mask = torch.zeros(8, 8, dtype=torch.int64)
        mask[2:5, 3:5] = label
        mask[7, 7] = label
        pixels = cell(drawn(row_of(torch.zeros(1, 8, 8), mask)))
        square = np.zeros((CELL, CELL), bool)
        square[44:110, 66:110] = True
        square[45:109, 67:109] = False
        square[154:, 154] = square[154, 154:] = True  # the border of the image is no border of the label
        assert (pixels[square] == color).all(), label
        assert (pixels[~square] == 0).all(), label
    background = torch.ones(8, 8, dtype=torch.int64)
    background[0, 0] = 2
    both = cell(drawn(row_of(torch.zeros(1, 8, 8), background)))
    assert {tuple(color) for color in both.reshape(-1, 3).tolist()} == {(0, 0, 0), colors[1], colors[2]}


def test_of_a_volume_the_slice_with_the_most_foreground_is_shown_or_the_middle_one() -> None:
    x = torch.arange(5.0)[None, :, None, None].expand(1, 5, 8, 8).clone()
    mask = torch.zeros(5, 8, 8, dtype=torch.int64)
    low, high = np.percentile(x, (0.5, 99.5))

    def shown(y: Tensor) -> int:
        values = np.unique(cell(drawn(row_of(x, y))).reshape(-1, 3), axis=0)
        gray = [v[0] for v in values if v[0] == v[1] == v[2]]
        return [int(brightness(np.array([float(k)]), low, high)[0]) for k in range(5)].index(int(gray[0]))

    assert shown(mask) == shown(NO_MASK) == shown(mask.float() + 1) == 2
    mask[3, 2:4, 2:4] = 5  # few pixels of a high label
    mask[1, 2:6, 2:6] = 1
    assert shown(mask) == 1
    outlined = cell(drawn(row_of(x, mask)))
    assert (outlined == (230, 80, 60)).all(-1).sum() == 4 * 88 - 4
    assert (cell(drawn(row_of(x, mask.float()))) != (230, 80, 60)).any(-1).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clinics")
    clinics.make(root)
    return root


@pytest.mark.parametrize("seed", [None, 8])
def test_examples_come_from_the_training_sites_in_turn_spread_over_each(data: Path, seed: int | None) -> None:
    text = clinics.STUDY.replace("PATH", str(data / "all.npz"))
    one = parse(text)
    rows, notes = sample_rows(one, seed=seed, images=5, samples=2)
    assert notes == ["no augmentation is set: samples differ only where patches are random"]
    split = federate(one.data, one.seeds[0] if seed is None else seed)
    assert split.training == ("lyon", "oslo")
    lyon, oslo = (loaded(split.sites[site]["train"]) for site in split.training)
    places = [(lyon, 0), (oslo, 0), (lyon, len(lyon) // 3), (oslo, len(oslo) // 3), (lyon, 2 * len(lyon) // 3)]
    for k, (row, (examples, i)) in enumerate(zip(rows, places, strict=True)):
        name = ("none", "spot")[int(examples.targets[i])]
        assert row.caption == f"{('lyon', 'oslo')[k % 2]}, training image {i + 1}: {name}"
        for x, y in (row.stored, *row.samples):
            assert torch.equal(x, examples.inputs[i])
            assert y == examples.targets[i]
    assert [len(row.samples) for row in sample_rows(one)[0]] == [6] * 4


def test_samples_are_those_of_the_method_that_is_named(data: Path) -> None:
    """Each is drawn anew; the same again for the same seed, others for another seed."""
    text = clinics.STUDY.replace("PATH", str(data / "all.npz"))
    own = text.replace('name = "ditto"', 'name = "ditto"\naugmentation = { rotation = { probability = 1.0 } }')
    plain, _ = sample_rows(parse(own), images=1, samples=3)
    assert all(torch.equal(x, plain[0].stored[0]) for x, _ in plain[0].samples)
    (row,), notes = sample_rows(parse(own), "ditto", images=1, samples=3)
    assert notes == []
    found = [x for x, _ in row.samples]
    assert not any(
        torch.equal(a, b) for a, b in ((found[0], row.stored[0]), (found[0], found[1]), (found[1], found[2]))
    )
    again, other = (sample_rows(parse(own), "ditto", seed, 1, 3)[0][0] for seed in (None, 9))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(row.samples, again.samples, strict=True))
    assert not torch.equal(row.samples[0][0], other.samples[0][0])


def test_patches_of_volumes_are_drawn_at_random_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their captions name no class, and augmentation that is set needs no note."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    write_volumes(tmp_path / "volumes", 9)
    text = STUDY.replace('"volumes"', f'"{tmp_path}/volumes"')
    rows, notes = sample_rows(parse(text), images=3, samples=2)
    assert notes == []
    assert [row.caption for row in rows] == [f"site-{k}, training image 1" for k in (1, 2, 3)]
    for row in rows:
        assert all(x.shape == (1, 16, 16, 16) == (1, *y.shape) for x, y in row.samples)
        assert not torch.equal(row.samples[0][0], row.samples[1][0])


def test_a_table_has_no_pictures(tmp_path: Path) -> None:
    registry(tmp_path)
    text = clinics.STUDY.replace('kind = "npz"', 'kind = "table"\nlabel = "y"\ncategories = ["kind"]')
    text = text.replace("PATH", str(tmp_path / "t.csv")).replace('patient = "patient"\nexternal = ["osaka"]', "")
    text = text.replace('"cnn"', '"mlp"').replace('options = { width = 4, depth = 2, norm = "batch" }', "")
    with pytest.raises(ConfigError, match=r"has no images to look at: its examples have the shape \(6,\)"):
        sample_rows(parse(text))
