"""DICOM trees and BIDS folders as sources: the contract, the labels, the sites."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from polyclinic.data.deidentification.folder_deidentification import deidentify_folder
from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.sources.bids_images import BidsImages
from polyclinic.data.sources.dicom_images import DicomImages
from tests.support.data_sets import data_spec, loaded
from tests.support.image_files import image, save, series

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))


def bids(root: Path, count: int = 6) -> Path:
    rows = ["participant_id\tdiagnosis\tage\tscanner"]
    for i in range(count):
        for suffix in ("T1w", "FLAIR"):
            data = np.full((4, 5, 6), i * 10 + len(suffix), np.int16)
            path = root / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_{suffix}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.0, 1, 1, 1])), path)
        mask = root / "derivatives" / "seg" / f"sub-{i:02d}" / f"sub-{i:02d}_desc-lesion_mask.nii.gz"
        mask.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image((data > 30).astype(np.uint8), np.diag([-1.0, 1, 1, 1])), mask)
        rows.append(f"sub-{i:02d}\t{'ad' if i % 2 else 'hc'}\t{60 + i}\t{'north' if i < 3 else 'south'}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_bids_gives_classes_sites_and_channels(tmp_path: Path) -> None:
    source = BidsImages(str(bids(tmp_path / "b")), ("T1w", "FLAIR"), label="diagnosis")
    table = source.table()
    assert table.patients == tuple(f"sub-{i:02d}" for i in range(6))
    assert table.sites == ("scanner",)
    assert table.columns["scanner"] == ("north",) * 3 + ("south",) * 3
    assert source.info.classes == ("ad", "hc")
    examples = loaded(source.examples(table.ids))
    assert examples.inputs.shape == (6, 2, 6, 5, 4)
    assert examples.targets.tolist() == [1, 0, 1, 0, 1, 0]
    assert examples.inputs[2, :, 0, 0, 0].tolist() == [23, 25]
    age = BidsImages(str(tmp_path / "b"), label="age", regression=True)
    assert loaded(age.examples(age.table().ids[:2])).targets.tolist() == [[60], [61]]
    assert age.fingerprint != source.fingerprint


def test_bids_with_masks_is_segmentation(tmp_path: Path) -> None:
    source = BidsImages(str(bids(tmp_path / "b")))
    examples = loaded(source.examples(source.table().ids))
    assert source.info.task == "segmentation"
    assert [int(m.max()) for m in examples.targets] == [0, 0, 0, 1, 1, 1]


def test_bids_says_what_is_missing_together(tmp_path: Path) -> None:
    root = bids(tmp_path / "b")
    with pytest.raises(DataError) as problem:
        BidsImages(str(root), ("T2w",), label="outcome", site="hospital").table()
    assert len(problem.value.problems) == 2
    assert "diagnosis, age, scanner" in str(problem.value)
    with pytest.raises(DataError, match="there are FLAIR, T1w"):
        BidsImages(str(root), ("T2w",), label="age").table()


def tree(root: Path, count: int = 4) -> list[str]:
    lines = ["patient,label,hospital"]
    for i in range(count):
        who = f"MRN77{i:04d}"
        volume = RNG.integers(0, 99, (3, 8, 8)).astype(np.int16)
        maker = "Acme" if i < 2 else "Apex"
        series(root / f"study{i}" / "axial", volume + i, PatientID=who, PatientName="Doe^Jane", Manufacturer=maker)
        series(root / f"study{i}" / "scout", volume[:1], PatientID=who, PatientName="Doe^Jane", Manufacturer=maker)
        lines.append(f"{who},{'sick' if i % 2 else 'well'},{'north' if i < 2 else 'south'}")
    return lines


def test_dicom_gives_a_volume_per_series_labels_by_patient_and_scanners(tmp_path: Path) -> None:
    lines = tree(tmp_path / "d")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    source = DicomImages(str(tmp_path / "d"), str(tmp_path / "labels.csv"), slices=2)
    table = source.table()
    assert table.ids == tuple(f"study{i}/axial" for i in range(4))
    assert table.columns["scanner"] == ("Acme", "Acme", "Apex", "Apex")
    assert len(set(table.patients)) == 4
    examples = loaded(source.examples(table.ids))
    assert examples.inputs.shape == (4, 1, 3, 8, 8)
    assert examples.targets.tolist() == [1, 0, 1, 0]
    assert examples.inputs.dtype == torch.float32
    assert "MRN77" not in repr(table) + repr(examples.patients)
    north = DicomImages(str(tmp_path / "d"), str(tmp_path / "labels.csv"), slices=2, site="hospital")
    assert north.table().sites == ("hospital", "scanner")


def test_a_deidentified_tree_is_read_with_the_pseudonyms_of_its_key(tmp_path: Path) -> None:
    pytest.importorskip("dicomanonymizer", reason="needs the dicom extra")
    lines = tree(tmp_path / "d")
    deidentify_folder(tmp_path / "d", tmp_path / "clean", tmp_path / "key.json")
    patients = json.loads((tmp_path / "key.json").read_text())["patients"]
    label = {line.split(",")[0]: line.split(",")[1] for line in lines[1:]}
    (tmp_path / "labels.csv").write_text(
        "\n".join(["patient,label", *(f"{pseudonym},{label[who]}" for pseudonym, who in patients.items())])
    )
    clean = DicomImages(str(tmp_path / "clean"), str(tmp_path / "labels.csv"), slices=2)
    (tmp_path / "raw.csv").write_text("\n".join(lines))
    raw = DicomImages(str(tmp_path / "d"), str(tmp_path / "raw.csv"), slices=2)
    a, b = (loaded(s.examples(s.table().ids)) for s in (clean, raw))
    assert sorted(map(float, a.inputs.mean((1, 2, 3, 4)))) == sorted(map(float, b.inputs.mean((1, 2, 3, 4))))
    assert sorted(a.targets.tolist()) == sorted(b.targets.tolist())


def test_dicom_says_what_stands_in_the_way(tmp_path: Path) -> None:
    lines = tree(tmp_path / "d", 2)
    (tmp_path / "labels.csv").write_text("\n".join([*lines, lines[1]]))
    extra = image(np.zeros((8, 8), np.int16), PatientID="MRN770000")
    save(extra, tmp_path / "d" / "study0" / "axial" / "other.dcm")
    (tmp_path / "d" / "study1" / "axial" / "bad.dcm").write_bytes(b"no")
    with pytest.raises(DataError) as problem:
        DicomImages(str(tmp_path / "d"), str(tmp_path / "labels.csv")).table()
    text = str(problem.value)
    assert "1 patients have more than one row" in text
    assert "bad.dcm: is not a DICOM file" in text
    assert "share a folder" not in text  # headers distinguish the series
    with pytest.raises(DataError, match="no column 'outcome'"):
        DicomImages(str(tmp_path / "d"), str(tmp_path / "labels.csv"), label="outcome").table()


def test_a_study_names_them_by_kind(tmp_path: Path) -> None:
    spec = data_spec(
        path=str(bids(tmp_path / "b", 12)), kind="bids", label="diagnosis", min_patients=2, split=(0.4, 0.2, 0.4)
    )
    assert sorted(federate(spec).sites) == ["north", "south"]
    (tmp_path / "labels.csv").write_text("\n".join(tree(tmp_path / "d", 12)))
    table = str(tmp_path / "labels.csv")
    own: dict[str, Any] = {"labels": table, "site": "hospital", "slices": 2}
    spec = DataSpec(path=str(tmp_path / "d"), kind="dicom", min_patients=2, split=(0.4, 0.2, 0.4), **own)
    federated = federate(spec)
    assert [sum(r.patients for r in row.roles.values()) for row in federated.rows] == [2, 10]
    assert federated.info.modality == "CT"


def test_times_to_an_event_are_labels_of_bids_and_dicom(tmp_path: Path) -> None:
    root = bids(tmp_path / "b")
    lines = (root / "participants.tsv").read_text().splitlines()
    times = ["days\tdied", "100\t1", "200\t0", "150\tyes", "90\tno", "80\t1", "n/a\t0"]
    (root / "participants.tsv").write_text("\n".join(f"{a}\t{b}" for a, b in zip(lines, times, strict=True)) + "\n")
    codes: dict[str, Any] = {"event_codes": ("1", "yes"), "censored_codes": ("0", "no")}
    source = BidsImages(str(root), label="days", event="died", missing_labels="drop", **codes)
    assert source.info.task == "survival"
    examples = loaded(source.examples(source.table().ids))
    assert examples.targets.tolist() == [[100, 1], [200, 0], [150, 1], [90, 0], [80, 1]]
    assert not {"days", "died"} & source.table().columns.keys()
    assert any("1 visits whose days or died is missing" in note for note in source.info.notes)
    with pytest.raises(DataError, match="without a days"):
        BidsImages(str(root), label="days", event="died", **codes).table()
    with pytest.raises(DataError, match="deceased"):
        BidsImages(str(root), label="days", event="deceased").table()
    tree = tmp_path / "d"
    for i in range(3):
        series(tree / f"s{i}", RNG.integers(0, 9, (2, 4, 4)).astype(np.int16), PatientID=f"P{i}")
    (tmp_path / "l.csv").write_text("patient,days,died,hospital\nP0,10,1,x\nP1,20,0,x\nP2,,1,y\n")
    follow = DicomImages(
        str(tree), str(tmp_path / "l.csv"), label="days", event="died", site="hospital", missing_labels="drop"
    )
    assert follow.info.task == "survival"
    assert follow.table().columns["hospital"] == ("x", "x")
    assert loaded(follow.examples(follow.table().ids)).targets.tolist() == [[10, 1], [20, 0]]
    with pytest.raises(DataError, match="without a days"):
        DicomImages(str(tree), str(tmp_path / "l.csv"), label="days", event="died").table()
    with pytest.raises(DataError, match="gone"):
        DicomImages(str(tree), str(tmp_path / "l.csv"), label="days", event="gone").table()
