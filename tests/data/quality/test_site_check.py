"""The check finds what was planted in every layout, shows no identifier, and says nothing of sound data."""

import gzip
import json
import re
import socket
import stat
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.cli.data import check
from polyclinic.data.config import KINDS as STUDY_KINDS
from polyclinic.data.deidentification.filename_screening import in_name, shown
from polyclinic.data.deidentification.folder_deidentification import deidentify_folder
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.safe_reading import Unreadable, read_npz
from polyclinic.data.formats.volume import Volume
from polyclinic.data.quality.folder_layout import detect
from polyclinic.data.quality.image_hashes import content_hash, nearly_equal, small_picture
from polyclinic.data.quality.quality_page import page, write_page
from polyclinic.data.quality.site_check import KINDS as CHECK_KINDS
from polyclinic.data.quality.site_check import CheckReport, check_folder
from polyclinic.errors import ConfigError
from tests.support.image_files import CT, RADIOGRAPH, ULTRASOUND, image, nifti_bytes, pydicom, save, series

RNG = np.random.default_rng(0)


def codes(report: CheckReport, level: str | None = None) -> set[str]:
    return {finding.code for finding in report.findings if level in (None, finding.level)}


def finding(report: CheckReport, code: str) -> str:
    return next(f.line() for f in report.findings if f.code == code)


def picture(path: Path, seed: int, shape: tuple[int, int] = (40, 48)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 6)).astype(np.uint8)
    gray = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    Image.fromarray(gray).save(path)
    return gray


def classes(root: Path, count: int = 8, splits: tuple[str, ...] = ("train", "test")) -> Path:
    seed = 0
    for split in splits:
        for label in ("benign", "malignant"):
            for i in range(count):
                picture(root / split / label / f"img_{i:03d}.png", seed := seed + 1)
    return root


def volume(path: Path, seed: int = 0, shape: tuple[int, ...] = (8, 9, 10), spacing: float = 1.0, **labels: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    if labels:
        data = np.zeros(shape, np.uint8)
        data[2:4, 2:4, 2:4] = labels["label"]
    nibabel.save(nibabel.Nifti1Image(data, np.diag([spacing] * 3 + [1])), path)


def nnunet(root: Path, count: int = 4) -> Path:
    for i in range(count):
        for channel in (0, 1):
            volume(root / "imagesTr" / f"liver_{i:03d}_{channel:04d}.nii.gz", 2 * i + channel)
        volume(root / "labelsTr" / f"liver_{i:03d}.nii.gz", label=1)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}))
    return root


def test_class_folders_with_splits(tmp_path: Path) -> None:
    report = check_folder(classes(tmp_path))
    assert (report.kind, report.examples) == ("classes", 32)
    assert report.classes == {"benign": 16, "malignant": 16}
    assert report.splits == {"train": 16, "test": 16}
    assert codes(report) == {"patients-unknown"}
    assert report.ok


def test_copies_within_and_over_splits_and_classes(tmp_path: Path) -> None:
    gray = picture(classes(tmp_path) / "train" / "benign" / "img_000.png", 1)
    Image.fromarray(gray).save(tmp_path / "test" / "malignant" / "copy.bmp")  # same pixels, another format
    bright = np.clip(gray.astype(float) * 0.9 + 12, 0, 255).astype(np.uint8)
    Image.fromarray(bright).resize((96, 80), Image.Resampling.BICUBIC).save(tmp_path / "test" / "benign" / "again.jpg")
    report = check_folder(tmp_path)
    assert {
        "duplicates",
        "duplicates-across-splits",
        "duplicates-two-classes",
        "near-duplicates",
        "near-duplicates-across-splits",
    } <= codes(report)
    assert "img_000.png" in finding(report, "duplicates")
    assert "again.jpg" in finding(report, "near-duplicates")
    assert not report.ok


def test_near_copies_are_found_and_strangers_are_not(real_data: Path) -> None:
    """In BUSI, whose near-duplicates are known, and in chest X-rays, which all look alike."""
    report = check_folder(real_data / "busi" / "busi_128.npz", thumbs=2)
    assert {"duplicates", "duplicates-two-classes", "near-duplicates"} <= codes(report)
    pairs = next(f for f in report.findings if f.code == "near-duplicates")
    assert 40 <= len(pairs.files) // 2 <= 120
    chests = read_npz(real_data / "pneumoniamnist" / "pneumoniamnist.npz")["train_images"][:1000]
    looks = [Volume(torch.from_numpy(chest)[None], torch.eye(4, dtype=torch.float64)) for chest in chests]
    assert nearly_equal([small_picture(v) for v in looks], [content_hash(v.array) for v in looks]) == []


