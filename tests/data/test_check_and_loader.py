"""The data check, a study's source and ``polyclinic new`` agree on every layout: examples, patients, sites, classes."""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.formats.bids import read_bids
from polyclinic.data.quality.recognition import recognize
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.bids_images import BidsImages
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from polyclinic.data.sources.tabular_files import read_rows
from polyclinic.studies.config import study_config
from polyclinic.studies.config.new_study import new_study, study_name
from tests.support.image_files import series


def png(path: Path, i: int, shape: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 255, shape).astype(np.uint8)).save(path)


def nifti(path: Path, i: int, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(i).integers(0, 900, (8, 8, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image((data > 450).astype(np.uint8) if mask else data, np.eye(4)), path)


def mask(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.zeros((16, 16), np.uint8)
    drawn[2 : 5 + i % 4, 3:9] = 255
    Image.fromarray(drawn).save(path)


def folders(root: Path, pattern: str) -> Path:
    for i in range(24):
        words = {"site": ("north", "south")[i % 2], "class": ("benign", "malignant")[i // 2 % 2], "i": i}
        words |= {"split": ("train", "train", "val", "test")[i // 4 % 4], "patient": f"patient_{i // 2:03d}"}
        png(root / pattern.format(**words), i)
    return root


def pairs(root: Path, image: str, drawn: str) -> Path:
    for i in range(24):
        words = {"i": i, "p": f"TCGA_{i // 2:03d}", "site": ("alpha", "beta")[i % 2]}
        png(root / image.format(**words), i)
        mask(root / drawn.format(**words), i)
    return root


def nnunet(root: Path) -> Path:
    for i in range(12):
        nifti(root / f"imagesTr/case_{i:03d}_0000.nii.gz", i)
        nifti(root / f"labelsTr/case_{i:03d}.nii.gz", i, mask=True)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    return root


def decathlon(root: Path) -> Path:
    for i in range(12):
        nifti(root / f"imagesTr/case_{i:03d}.nii.gz", i)
        nifti(root / f"labelsTr/case_{i:03d}.nii.gz", i, mask=True)
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "organ"}, "numTraining": 12}))
    return root


def bids(root: Path, ids: str = "sub-{:02d}") -> Path:
    rows = ["participant_id\tgroup\thospital"]
    for i in range(12):
        nifti(root / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz", i)
        rows.append(f"{ids.format(i)}\t{'ad' if i % 3 else 'hc'}\t{'north' if i < 6 else 'south'}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


def bids_masks(root: Path) -> Path:
    for i in range(12):
        nifti(root / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz", i)
        nifti(root / f"derivatives/seg/sub-{i:02d}/anat/sub-{i:02d}_space-T1w_desc-brain_mask.nii.gz", i, mask=True)
        nifti(root / f"derivatives/seg/sub-{i:02d}/anat/sub-{i:02d}_space-MNI152_desc-brain_mask.nii.gz", 9, mask=True)
    (root / "participants.tsv").write_text("participant_id\tage\n" + "".join(f"sub-{i:02d}\t{i}\n" for i in range(12)))
    return root


def dicom(root: Path) -> Path:
    rows = ["PatientID,Diagnosis,Centre"]
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 99, (2, 8, 8)).astype(np.int16)
        series(root / f"{i}", pixels, PatientID=f"{i:04d}")
        rows.append(f"{i},{'sick' if i % 2 else 'well'},{'a' if i < 6 else 'b'}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


def npz(root: Path, names: bool) -> Path:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (24, 16, 16)).astype(np.uint8), np.arange(24) % 2
    if names:
        ids = np.array([f"p{i // 2}" for i in range(24)])
        np.savez(
            root / "a.npz",
            images=images,
            labels=labels,
            patient_id=ids,
            hospital=np.array(["x", "y"])[np.arange(24) // 2 % 2],
        )
    else:
        parts = {"train": slice(0, 12), "val": slice(12, 16), "test": slice(16, 24)}
        arrays: dict[str, Any] = {f"{s}_images": images[at] for s, at in parts.items()}
        arrays |= {f"{s}_labels": labels[at, None] for s, at in parts.items()}
        np.savez(root / "mnist.npz", **arrays)
    return root


HEAD = "Path,Label,patient_id,Hospital"
ROWS = [f"img/{i}.png,{('gut', 'bösartig')[i % 2]},{i // 2},h{i // 12}" for i in range(24)]


def manifest(root: Path, text: str, encoding: str = "utf-8", name: str = "m.csv") -> Path:
    for i in range(24):
        png(root / f"img/{i}.png", i)
    (root / name).write_bytes(text.encode(encoding))
    return root


def table(root: Path, head: str, row: Callable[[int], str]) -> Path:
    (root / "t.csv").write_text("\n".join([head, *(row(i) for i in range(24))]))
    return root


@dataclass(frozen=True)
class Layout:
    """Files of 24 or 12 examples, and what everyone must find in them."""

    make: Callable[[Path], Path]
    examples: int = 24
    patients: int | None = None
    sites: int = 0
    classes: int = 2
    options: dict[str, Any] = field(default_factory=dict)


M: dict[str, Any] = {"patients": 12, "sites": 2}
LINES = [HEAD, *ROWS]
LAYOUTS: dict[str, Layout] = {
    "class": Layout(lambda p: folders(p, "{class}/{i}.png"), options={"levels": ["class"]}),
    "split/class": Layout(lambda p: folders(p, "{split}/{class}/{i}.png"), options={"levels": ["split", "class"]}),
    "hospital/class": Layout(
        lambda p: folders(p, "{site}/{class}/{i}.png"), sites=2, options={"levels": ["site", "class"]}
    ),
    "hospital/split/class": Layout(
        lambda p: folders(p, "{site}/{split}/{class}/{i}.png"), sites=2, options={"levels": ["site", "split", "class"]}
    ),
    "class/patient": Layout(
        lambda p: folders(p, "{class}/{patient}/{i}.png"), patients=12, options={"levels": ["class", "patient"]}
    ),
    "image and mask in one folder": Layout(lambda p: pairs(p, "{i}.png", "{i}_mask.png"), classes=0),
    "patient folders (LGG)": Layout(
        lambda p: pairs(p, "{p}/{p}_{i}.png", "{p}/{p}_{i}_mask.png"),
        patients=12,
        classes=0,
        options={"images": ["{patient}/{case}.png"], "mask": "{patient}/{case}_mask.png"},
    ),
    "parallel trees with suffixes (ISIC)": Layout(
        lambda p: pairs(p, "images/ISIC_{i:03d}.png", "masks/ISIC_{i:03d}_segmentation.png"), classes=0
    ),
    "parallel trees by site": Layout(
        lambda p: pairs(p, "images/{site}/{i}.png", "gt/{site}/{i}_gt.png"), sites=2, classes=0
    ),
    "images and masks": Layout(lambda p: pairs(p, "images/{i}.png", "masks/{i}.png"), classes=0),
    "nnU-Net": Layout(nnunet, examples=12, classes=0),
    "Decathlon": Layout(decathlon, examples=12, classes=0),
    "BIDS": Layout(bids, examples=12, patients=12, sites=2),
    "BIDS without zeros": Layout(lambda p: bids(p, "sub-{}"), examples=12, patients=12, sites=2),
    "BIDS without sub-": Layout(lambda p: bids(p, "{}"), examples=12, patients=12, sites=2),
    "BIDS with masks in two spaces": Layout(bids_masks, examples=12, patients=12, classes=0),
    "DICOM, ids without zeros": Layout(dicom, examples=12, patients=12, sites=2),
    "MedMNIST": Layout(lambda p: npz(p, False)),
    "archive with patients and sites": Layout(lambda p: npz(p, True), patients=12, sites=2),
    "manifest": Layout(lambda p: manifest(p, "\n".join(LINES)), **M),
    "manifest in Windows-1252": Layout(lambda p: manifest(p, "\n".join(LINES), "cp1252"), **M),
    "manifest in UTF-16": Layout(lambda p: manifest(p, "\n".join(LINES), "utf-16"), **M),
    "manifest with BOM": Layout(lambda p: manifest(p, "\n".join(LINES), "utf-8-sig"), **M),
    "manifest with semicolons": Layout(lambda p: manifest(p, "\n".join(LINES).replace(",", ";")), **M),
    "manifest with sep=": Layout(lambda p: manifest(p, "sep=;\r\n" + "\r\n".join(LINES).replace(",", ";")), **M),
    "manifest with Excel's empty rows": Layout(lambda p: manifest(p, "\r\n".join([*LINES, ",,,", ",,,"])), **M),
    "manifest with Excel's empty column": Layout(lambda p: manifest(p, "".join(f"{line},\n" for line in LINES)), **M),
    "manifest with pandas' index": Layout(
        lambda p: manifest(p, "\n".join(["," + HEAD, *(f"{i},{row}" for i, row in enumerate(ROWS))])), **M
    ),
    "manifest of tabs": Layout(lambda p: manifest(p, "\n".join(LINES).replace(",", "\t"), name="m.tsv"), **M),
    "manifest with NA": Layout(lambda p: manifest(p, "\n".join([*LINES, "img/0.png,NA,99,h1"])), **M),
    "manifest without suffixes (HAM10000)": Layout(
        lambda p: manifest(
            p, "\n".join([HEAD.replace("Path", "image_id"), *(r.replace("img/", "").replace(".png", "") for r in ROWS)])
        ),
        **M,
        options={"images": ["img/{image_id}.png"]},
    ),
    "table": Layout(
        lambda p: table(
            p,
            "subject,centre,age,sex,scanner,diagnosis",
            lambda i: f"s{i},{'ab'[i % 2]},{i},{'mf'[i % 2]},x{i % 3},{i % 2}.0",
        ),
        patients=24,
        sites=2,
        options={"categories": ["sex"], "label": "diagnosis"},
    ),
    "table with case and control": Layout(
        lambda p: table(p, "case,hospital,x,label", lambda i: f"{i % 2},{'ab'[i % 2]},{i},{i // 2 % 2}"), sites=2
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_loader_and_new_study_agree(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    (tmp_path / "data").mkdir()
    root = layout.make(tmp_path / "data")
    report = check_folder(root)
    assert not [f.message for f in report.findings if f.code == "study"]
    printed = "\n".join(report.lines())
    assert "[data]" in printed
    study = study_config.parse(new_study(recognize(root), study_name(str(root)), 1).text)
    assert {**report.data, **layout.options} == report.data
    assert study.data.options.items() >= {k: v for k, v in report.data.items() if k not in ("path", "kind")}.items()
    spec = DataSpec.model_validate(
        {**report.data, "sites": "natural" if layout.sites else {"partition": "iid", "count": 1}}
    )
    source = spec.source()
    loaded = source.table()
    assert len(loaded) == report.examples == layout.examples
    assert len(set(loaded.patients)) == (layout.patients or layout.examples)
    assert report.patients == layout.patients
    sites = set(loaded.columns[loaded.sites[0]]) if loaded.sites else set()
    assert len(sites) == len(report.sites) == layout.sites
    if layout.classes:
        assert loaded.labels is not None
        assert set(report.classes) == {source.info.classes[i] for i in loaded.labels.tolist()}
        assert len(report.classes) == layout.classes
    federation = federate(study.data, 0)
    assert sum(len(e) for roles in federation.sites.values() for e in roles.values()) == layout.examples


def test_a_row_per_session_labels_that_session(tmp_path: Path) -> None:
    rows = ["participant_id\tsession_id\tgroup\tsex"]
    for i in range(4):
        for session in (1, 2):
            nifti(tmp_path / f"sub-{i}/ses-{session}/anat/sub-{i}_ses-{session}_T1w.nii.gz", 2 * i + session)
            rows.append(f"sub-{i}\tses-{session}\t{'ad' if session == 2 and i < 2 else 'hc'}\tf")
    (tmp_path / "participants.tsv").write_text("\n".join(rows))
    source = BidsImages(str(tmp_path), label="group")
    found = {e.id.rpartition("/")[2]: source.info.classes[e.label] for e in source.collection.entries}  # type: ignore[index]
    assert [found[f"sub-{i}_ses-{s}_T1w.nii.gz"] for i in range(4) for s in (1, 2)] == ["hc", "ad"] * 2 + [
        "hc",
        "hc",
    ] * 2
    assert set(source.table().columns["sex"]) == {"f"}
    (tmp_path / "participants.tsv").write_text("\n".join(row.replace("session_id", "note") for row in rows))
    assert "4 participants have several rows" in "\n".join(read_bids(tmp_path).problems)
    with pytest.raises(DataError, match="4 rows without a group"):
        BidsImages(str(tmp_path), label="group").table()
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\n" + "".join(f"sub-{i}\tf\n" for i in range(4)))
    for i in range(4):
        text = f"session_id\tgroup\nses-1\thc\nses-2\t{'ad' if i < 2 else 'hc'}\n"
        (tmp_path / f"sub-{i}/sub-{i}_sessions.tsv").write_text(text)
    again = BidsImages(str(tmp_path), label="group")
    assert [e.label for e in again.collection.entries] == [e.label for e in source.collection.entries]


def test_only_a_mask_in_a_template_is_no_mask(tmp_path: Path) -> None:
    nifti(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz", 1)
    nifti(tmp_path / "derivatives/x/sub-1/anat/sub-1_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz", 1, mask=True)
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(DataError, match="1 of 1 visits have no mask in the image's space"):
        BidsImages(str(tmp_path)).table()


def test_a_table_states_what_was_chosen_and_what_is_no_feature(tmp_path: Path) -> None:
    root = table(
        tmp_path, "id,hospital,scanner,age,label", lambda i: f"{i // 2},h{i // 2 % 2},s{i // 2 % 3},{i},{i % 2}"
    )
    source = FeatureTable(str(root / "t.csv"), "label")
    assert source.names == ("age",)
    assert len(set(source.table().patients)) == 12
    notes = " ".join(source.info.notes)
    assert 'patient = "id", site = "hospital"' in notes
    assert "Not used as features, by their names: scanner" in notes
    for sites in ("hospital", "natural", "Hospital", "scanner"):
        spec = DataSpec(path=source.path, kind="table", label="label", sites=sites, min_patients=1)  # type: ignore[call-arg]
        assert len(federate(spec).sites) == (3 if sites == "scanner" else 2)
    alone = FeatureTable(source.path, "label", patient="none", site="none")
    assert (len(set(alone.table().patients)), alone.table().sites) == (24, ())
    assert FeatureTable(source.path, "LABEL").info.classes == ("0", "1")
    with pytest.raises(DataError, match=r"no column 'hopital' for the site. Did you mean 'hospital'\?"):
        FeatureTable(source.path, "label", site="hopital").table()


def test_a_patient_or_site_that_is_missing_is_no_patient_and_no_site(tmp_path: Path) -> None:
    lines = [*LINES, "img/a.png,gut,NA,h1"]
    png(manifest(tmp_path, "\n".join(lines)) / "img/a.png", 3)
    with pytest.raises(DataError, match=r"1 rows name no patient \(the first is row 26\)"):
        Manifest(str(tmp_path / "m.csv")).table()
    text = "\n".join(lines).replace(",NA,h1", ",77,n/a")
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    found = federate(DataSpec(path=str(tmp_path / "m.csv"), kind="manifest", min_patients=1))
    assert set(found.sites) == {"h0", "h1"}
    assert any("1 examples whose Hospital is missing" in note for note in found.notes)


def test_the_same_patient_number_at_two_hospitals_is_two_people(tmp_path: Path) -> None:
    for site in ("north", "south"):
        for i in range(8):
            png(tmp_path / site / ("a", "b")[i % 2] / f"patient_{i // 2}" / f"{i}.png", i + 100 * (site == "north"))
    table = Folders(str(tmp_path), ("site", "class", "patient")).table()
    assert len(set(table.patients)) == 8


def test_text_that_is_no_table_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for data, says in (
        (b"a,b\n1\n", "1 rows have another number of columns"),
        (b"a,,b\n1,2,3\n", "column 2 has no name"),
        (codecs.BOM_UTF16_LE + b"a", "not sound text in UTF-16"),
        (b"a,a\n1,2\n", "the column 'a' occurs twice"),
    ):
        (tmp_path / "t.csv").write_bytes(data)
        with pytest.raises(DataError, match=says):
            read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("column", "values", "proposed"),
    [
        ("KL grade", ["0", "1", "2", "3", "4"], True),
        ("birads", ["1", "2", "3", "4", "5"], True),
        ("stage", ["I", "II", "III", "IV"], True),
        ("dr_grade", ["0.0", "1.0", "2.0"], True),
        ("diagnosis", ["0", "1", "2", "3", "4"], False),
        ("grade", ["0", "1"], False),  # two classes have no distance
        ("grade", ["0", "2", "5"], False),  # not consecutive: codes, perhaps
        ("grade", ["low", "medium", "high"], False),  # the order of words is not known
        ("upgraded", ["0", "1", "2"], False),
    ],
)
def test_grades_are_proposed_as_ordered(tmp_path: Path, column: str, values: list[str], proposed: bool) -> None:
    rows = [f"img/{i}.png,{values[i % len(values)]},p{i}" for i in range(24)]
    root = manifest(tmp_path, "\n".join([f"path,{column},patient", *rows]))
    found = recognize(root, {"label": column})
    assert found.ordered is proposed
    assert [question.key for question in found.questions] == ["ordered"] * proposed
    study = study_config.parse(new_study(found, "s", 1).text)
    assert bool(study.task.ordered) is proposed
    assert any("names a grade" in reason for reason in found.why) is proposed
    for answer in (False, "false", "no"):
        refused = recognize(root, {"label": column, "ordered": answer})
        assert not refused.ordered
        assert not refused.questions
        assert study_config.parse(new_study(refused, "s", 1).text).task.ordered is None
