"""Building the store: once, resumed where it stopped, and clear when the disk or a file does not allow it."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.cases import case_building, case_file
from polyclinic.data.cases.cases import Cases
from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.paired_folders import Pairs
from polyclinic.data.preprocessing.transforms import Resample, ZScore
from polyclinic.data.sources.folders import Folders
from polyclinic.engines.flare.client import site_data
from polyclinic.engines.site_description import describe
from tests.data.sources.test_folders import nifti, picture

SIZES = [(6, 7, 8), (9, 5, 6), (7, 7, 7), (12, 6, 5)]


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four volumes of whole numbers, of four shapes, with masks; and an empty cache."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        nifti(tmp_path / "images" / f"c{i}.nii.gz", rng.integers(-1000, 1000, size).astype(np.int16))
        mask = rng.integers(0, 3, size).astype(np.uint8)
        nifti(tmp_path / "labels" / f"c{i}.nii.gz", mask)
    return tmp_path


def pairs(root: Path, **options: Any) -> Pairs:
    """The source, seen as patches of 4 x 4 x 4."""
    return Pairs(str(root), patch=options.pop("patch", (4, 4, 4)), **options)


def test_each_image_is_what_the_reader_gives(volumes: Path) -> None:
    """Voxel by voxel, in the axes of the reader, with spacing and mask."""
    source = pairs(volumes)
    cases = source.examples(source.table().ids)
    assert isinstance(cases, Cases)
    for i, expected in enumerate(source.collection.pictures()):
        x, y = cases.whole(i)
        assert expected is not None
        assert expected.mask is not None
        assert torch.equal(x, expected.pixels)
        assert torch.equal(y, expected.mask)
        assert cases.files[i].spacing_mm == expected.spacing_mm == (2.0, 1.0, 1.0)
    assert cases.highest == 2
    assert source.info.classes == ("background", "label 1", "label 2")


def test_unequal_shapes_without_a_patch_are_refused_with_one(volumes: Path) -> None:
    """The message names the key and a value that fits."""
    with pytest.raises(DataError, match=r"images have 4 different shapes .* with patch = \[8, 8, 8\]"):
        Pairs(str(volumes)).examples(["c0"])


def test_a_patch_needs_one_number_per_axis(volumes: Path) -> None:
    """Two numbers for volumes, or nonsense, are refused in their place."""
    with pytest.raises(DataError, match=r"patch = \[4, 4\]: the images of .* have 3 axes: give one number for each"):
        pairs(volumes, patch=(4, 4)).examples(["c0"])
    with pytest.raises(ValueError, match="give 2 or 3 whole numbers"):
        DataSpec.model_validate({"kind": "pairs", "path": str(volumes), "patch": [0, 4, 4]})
    with pytest.raises(ValueError, match=r"has more than 134,217,728 pixels"):
        DataSpec.model_validate({"kind": "pairs", "path": str(volumes), "patch": [32768, 32768, 32768]})
    with pytest.raises(ValueError, match="patch"):
        DataSpec.model_validate({"kind": "table", "path": "x.csv", "label": "y", "patch": [4]})


def test_built_once(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time no image is decoded; other steps, or other bytes, are other files."""
    ids = [f"c{i}" for i in range(4)]
    first = pairs(volumes).examples(ids)
    monkeypatch.setattr(case_file, "write", lambda *_: pytest.fail("built again"))
    again = pairs(volumes).examples(ids)
    assert isinstance(first, Cases)
    assert isinstance(again, Cases)
    assert again.files == first.files
    with pytest.raises(BaseException, match="built again"):
        pairs(volumes, steps=(ZScore(),)).examples(ids)