def test_nnunet_with_channels_and_masks(tmp_path: Path) -> None:
    report = check_folder(nnunet(tmp_path))
    assert (report.kind, report.examples) == ("nnunet", 4)
    assert report.mask_labels == {0: 4, 1: 4}
    assert report.spacing_mm == ((1.0,) * 3,) * 3
    assert codes(report) == {"patients-unknown"}


def test_masks_that_are_empty_unknown_astray_missing_or_orphans(tmp_path: Path) -> None:
    root = nnunet(tmp_path, 6)
    volume(root / "labelsTr" / "liver_000.nii.gz", label=0)
    volume(root / "labelsTr" / "liver_001.nii.gz", label=7)
    volume(root / "labelsTr" / "liver_002.nii.gz", label=1, spacing=1.5)
    volume(root / "labelsTr" / "liver_003.nii.gz", shape=(8, 9, 11), label=1)
    (root / "labelsTr" / "liver_004.nii.gz").rename(root / "labelsTr" / "liver_900.nii.gz")
    report = check_folder(root)
    text = "\n".join(report.lines())
    for part in (
        "empty masks: 1 of 5",
        "7 (in 1 of 5 masks). Declared are 0, 1",
        "the mask is on another grid than its image: corresponding voxels are up to",
        "it has 11 x 9 x 8 voxels (z, y, x) and its image 10 x 9 x 8",
        "an image has no mask: imagesTr/liver_004_0000.nii.gz",
        "1 masks belong to no image",
    ):
        assert part in text
    assert not report.ok


