"""Archives: MedMNIST's layout and plain ones come out as they went in; what is wrong is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.examples import DataError
from polyclinic.data.sources.npz import Npz

DICE = np.random.default_rng(0)


def medmnist(path: Path, shape: tuple[int, ...] = (8, 8), labels: int = 1, **change: Any) -> str:
    """An archive of MedMNIST's layout: 6, 2 and 3 images."""
    arrays: dict[str, Any] = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = DICE.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = DICE.integers(0, 2, (n, labels), dtype=np.uint8)
    arrays |= change
    np.savez(path / "med.npz", **{k: v for k, v in arrays.items() if v is not None})
    return str(path / "med.npz")


@pytest.mark.parametrize(("shape", "out"), [((8, 8), (1, 8, 8)), ((8, 8, 3), (3, 8, 8)), ((8, 8, 8), (1, 8, 8, 8))])
def test_medmnist_comes_out_as_it_is(tmp_path: Path, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Gray, color and 3-D; bytes stay bytes; the official split is a column; labels are classes."""
    path = medmnist(tmp_path, shape)
    raw = np.load(path)
    source = Npz(path)
    table = source.table()
    assert table.columns["split"] == ("train",) * 6 + ("val",) * 2 + ("test",) * 3
    examples = source.examples(table.ids[6:8])
    assert examples.shape == out
    assert examples.inputs.dtype == torch.uint8
    expected = raw["val_images"] if len(shape) != 3 or shape[-1] != 3 else np.moveaxis(raw["val_images"], -1, 1)
    assert np.array_equal(examples.inputs.numpy().reshape(expected.shape), expected)
    assert examples.targets.tolist() == raw["val_labels"][:, 0].tolist()
    assert source.info.task == "classification"
    assert any("names no patients" in note for note in source.info.notes)


def test_several_labels_and_numbers(tmp_path: Path) -> None:
    """[n, L] labels are multi-label; with regression they are numbers [n, 1]."""
    path = medmnist(tmp_path, labels=14)
    source = Npz(path)
    assert source.info.task == "multilabel"
    assert len(source.info.classes) == 14
    examples = source.examples(source.table().ids)
    assert examples.targets.shape == (11, 14)
    assert examples.targets.dtype == torch.float32
    ages = Npz(medmnist(tmp_path), regression=True)
    assert ages.info.task == "regression"
    assert ages.examples(ages.table().ids[:3]).targets.shape == (3, 1)
    assert ages.table().labels.dtype == np.float32  # type: ignore[union-attr]


def plain(path: Path, **arrays: Any) -> str:
    """Ten images of two sites, five patients named by eye."""
    usual = {
        "images": DICE.integers(0, 256, (10, 6, 6, 3), dtype=np.uint8),
        "masks": DICE.integers(0, 2, (10, 6, 6), dtype=np.uint8),
        "site": np.array(["A", "B"] * 5),
        "name": np.array([f"case{i // 2}{'LR'[i % 2]}" for i in range(10)]),
        "who": np.array([f"p{i // 2}" for i in range(10)]),
    }
    np.savez(path / "plain.npz", **{k: v for k, v in (usual | arrays).items() if v is not None})
    return str(path / "plain.npz")


def test_masks_sites_and_patients(tmp_path: Path) -> None:
    """Masks are targets; ``site`` names sites; patients by an array or by a pattern in the name, which agree."""
    path = plain(tmp_path)
    source = Npz(path, patient_pattern=r"case(\d+)[LR]")
    table = source.table()
    assert source.info.task == "segmentation"
    assert table.labels is None
    assert table.sites == ("site",)
    assert table.patients == tuple(str(i // 2) for i in range(10))
    assert not any("names no patients" in note for note in source.info.notes)
    assert [p[1:] for p in Npz(path, patient="who").table().patients] == list(table.patients)
    x, y = source.examples(table.ids)[torch.tensor([3])]
    raw = np.load(path)
    assert x.shape == (1, 3, 6, 6)
    assert np.array_equal(y[0].numpy(), raw["masks"][3])


def test_steps_apply_to_images_and_masks(tmp_path: Path) -> None:
    """Crop both; scale the image only."""
    from polyclinic.data.preprocessing.transforms import CropPad, ZScore

    path = plain(tmp_path)
    source = Npz(path, steps=(CropPad(4), ZScore()))
    examples = source.examples(source.table().ids)
    raw = np.load(path)
    assert np.array_equal(examples.targets.numpy(), raw["masks"][:, 1:5, 1:5])
    assert examples.shape == (3, 4, 4)
    assert float(examples.inputs.mean(dim=(2, 3)).abs().max()) < 1e-5


def test_zero_and_one_are_black_and_white(tmp_path: Path) -> None:
    """Images that are masks come out as 0 and 1, not as 0 and 1/255."""
    source = Npz(plain(tmp_path, images=DICE.integers(0, 2, (10, 6, 6), dtype=np.uint8)))
    x, _ = source.examples(source.table().ids)[torch.arange(10)]
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_the_fingerprint_is_of_content_and_options_not_of_the_place(tmp_path: Path) -> None:
    """A copy in another place has the same fingerprint; another byte or option changes it."""
    path = plain(tmp_path)
    (tmp_path / "else").mkdir()
    copy = tmp_path / "else" / "other.npz"
    copy.write_bytes(Path(path).read_bytes())
    assert Npz(path).fingerprint == Npz(str(copy)).fingerprint
    assert Npz(path).fingerprint != Npz(path, patient="who").fingerprint
    first = Npz(path).fingerprint
    assert first != Npz(plain(tmp_path)).fingerprint  # drawn anew


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"masks": None}, "name its arrays with images = ... and target = ..."),
        ({"images": np.zeros((9, 6, 6), np.uint8)}, "9 images and 10 targets"),
        ({"images": np.zeros((10, 6), np.uint8)}, "must be numbers of shape"),
        ({"images": np.zeros((0, 6, 6), np.uint8), "masks": np.zeros((0, 6, 6), np.uint8)}, "holds no images"),
        ({"images": np.array([{}] * 10)}, "holds Python objects, which are never loaded"),
        ({"masks": None, "labels": np.full(10, 0.5)}, "labels are not whole numbers; set regression = true"),
        ({"masks": None, "labels": np.full(10, -1)}, "number the classes from 0"),
        ({"masks": None, "labels": np.array(["a"] * 10)}, "not numbers"),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    """Missing, unequal, no images, objects, labels that are none."""
    with pytest.raises(DataError, match=says):
        Npz(plain(tmp_path, **arrays)).table()


def test_other_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no variable, no archive, no such array, no group in the pattern, too large."""
    with pytest.raises(DataError, match="there is nothing at"):
        Npz(str(tmp_path / "none.npz")).table()
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(DataError, match="the environment variable NOT_SET is not set"):
        Npz("$NOT_SET/x.npz").table()
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"x\.npz"):
        Npz(str(tmp_path / "x.npz")).table()
    with pytest.raises(DataError, match="has no array 'ward'"):
        Npz(plain(tmp_path), sites=("ward",)).table()
    with pytest.raises(DataError, match="needs exactly one group"):
        Npz("x", patient_pattern="case")
    with pytest.raises(DataError, match="limit"):
        Npz(plain(tmp_path), gigabytes=1e-7).table()
    with pytest.raises(DataError, match="train_labels"):
        Npz(medmnist(tmp_path, train_labels=None)).table()
