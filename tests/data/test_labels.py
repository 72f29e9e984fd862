"""One parser of labels for all sources: missing is missing, numbers are numbers, and nothing else is a class."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.examples import DataError, Examples
from polyclinic.data.labels import Reading
from polyclinic.data.path_patterns import Patterns
from polyclinic.data.source import Source, Table
from polyclinic.data.sources.bids_images import BidsImages
from polyclinic.data.sources.dicom_images import DicomImages
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from polyclinic.data.sources.npz import Npz
from tests.support.image_files import series
from tests.support.known import known

RNG = np.random.default_rng(0)


def read(words: list[str], task: Any = "classification", **rules: Any) -> tuple[list[Any], tuple[str, ...], list[str]]:
    problems: list[str] = []
    targets, classes = Reading(**rules).read({"label": words}, task, problems)
    return list(targets), classes, problems


@pytest.mark.parametrize("word", ["", " ", "NA", "nan", "NaN", "#N/A", "NULL", "n/a", "<NA>", "?", "None", "#DIV/0!"])
def test_a_missing_value_is_no_class_and_no_number(word: str) -> None:
    _, classes, problems = read(["a", word, "b"])
    assert classes == ("a", "b")
    assert len(problems) == 1
    assert "1 row without a label (row 3" in problems[0]
    assert 'missing_labels = "drop"' in problems[0]
    assert "1 row without a label (row 3" in read(["1", word], "regression")[2][0]
    assert Reading().unlabeled({"label": ["a", word, "b"]}) == [1]


def test_a_word_that_classes_lists_is_a_class() -> None:
    assert read(["EU", "NA"], classes=("EU", "NA")) == ([0, 1], ("EU", "NA"), [])
    assert read(["None", "a|b"], "multilabel", separator="|", nothing="None") == ([(0, 0), (1, 1)], ("a", "b"), [])


def test_numbers_are_numbers() -> None:
    assert read(["0", "0.0", "1", "1.0", "10", "2", ".5", "0.50"]) == (
        [0, 0, 2, 2, 4, 3, 1, 1],
        ("0", "0.5", "1", "2", "10"),
        [],
    )
    assert read(["1.0", "0"], classes=("0", "1")) == ([1, 0], ("0", "1"), [])
    assert "1 row with an infinite label (row 3: 'inf')" in read(["1", "inf"])[2][0]
    for word in ("inf", "-inf", "1e999", "1_0", "abc"):
        assert "1 row with no number in label (row 3" in read(["1", word], "regression")[2][0]
    assert read(["2", "1"], classes=("low", "high"), renamed=True) == ([1, 0], ("low", "high"), [])
    assert read(["2", "1"], classes=("low", "high"))[2]
    assert read(["x", "y"], classes=("low", "high"), renamed=True)[2]  # words are not renamed by their order


def test_text_is_compared_in_one_form_and_near_equal_names_are_a_question() -> None:
    composed, decomposed = "bösartig", unicodedata.normalize("NFD", "bösartig")
    assert composed != decomposed
    assert read([composed, decomposed + " ", "gut"])[:2] == ([0, 0, 1], (composed, "gut"))
    assert not read([composed, decomposed, "gut"])[2]
    _, _, problems = read(["Benign", "benign", "benign", "no_tumor"])
    assert len(problems) == 1
    assert "'Benign' (1) and 'benign' (2)" in problems[0]
    assert 'classes = ["Benign", ...]' in problems[0]
    words = ["Benign", "benign", "Malignant"]
    assert read(words, classes=("benign", "malignant")) == ([0, 0, 1], ("benign", "malignant"), [])
    assert read(words[:2], classes=("benign", "Benign")) == ([1, 0], ("benign", "Benign"), [])
    assert not read(["HER2+", "HER2-", "+", "-"])[2]


def test_several_labels_are_0_to_1() -> None:
    problems: list[str] = []
    columns = {"a": ["1", "", "-1", "0.5"], "b": ["0", "1", "x", "2"]}
    Reading().read(columns, "multilabel", problems)
    assert [p.split(" (")[0] for p in problems] == [
        "1 row without a a",
        "1 row with a a that is not 0 to 1",
        "1 row with no number in b",
        "1 row with a b that is not 0 to 1",
    ]
    assert "uncertain = ..." in problems[1]
    two = Reading(blank=0.0, uncertain=1.0).read({"a": ["1", "NA", "-1"], "b": ["0", "0", "0"]}, "multilabel", [])
    assert two == ([(1, 0), (0, 0), (1, 0)], ("a", "b"))


def png(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (8, 8)).astype(np.uint8) | np.uint8(i % 2)).save(path)


def manifest(root: Path, words: list[str], **options: Any) -> Source:
    for i in range(len(words)):
        png(root / f"{i}.png", i)
    rows = [f"{i}.png,{word},p{i}" for i, word in enumerate(words)]
    (root / "m.csv").write_text("\n".join(["path,label,patient", *rows]), encoding="utf-8")
    return Manifest(str(root / "m.csv"), **options)


def table(root: Path, words: list[str], **options: Any) -> Source:
    rows = [f"{i},{word},p{i}" for i, word in enumerate(words)]
    (root / "t.csv").write_text("\n".join(["x,label,patient", *rows]), encoding="utf-8")
    return FeatureTable(str(root / "t.csv"), "label", patient="patient", **options)


def bids(root: Path, words: list[str], **options: Any) -> Source:
    for i in range(len(words)):
        path = root / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(RNG.integers(0, 99, (4, 4, 4)).astype(np.int16), np.eye(4)), path)
    rows = [f"sub-{i:02d}\t{word}" for i, word in enumerate(words)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tlabel", *rows]), encoding="utf-8")
    return BidsImages(str(root), label="label", **options)


def dicom(root: Path, words: list[str], **options: Any) -> Source:
    for i in range(len(words)):
        series(root / f"d/{i}", RNG.integers(0, 99, (2, 8, 8)).astype(np.int16), PatientID=f"p{i}")
    rows = [f"p{i},{word}" for i, word in enumerate(words)]
    (root / "labels.csv").write_text("\n".join(["patient,label", *rows]), encoding="utf-8")
    return DicomImages(str(root / "d"), str(root / "labels.csv"), **options)


MAKERS = {"manifest": manifest, "table": table, "bids": bids, "dicom": dicom}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_reads_labels_alike(kind: str, tmp_path: Path) -> None:
    make: Callable[..., Source] = MAKERS[kind]
    for folder in ("one", "two", "three", "four", "five"):
        (tmp_path / folder).mkdir()
    words = ["0", "1.0", "0.0", "1"]
    found = make(tmp_path / "one", words).table()
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"2 rows without a label .*'NA'.*'#N/A'"):
        make(tmp_path / "two", ["a", "NA", "b", "#N/A"]).table()
    dropped = make(tmp_path / "three", ["a", "NA", "b", "#N/A"], missing_labels="drop")
    assert dropped.info.classes == ("a", "b")
    assert len(dropped.table()) == 2
    assert any("2" in note and "left out" in note.lower() for note in dropped.info.notes)
    with pytest.raises(DataError, match="differ only in case"):
        make(tmp_path / "four", ["Benign", "benign", "b", "b"]).table()
    with pytest.raises(
        DataError, match=r"(1 row without a label .*'nan'|1 row with no number in label .*'inf')"
    ) as error:
        make(tmp_path / "five", ["50", "nan", "inf", "61"], regression=True).table()
    assert len(error.value.problems) == 2


def test_folders_and_patterns_read_class_names_alike(tmp_path: Path) -> None:
    for i, name in enumerate(("bösartig", unicodedata.normalize("NFD", "bösartig"), "gutartig")):
        png(tmp_path / "a" / f"s{i}" / name / f"{i}.png", i)
    for source in (
        Folders(str(tmp_path / "a"), ("site", "class")),
        Patterns(str(tmp_path / "a"), ("{site}/{class}/{name}.png",)),
    ):
        assert source.info.classes == ("bösartig", "gutartig")
        assert [e.label for e in source.collection.entries] == [0, 0, 1]
    png(tmp_path / "b" / "Normal" / "0.png", 0)
    png(tmp_path / "b" / "normal" / "1.png", 1)
    for kind in (
        lambda **o: Folders(str(tmp_path / "b"), **o),
        lambda **o: Patterns(str(tmp_path / "b"), ("{class}/{n}.png",), **o),
    ):
        with pytest.raises(DataError, match="differ only in case"):
            kind().table()
        assert known(kind(classes=("normal", "x")).table().labels).tolist() == [0, 0]


def test_an_archive_with_labels_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    images = RNG.integers(0, 255, (4, 8, 8)).astype(np.uint8)
    for bad in (np.nan, np.inf):
        np.savez(tmp_path / "a.npz", images=images, labels=np.array([1.0, bad, 2.0, 3.0]), name=np.array(list("abcd")))
        with pytest.raises(DataError, match=r"1 of 4 labels are NaN or infinite \(b\)"):
            Npz(str(tmp_path / "a.npz"), regression=True).table()


def test_targets_are_finite_or_all_withheld() -> None:
    x, ids = torch.zeros(3, 2), ("a", "b", "c")
    with pytest.raises(DataError, match=r"1 of 3 labels are NaN or infinite \(b\)"):
        Table(ids, ids, np.array([[1.0], [np.nan], [2.0]], dtype=np.float32))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"1 of 3 targets are NaN or infinite \(c\)"):
            Examples(x, torch.tensor([[1.0], [2.0], [bad]]), ids, ids)
    whole = Examples(x, torch.tensor([[1.0], [2.0], [3.0]]), ids, ids)
    assert torch.isnan(whole.unlabeled().targets).all()