def test_allowed_labels_may_be_given_where_no_file_says_them(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    (root / "dataset.json").unlink()
    assert check_folder(root).ok
    assert "unknown-label" in codes(check_folder(root, labels=(2,)))


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    volume(nnunet(tmp_path) / "imagesTr" / "liver_000_0001.nii.gz", spacing=2.0)
    assert "the channel is on another grid than its image" in finding(check_folder(tmp_path), "unreadable")


def test_masks_beside_their_images(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "benign" / f"case ({i}).png", i)
        for extra in ("_mask", "_mask_1"):
            mask = np.zeros((40, 48), np.uint8)
            mask[5:9, 5:9] = 255
            Image.fromarray(mask).save(tmp_path / "benign" / f"case ({i}){extra}.png")
    report = check_folder(tmp_path)
    assert report.examples == 3
    assert report.mask_labels == {0: 3, 255: 3}


def test_bids_takes_labels_and_sites_from_participants(tmp_path: Path) -> None:
    rows = ["participant_id\tdiagnosis\tsite"]
    for i in range(12):
        volume(tmp_path / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_T1w.nii.gz", i)
        rows.append(f"sub-{i:02d}\t{'ad' if i % 2 else 'hc'}\t{'north' if i < 6 else 'south'}")
    (tmp_path / "participants.tsv").write_text("\n".join(rows))
    report = check_folder(tmp_path)
    assert (report.kind, report.patients) == ("bids", 12)
    assert report.classes == {"ad": 6, "hc": 6}
    assert report.sites == {"north": 6, "south": 6}
    assert report.ok
    (tmp_path / "sub-00" / "anat" / "sub-00_T1w.json").write_text('{"PatientName": "Doe^Jane", "EchoTime": 1}')
    bad = check_folder(tmp_path)
    assert "PatientName in 1" in finding(bad, "health")
    assert "Doe" not in "\n".join(bad.lines())


def test_a_manifest_knows_patients_splits_and_masks(tmp_path: Path) -> None:
    lines = ["path,label,patient,split,site"]
    for i in range(12):
        picture(tmp_path / "files" / f"{i}.png", i)
        lines.append(f"files/{i}.png,{i % 2},p{i // 2},{'train' if i < 7 else 'test'},{'a' if i < 6 else 'b'}")
    lines += ["../outside.png,0,p9,train,a", "/etc/passwd,0,p9,train,a", "files/none.png,0,p10,train,a"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    report = check_folder(tmp_path)
    assert (report.kind, report.examples, report.patients) == ("manifest", 12, 6)
    assert "1 patient in more than one split" in finding(report, "two-splits")
    assert "there is no such file" in finding(report, "unreadable")
    layout = [f.message for f in report.findings if f.code == "layout"]
    assert any("2 rows whose path is empty or leads out of the folder (row 14, row 15)" in m for m in layout)


def test_dicom_headers_are_named_by_number_and_never_quoted(tmp_path: Path) -> None:
    with quiet():
        series(
            tmp_path / "a",
            RNG.integers(0, 999, (4, 16, 16)).astype(np.int16),
            PatientName="Quillfeather^Jorinde",
            PatientID="MRN771234",
            InstitutionName="Saint Elsewhere",
            PatientBirthDate="19400317",
        )
        deep, inner = pydicom.Dataset(), pydicom.Dataset()
        inner.RequestingPhysician = "Strangelove"
        deep.ScheduledProcedureStepDescription = "x"
        dataset = image(RNG.integers(0, 99, (16, 16)).astype(np.int16), ReferencedStudySequence=[inner])
        dataset.private_block(0x0029, "ACME", create=True).add_new(1, "LO", "secret")
        dataset.preamble = b"hello".ljust(128, b"\0")
        save(dataset, tmp_path / "b.dcm")
    report = check_folder(tmp_path)
    text = "\n".join(report.lines())
    for part in (
        "(0010,0010) in 4",
        "(0010,0030) in 4",
        "(0008,0080) in 4",
        "(0032,1032) in 1",
        "private elements in 1",
        "the 128-byte preamble in 1",
    ):
        assert part in text
    everything = text + page(report) + repr(report)
    for secret in ("Quillfeather", "Jorinde", "MRN771234", "Elsewhere", "19400317", "Strangelove", "secret", "ACME"):
        assert secret not in everything
    assert not report.ok
    assert check_folder(tmp_path, health="warning").ok


def test_a_deidentified_folder_passes_the_check(tmp_path: Path) -> None:
    pytest.importorskip("dicomanonymizer", reason="needs the dicom extra")
    with quiet():
        series(
            tmp_path / "src",
            RNG.integers(0, 999, (4, 16, 16)).astype(np.int16),
            PatientName="Doe^Jane",
            PatientID="MRN771234",
            AccessionNumber="A1",
            BodyPartExamined="CHEST",
        )
    deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    report = check_folder(tmp_path / "dst")
    assert report.ok, report.lines()
    assert codes(report) == {"few-patients", "study"}
    assert "a study needs a table with one row per patient" in finding(report, "study")
    assert "health" in codes(check_folder(tmp_path / "src"))


def test_pictures_that_may_show_text(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 99, (16, 16)).astype(np.uint8)
    save(image(pixels, "US", ULTRASOUND), tmp_path / "us.dcm")
    save(image(pixels + 1, "US", ULTRASOUND, BurnedInAnnotation="NO"), tmp_path / "ok.dcm")
    save(image(pixels + 2, "CR", RADIOGRAPH, BurnedInAnnotation="YES"), tmp_path / "cr.dcm")
    save(image(pixels + 3, "CT", CT), tmp_path / "ct.dcm")
    levels = {f.files: f.level for f in check_folder(tmp_path).findings if f.code == "burned-in"}
    assert levels == {("us.dcm",): "warning", ("cr.dcm",): "error"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("JANE_DOE_0.dcm", "person"),
        ("Doe_Jane.nii.gz", "person"),
        ("jane_doe.png", "person"),
        ("Doe^Jane.dcm", "person"),
        ("Schmidt, Maria.png", "person"),
        ("MRN123456.png", "record"),
        ("1234567.dcm", "record"),
        ("19400317_scan.png", "date"),
        ("2021-01-05.png", "date"),
        ("a@b.org.png", "mail"),
        ("123-45-6789.png", "security"),
        ("brain_image.nii.gz", None),
        ("Left Kidney.png", None),
        ("sub-1000017_T1w.nii.gz", None),
        ("IM0001.dcm", None),
        ("hippocampus_001.nii.gz", None),
        ("1.2.840.113619.2.5.17625831.215519.78.dcm", None),
        ("benign (12).png", None),
        ("PABCDEFGHIJKLMNOP", None),
        ("person1_virus_6.jpeg", None),
        ("BraTS20_Training_001_flair.nii.gz", None),
        ("Chest_Xray", None),
    ],
)
def test_names_of_files(name: str, what: str | None) -> None:
    found = in_name([name])
    assert (found is None) if what is None else (found is not None and what in found)
    masked = shown(name)
    assert (masked == name) if what is None else not re.search(r"[A-Za-z]{2,}|\d", masked.split(".")[0])


def test_names_of_files_are_masked_wherever_they_are_shown(tmp_path: Path) -> None:
    picture(tmp_path / "Quillfeather_Jorinde" / "Quillfeather_Jorinde_MRN771234.png", 1)
    (tmp_path / "Quillfeather_Jorinde" / "Brandtzaeg_Maria.png").write_bytes(b"no picture")
    picture(tmp_path / "benign" / "1.png", 2)
    report = check_folder(tmp_path)
    everything = "\n".join(report.lines()) + page(report)
    for secret in ("uillfeather", "orinde", "771234", "randtzaeg"):
        assert secret not in everything
    assert {"names", "unreadable"} <= codes(report)


def test_metadata_of_pictures_and_nifti_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[315], exif[34853] = "Jane Doe", {1: "N"}
    Image.fromarray(RNG.integers(0, 255, (32, 32)).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    header = bytearray(nifti_bytes())
    header[148:156] = b"Doe^Jane"
    (tmp_path / "b.nii").write_bytes(bytes(header))
    report = check_folder(tmp_path)
    text = "\n".join(report.lines())
    for part in ("1 file with Artist", "1 file with GPS", "1 file with descrip"):
        assert part in text
    assert "Doe" not in text


def test_a_face_in_a_head_scan_is_a_warning_and_a_defaced_one_is_not(tmp_path: Path) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (64, 72, 64)], indexing="ij"), -1)
    head = ((grid**2 * [1.4, 1.0, 1.1]).sum(-1) < 0.9) * 500 + RNG.integers(0, 30, (64, 72, 64))
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(head.astype(np.int16), affine), tmp_path / "sub1_T1w.nii.gz")
    defaced = head.copy()
    defaced[:, 45:, :36] = 0
    nibabel.save(nibabel.Nifti1Image(defaced.astype(np.int16), affine), tmp_path / "sub2_T1w.nii.gz")
    nibabel.save(nibabel.Nifti1Image(head[::-1].astype(np.int16), affine), tmp_path / "thorax3.nii.gz")
    report = check_folder(tmp_path)
    assert [f.files for f in report.findings if f.code == "faces"] == [("sub1_T1w.nii.gz",)]


