"""Which values of masks are classes, and how masks of several channels become one label per voxel."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from polyclinic.data.annotations import boxes
from polyclinic.data.examples import DataError
from polyclinic.data.formats.mask_labels import IGNORED, black_and_white, label_problems, labels_in, single_map
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.volume import as_mask
from polyclinic.data.paired_folders import Pairs, label_names, label_regions
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import Relabel
from polyclinic.data.quality.folder_layout import detect
from polyclinic.data.quality.site_check import check_folder
from tests.support.data_sets import loaded


@pytest.mark.parametrize(
    ("found", "declared", "problem"),
    [
        ([{0, 1}, {0}, {0, 1}], None, ""),
        ([{0, 1, 2}, {0, 1, 2}, {0}], None, ""),
        ([{0, 1, 2}, {0, 1}], None, "labels that are not in every mask may be stray values: 2 (in 1 of 2 masks)"),
        ([{0, 1, 2}, {0, 1}], (0, 1, 2), ""),
        ([{0, 1, 2}, {0, 1}], (0, 1), "not declared as labels: 2 (in 1 of 2 masks). Declared are 0, 1"),
        ([{0, 255}, {0}], None, ""),
        ([{0, 255}, {0, 255}], (0, 1), ""),
        ([{0, 255}, {0, 1}], None, "with 255 and others with other numbers: 1 (in 1 of 2 masks), 255 (in 1)"),
        ([{0, 128, 255}, {0, 255}], None, "not 0, 1, 2, ...: 128 (in 1 of 2 masks), 255 (in 2)"),
        ([{0, 255}, {0, 1}], (0, 1), "255 (in 1 of 2 masks)"),
        ([{0, 2}, {0, 2}], None, "not 0, 1, 2, ...: 2 (in 2 of 2 masks)"),
        ([set(range(26)), {0, 1}], None, "and 16 more values"),
        ([{0, 1, IGNORED}, {0, 1}], None, ""),
        ([{0, 1, IGNORED}, {0, 1}], (0, 1), ""),
    ],
)
def test_stray_values_are_counted(found: list[set[int]], declared: tuple[int, ...] | None, problem: str) -> None:
    said = label_problems({str(i): labels for i, labels in enumerate(found)}, declared)
    assert bool(said) == bool(problem)
    assert problem in "".join(said)


def test_black_and_white_masks_are_zero_and_one() -> None:
    assert black_and_white({"a": {0, 255}, "b": {0}})
    assert not black_and_white({"a": {0, 255}, "b": {0, 1}})
    assert not black_and_white({"a": {0, 255}}, range(256))


def test_values_of_a_mask() -> None:
    assert labels_in(torch.tensor([[3, 0], [IGNORED, 3]])) == (IGNORED, 0, 3)
    assert labels_in(torch.tensor([[0, 0]], dtype=torch.int16)) == (0,)


def test_labels_that_a_slope_scaled_are_rounded_and_fractions_refused() -> None:
    scaled = np.array([[0, 255]]) * float(np.float32(1 / 255))
    assert scaled[0, 1] != 1
    assert as_mask("m.nii", scaled).tolist() == [[0, 1]]
    with pytest.raises(Unreadable, match="not whole numbers"):
        as_mask("m.nii", np.array([[0.0, 0.999]]))


def test_channels_become_one_label_as_declared() -> None:
    whole = torch.tensor([1, 1, 1, 0]).reshape(1, 1, 4)
    core = torch.tensor([0, 1, 1, 0]).reshape(1, 1, 4)
    nested = torch.stack([whole, core])
    assert single_map("m.nii", nested, (1, 2)).flatten().tolist() == [1, 2, 2, 0]
    assert single_map("m.nii", nested, (2, 1)).flatten().tolist() == [2, 1, 1, 0]
    one_hot = torch.stack([1 - whole, whole])
    assert single_map("m.nii", one_hot, (0, 5)).flatten().tolist() == [5, 5, 5, 0]
    assert torch.equal(single_map("m.nii", whole[None], ()), whole)
    for channels, regions, reason in (
        (nested, (), r"overlapping regions: state the label of each with regions = \[1, 2\]"),
        (one_hot, (), r"one-hot regions: state the label of each with regions = \[0, 1\]"),
        (nested * 3, (), "numbers other than 0 and 1: save one label map"),
        (nested, (1, 2, 3), "2 channels, and regions names 3"),
        (nested, (0, 1), "not a one-hot mask"),
        (nested * 3, (1, 2), "other values than 0 and 1"),
    ):
        with pytest.raises(Unreadable, match=reason):
            single_map("m.nii", channels, regions)


def test_names_of_labels_in_both_formats() -> None:
    assert label_names({"0": "background", "1": "liver"}) == {0: "background", 1: "liver"}
    new = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    assert label_names(new) == {0: "background", 1: "whole", 2: "core", 3: "enhancing", 4: "ignore"}


def test_regions_of_labels_in_their_order() -> None:
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    assert label_regions(regions) == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert label_regions({"background": 0, "liver": 1, "tumor": [2]}) == {}
    assert label_regions({"0": "background", "1": "liver"}) == {}


def ignoring(root: Path) -> Path:
    for i in range(3):
        mask = np.zeros((4, 5, 6), np.uint8)
        mask[1, 1:3], mask[3] = 1, 2
        for folder, data in (("imagesTr", np.full((4, 5, 6), i, np.int16)), ("labelsTr", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            name = f"c{i}_0000.nii" if folder == "imagesTr" else f"c{i}.nii"
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), root / folder / name)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "tumor": 1, "ignore": 2}}))
    return root


def test_nnunets_ignore_is_no_class(tmp_path: Path) -> None:
    source = Pairs(path=str(ignoring(tmp_path)))
    assert source.info.classes == ("background", "tumor")
    targets = loaded(source.examples(source.table().ids)).targets
    assert set(targets.unique().tolist()) == {0, 1, IGNORED}
    assert int((targets == IGNORED).sum()) == 3 * 30
    assert check_folder(tmp_path).ok
    assert set(boxes(targets).unique().tolist()) == {0, 1}
    (tmp_path / "dataset.json").unlink()
    by_hand = Pairs(path=str(tmp_path), ignore=2)
    assert by_hand.info.classes == ("background", "label 1")
    assert torch.equal(loaded(by_hand.examples(by_hand.table().ids)).targets, targets)


def test_relabel_declares_labels_and_keeps_what_is_ignored() -> None:
    mask = torch.tensor([[0, 4, IGNORED]])
    made = Relabel(values=(0, 4))(Picture(torch.zeros(1, 1, 3), mask)).mask
    assert made is not None
    assert made.tolist() == [[0, 1, IGNORED]]


@pytest.mark.parametrize(
    "labels", ['{"a": 1e400}', '{"a": {}}', '{"a": "x"}', '{"a": [1, [2]]}', '{"a": [1, 1e400]}', '{"²": 1}', "[1]"]
)
def test_strange_labels_are_refused_with_the_file_and_what_to_do(labels: str, tmp_path: Path) -> None:
    root = ignoring(tmp_path)
    (root / "dataset.json").write_text(f'{{"labels": {labels}}}')
    with pytest.raises(DataError, match=r"dataset\.json: is not nnU-Net's dataset\.json; correct it or remove it"):
        Pairs(str(root)).table()
    assert any("dataset.json cannot be read" in problem for problem in detect(root).problems)