def test_an_interrupted_building_goes_on_and_a_damaged_file_is_built_again(
    volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in the third file two are kept; of a finished store, only what is damaged is rebuilt."""
    ids, real, count = [f"c{i}" for i in range(4)], case_file.write, [0]

    def failing(path: Path, prepared: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        real(path, prepared)

    monkeypatch.setattr(case_building, "_at_once", lambda _: 1)
    monkeypatch.setattr(case_file, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        pairs(volumes).examples(ids)
    written = []

    def noted(path: Path, prepared: Any) -> None:
        written.append(path)
        real(path, prepared)

    monkeypatch.setattr(case_file, "write", noted)
    whole = pairs(volumes).examples(ids)
    assert 1 <= len(written) <= 2  # the last one may have been under way
    assert isinstance(whole, Cases)
    os.truncate(whole.files[0].path, 100)
    data = bytearray(whole.files[1].path.read_bytes())
    data[-1] ^= 1
    whole.files[1].path.write_bytes(data)
    written.clear()
    repaired = pairs(volumes).examples(ids)
    assert sorted(written) == sorted(file.path for file in whole.files[:2])
    assert isinstance(repaired, Cases)
    assert torch.equal(repaired[torch.arange(4)][0], whole[torch.arange(4)][0])


def test_workers_write_the_same_bytes(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time or four at once."""
    kept = {}
    for count in (1, 4):
        monkeypatch.setenv("POLYCLINIC_CACHE", str(volumes / f"cache-{count}"))
        monkeypatch.setattr(case_building, "_at_once", lambda _, count=count: count)
        cases = pairs(volumes, steps=(Resample(1.5), ZScore())).examples([f"c{i}" for i in range(4)])
        assert isinstance(cases, Cases)
        kept[count] = [file.path.read_bytes() for file in cases.files]
    assert kept[1] == kept[4]


def test_a_full_disk_is_one_line_and_leaves_no_part(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the second case where it can be foreseen, else at the write that fails."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(DataError, match=r"needs about .* more .* its disk has 0 bytes: free some space, or point"):
        pairs(volumes).examples(["c0"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))

    def full(path: Path, prepared: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(case_file, "write", full)
    with pytest.raises(DataError, match=r"cannot write the cache .*No space left on device"):
        pairs(volumes).examples(["c0"])
    assert not list((volumes / "cache").rglob("*.part"))


def test_a_large_case_is_built_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the memory is shared by the cases that are built at once."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert case_building._at_once(memory) == 1
    assert case_building._at_once(1000) == 8


def test_unreadable_files_are_listed_or_left_out(volumes: Path) -> None:
    """As without a patch."""
    (volumes / "images" / "c2.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="c2"):
        pairs(volumes).examples(["c0"])
    source = pairs(volumes, unreadable="skip")
    assert source.table().ids == ("c0", "c1", "c3")
    assert any("1 files were left out" in note for note in source.info.notes)
    assert source.examples(source.table().ids).ids == ("c0", "c1", "c3")


def test_equal_images_share_a_file(volumes: Path) -> None:
    """And are found as duplicates under their own names."""
    for folder in ("images", "labels"):
        shutil.copy(volumes / folder / "c1.nii.gz", volumes / folder / "c9.nii.gz")
    source = pairs(volumes)
    cases = source.examples(["c1", "c9"])
    assert isinstance(cases, Cases)
    assert cases.files[0].path == cases.files[1].path
    assert [file.values.id for file in cases.files] == ["c1", "c9"]
    spec = {"kind": "pairs", "path": str(volumes), "patch": [4, 4, 4], "min_patients": 1, "split": [0.4, 0.2, 0.4]}
    data = federate(DataSpec.model_validate({**spec, "sites": {"partition": "iid", "count": 1}}))
    assert [d.ids for d in data.duplicates] == [("c1", "c9")] or [d.ids for d in data.duplicates] == [("c9", "c1")]


def test_pictures_of_many_shapes_with_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Color pictures of a class folder, of unequal sizes, are examples of one shape, with counts by class."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    for i in range(12):
        picture(tmp_path / "data" / ("a" if i % 2 else "b") / f"p{i}.png", (10 + i, 30 - i), color=True)
    spec = {"kind": "folders", "path": str(tmp_path / "data"), "patch": [8, 8], "min_patients": 1}
    data = federate(DataSpec.model_validate({**spec, "sites": {"partition": "iid", "count": 1}}))
    assert data.shape == (3, 8, 8)
    counts = data.rows[0].roles
    assert sum(sum(role.classes) for role in counts.values()) == 12
    train = data.sites["site-1"]["train"]
    x, y = train[torch.arange(len(train))]
    assert x.shape[1:] == (3, 8, 8)
    assert 0 < float(x.max()) <= 1
    assert set(y.tolist()) == {0, 1}


def test_the_key_changes_the_fingerprint_and_its_absence_does_not(volumes: Path) -> None:
    """A study without it keeps the fingerprint that it had before the key existed."""
    made = {patch: Pairs(str(volumes), patch=patch).fingerprint for patch in [(), (4, 4, 4), (4, 4, 5)]}
    assert len(set(made.values())) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scanners": 0.5}, r"scanners = \.\.\. needs all images in memory"),
        ({"accelerate": 4}, r"accelerate = \.\.\. needs all images in memory"),
        ({"annotations": {"site-1": "labels"}}, r'annotations gives site-1 "labels", which needs all images in memory'),
    ],
)
def test_what_needs_all_images_is_refused_in_one_sentence(volumes: Path, options: dict[str, Any], says: str) -> None:
    """And says what to do."""
    spec = {"kind": "pairs", "path": str(volumes), "patch": [4, 4, 4], "min_patients": 1, "split": [0.5, 0.0, 0.5]}
    with pytest.raises(DataError, match=says):
        federate(DataSpec.model_validate({**spec, "sites": {"partition": "iid", "count": 1}, **options}))


def test_images_that_cannot_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gray and color among each other, as without a patch."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    picture(tmp_path / "data" / "a" / "1.png", (9, 9), color=True)
    picture(tmp_path / "data" / "b" / "2.png", (9, 8))
    with pytest.raises(DataError, match="have 1 and 3 channels"):
        Folders(str(tmp_path / "data"), patch=(8, 8)).examples(["a/1.png"])


def test_evaluation_sees_the_original_grid(volumes: Path) -> None:
    """After a resampling, the stored mask is coarser, and the case holds the file's own mask and the way back."""
    source = pairs(volumes, steps=(Resample(2.0),))
    cases = source.examples(["c0", "c3"])
    assert isinstance(cases, Cases)
    originals = dict(zip(source.table().ids, source.collection.pictures(), strict=True))
    for i, name in enumerate(cases.ids):
        case, original = cases.case(i), originals[name]
        assert original is not None
        assert original.mask is not None
        assert torch.equal(case.truth, original.mask)
        assert case.truth_on_grid.shape == case.inputs.shape[1:] != case.truth.shape
        assert case.spacing_mm == (2.0, 1.0, 1.0)
        assert case.grid_spacing_mm is not None
        scores = torch.nn.functional.one_hot(case.truth_on_grid, 3).movedim(-1, 0).float()
        assert case.labels(scores).shape == case.truth.shape
    assert cases.measured
    assert cases.unlabeled().measured is None
    same = pairs(volumes).examples(["c0"])
    assert isinstance(same, Cases)
    assert same.files[0].truth is None
    assert torch.equal(same.case(0).truth, same.case(0).truth_on_grid)


def test_a_structure_that_vanishes_on_the_coarse_grid_is_never_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label of the original mask without a stored voxel has no positions."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:8, 2:8, 2:8], mask[10, 10, 10] = 1, 2
    nifti(tmp_path / "images" / "c.nii", np.random.default_rng(0).normal(size=mask.shape).astype(np.float32))
    nifti(tmp_path / "labels" / "c.nii", mask)
    cases = pairs(tmp_path, steps=(Resample(4.0),), classes=("background", "large", "small")).examples(["c"])
    assert isinstance(cases, Cases)
    assert cases.files[0].labels == (0, 1, 2)
    assert set(cases.files[0].places) == {1}
    for seed in range(20):
        cases.draw(0, torch.Generator().manual_seed(seed), True, (4, 4, 4))


def test_a_study_sets_the_patch_at_a_hospital(volumes: Path) -> None:
    """The hospital names its files, the study the steps and the patch; only a patch of that shape can be used."""
    (volumes / "data.toml").write_text('kind = "pairs"\npath = "."\nmin_patients = 1\nsplit = [0.5, 0.25, 0.25]\n')
    found = site_data.read(volumes, {"patch": [4, 4, 4], "steps": [{"step": "zscore"}]})
    assert found.classes == ("background", "label 1", "label 2")
    assert {examples.shape for examples in found.roles.values()} == {(1, 4, 4, 4)}
    assert sum(len(examples) for examples in found.roles.values()) == 4
    description = describe(found.roles, "segmentation", found.classes)
    assert (description["inputs"], description["outputs"]) == ([1, 4, 4, 4], 3)