def test_what_differs_from_the_rest(tmp_path: Path) -> None:
    for i in range(10):
        volume(tmp_path / f"case{i}.nii.gz", i)
    volume(tmp_path / "thick.nii.gz", 11, spacing=9.0)
    nibabel.save(nibabel.Nifti1Image(np.full((8, 9, 10), 3, np.int16), np.eye(4)), tmp_path / "flat.nii.gz")
    wide = RNG.integers(-30000, 30000, (8, 9, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(wide, np.diag([-1.0, 1, 1, 1])), tmp_path / "wide.nii.gz")
    report = check_folder(tmp_path)
    assert "thick.nii.gz" in finding(report, "spacing")
    assert "flat.nii.gz" in finding(report, "constant")
    assert "wide.nii.gz" in finding(report, "intensity")
    assert "LAS (1)" in finding(report, "mixed")
    assert report.orientations == {"RAS": 12, "LAS": 1}


def test_one_class_and_few_of_a_class(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "one" / "benign" / f"{i}.png", i)
        picture(tmp_path / "few" / "benign" / f"{i}.png", i)
    picture(tmp_path / "few" / "malignant" / "0.png", 9)
    assert "one-class" in codes(check_folder(tmp_path / "one"), "error")
    assert "malignant (1)" in finding(check_folder(tmp_path / "few"), "few-examples")


def test_folders_that_are_patients_are_not_called_classes(tmp_path: Path) -> None:
    for i in range(30):
        picture(tmp_path / f"case{i:03d}" / "a.png", i)
    assert "many-classes" in codes(check_folder(tmp_path))


def test_tables(tmp_path: Path) -> None:
    rows = ["patient_id,surname,age,chol,label,split"]
    rows += [f"p{i},x,{40 + i},{'' if i % 3 else -9},{i % 2},{'train' if i < 8 else 'test'}" for i in range(12)]
    rows += [rows[1], "p2,x,44,inf,0,test"]
    (tmp_path / "clinic.csv").write_text("\n".join(rows))
    report = check_folder(tmp_path)
    assert (report.kind, report.examples, report.patients) == ("table", 14, 12)
    assert report.classes == {"0": 8, "1": 6}
    assert {"health", "missing", "constant", "infinite", "duplicates", "two-splits"} <= codes(report)
    assert "surname" in finding(report, "health")


def test_real_tables_and_volumes_load(real_data: Path) -> None:
    heart = check_folder(real_data / "uci_heart_4hospitals")
    assert (heart.examples, len(heart.sites), heart.ok) == (920, 4, True)
    brains = check_folder(real_data / "brain_roi_tables_by_site" / "fcon1000_roi_23sites.csv.gz")
    assert (brains.examples, len(brains.sites)) == (1078, 23)
    crops = check_folder(real_data / "msd_hippocampus" / "examples")
    assert crops.mask_labels == {0: 3, 1: 3, 2: 3}
    nrrd = check_folder(real_data / "pyradiomics_nrrd")
    assert nrrd.mask_labels == {0: 3, 1: 3}
    retina = check_folder(real_data / "retina_vessels_3sites" / "vessels_256.npz")
    assert retina.sites == {"DRIVE": 40, "CHASEDB1": 28, "STARE": 20}


@pytest.mark.parametrize("what", ["nothing", "empty", "text", "program"])
def test_nothing_to_check_is_said_in_a_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what != "nothing":
        path.write_bytes(b"\x7fELF" if what == "program" else b"hello")
    with pytest.raises(Unreadable):
        detect(path)


class Links(HTMLParser):
    """Collects everything that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "form", "a", "base"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action") or name.startswith("on"):
                if tag == "img" and (value or "").startswith("data:image/png;base64,"):
                    self.pictures += 1
                else:
                    self.found.append(f"{tag} {name}={value}")


def test_the_page_fetches_nothing_runs_nothing_and_escapes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<img src=x onerror=alert(1)>"
    picture(tmp_path / "data" / evil / "a.png", 1)
    picture(tmp_path / "data" / 'b"&<script>' / "a.png", 2)
    (tmp_path / "data" / evil / "broken\nline.png").write_bytes(b"x")

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the check opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    report = check_folder(tmp_path / "data")
    path = write_page(report, tmp_path / "page.html")
    text = path.read_text()
    links = Links()
    links.feed(text)
    assert links.found == []
    assert links.pictures == 2
    assert "<script" not in text
    assert evil not in text
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert "default-src 'none'" in text
    assert "Keep it at this site" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all("\n" not in line for line in report.lines())


def test_the_page_is_not_written_into_the_data_or_half(tmp_path: Path) -> None:
    report = check_folder(classes(tmp_path / "data", 2))
    with pytest.raises(ValueError, match="inside the data"):
        write_page(report, tmp_path / "data" / "page.html")
    with pytest.raises(ValueError, match="name a file"):
        write_page(report, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    with pytest.raises(ConfigError, match="there is no folder"):
        check(tmp_path / "data", page=tmp_path / "no" / "p.html")


def test_the_command_says_whether_anything_stands_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(classes(tmp_path / "a"), page=tmp_path / "p.html")
    assert capsys.readouterr().out.splitlines()[-2] == "no errors found"
    (tmp_path / "a" / "train" / "benign" / "bad.png").write_bytes(b"x")
    with pytest.raises(SystemExit) as end:
        check(tmp_path / "a")
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 error to correct first"


def test_the_check_prints_the_data_table_of_a_study(tmp_path: Path) -> None:
    for name in ("classes", "nnunet"):
        made = {"classes": classes, "nnunet": nnunet}[name](tmp_path / name)
        report = check_folder(made)
        assert report.kind == name
        assert report.data["kind"] in STUDY_KINDS
        lines = report.lines()
        table = lines[lines.index("[data]") :]
        assert f'kind = "{report.data["kind"]}"' in table
    assert set(CHECK_KINDS) >= {"classes", "nnunet"}


def test_nothing_is_changed_in_the_data(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "data")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    write_page(check_folder(root), tmp_path / "p.html")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()} == before
    assert gzip.decompress(next(iter(before.values()))[0]) if next(iter(before)).suffix == ".gz" else True
