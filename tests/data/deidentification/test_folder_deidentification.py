"""No planted identifier survives de-identification, dates keep their order, and nothing is overwritten."""

import datetime
import io
import json
import logging
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.cli.data import deidentify
from polyclinic.data.deidentification.element_rules import action, covered
from polyclinic.data.deidentification.folder_deidentification import (
    checked_bytes,
    deidentify_folder,
)
from polyclinic.data.deidentification.image_deidentification import METHOD, Deidentification, Pseudonyms, clean
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.dicom.series import dicom_files, find_series, read_series
from polyclinic.data.formats.safe_reading import Unreadable
from tests.support.image_files import CT, RADIOGRAPH, ULTRASOUND, image, pydicom, save, series

pytest.importorskip("dicomanonymizer", reason="needs the dicom extra")
NAMES = ("Quillfeather", "Brandtzaeg", "Ochieng", "Szymborska", "Vukovic")


def planted(number: int) -> tuple[Any, dict[str, str]]:
    """A data set with an identifier of its own in every corner of a DICOM file, and all of them by place."""
    family = NAMES[number % 5]
    who = {
        "family": family,
        "given": f"Jorinde{'abcdefghij'[number % 10]}",
        "mrn": f"MRN{770000 + number}",
        "other id": f"OTH-{880000 + number}-X",
        "birth": f"19{40 + number % 50}0317",
        "accession": f"ACC{660000 + number}",
        "address": f"{number} Elderberry Crescent",
        "phone": f"+45 5550 {1000 + number}99",
        "physician": f"Strangelove{number}",
        "hospital": f"Saint Nowhere {number} Infirmary",
        "station": f"SCANROOM{5000 + number}",
        "comment": f"call sister Zebediah{number} 4471{number:02d}88",
        "nested": f"Nested Nightingale{number}",
        "deep": f"DEEP{990000 + number}",
        "private": f"Private Pumpernickel{number}",
        "private nested": f"Inner Imbroglio{number}",
        "private bytes": f"BLOB{123000 + number}SECRET",
        "preamble": f"PRE{330000 + number}",
        "overlay": f"OVL{440000 + number}",
        "trailing": f"TRAIL{550000 + number}",
        "meta": f"AETITLE{10 + number}",
        "unlisted": f"Unlisted Ulysses{number}",
        "kept": f"{family}-Scanner",
        "file": f"FILE{220000 + number}",
    }
    with quiet():
        pixels = np.random.default_rng(number).integers(0, 2**12, (16, 16)).astype(np.uint16)
        pixels[0, : len(who["overlay"])] |= 0  # see below: the overlay hides above bit 12
        dataset = image(pixels, "CT", CT, BitsStored=12, HighBit=11, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
        dataset.preamble = who["preamble"].encode().ljust(128, b"\0")
        dataset.file_meta.SourceApplicationEntityTitle = who["meta"]
        dataset.PatientName, dataset.PatientID = f"{family}^{who['given']}", who["mrn"]
        dataset.OtherPatientIDs, dataset.PatientBirthDate = who["other id"], who["birth"]
        dataset.AccessionNumber, dataset.PatientAddress = who["accession"], who["address"]
        dataset.PatientTelephoneNumbers, dataset.ReferringPhysicianName = who["phone"], who["physician"]
        dataset.InstitutionName, dataset.StationName = who["hospital"], who["station"]
        dataset.PatientComments, dataset.StudyDescription = who["comment"], f"CT for {family}"
        dataset.ImageComments, dataset.Manufacturer = f"{who['given']} moved", who["kept"]
        dataset.StudyDate, dataset.SeriesDate = "20210105", "20210106"
        dataset.AcquisitionDateTime = "20210106101112.123456"
        dataset.PatientAge, dataset.PatientSex = "093Y", "F"
        request, step, code = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        request.ScheduledProcedureStepDescription, request.RequestedProcedureID = who["nested"], who["nested"][:16]
        dataset.RequestAttributesSequence = [request]
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = who["deep"], "99LOCAL", f"seen by {family}"
        step.ReferencedSOPClassUID, step.ReferencedSOPInstanceUID = CT, pydicom.uid.generate_uid()
        step.PurposeOfReferenceCodeSequence = [code]
        step.PatientName = f"{family}^{who['given']}"
        dataset.ReferencedImageSequence = [step]
        block = dataset.private_block(0x0029, "ACME PRIVATE", create=True)
        block.add_new(1, "LO", who["private"])
        inner = pydicom.Dataset()
        inner.PatientName = who["private nested"]
        block.add_new(2, "SQ", [inner])
        block.add_new(3, "OB", who["private bytes"].encode())
        dataset.add_new(0x60000010, "US", 16)
        dataset.add_new(0x60000011, "US", 16)
        dataset.add_new(0x60003000, "OW", who["overlay"].encode().ljust(32, b"\0"))
        dataset.add_new(0x60004000, "LT", f"overlay of {family}")
        dataset.add_new(0x00189999, "UN", who["unlisted"].encode())
        dataset.add_new(0x00181400, "LO", who["unlisted"])
        dataset.PixelData = pixels.tobytes() + who["trailing"].encode().ljust(16, b"\0")  # more than Rows x Columns
        dataset.add_new(0xFFFCFFFC, "OB", who["trailing"].encode().ljust(16, b"\0"))
    return dataset, who


def lay_out(root: Path, count: int = 50) -> list[dict[str, str]]:
    everybody = []
    for number in range(count):
        dataset, who = planted(number)
        with quiet():
            save(dataset, root / who["family"] / f"{who['family']}_{who['given']}_{who['file']}.dcm")
        everybody.append(who)
    return everybody


def test_no_planted_identifier_survives_in_fifty_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    everybody = lay_out(tmp_path / "src")
    before = {path: path.read_bytes() for path in (tmp_path / "src").rglob("*") if path.is_file()}
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    assert released.refused == ()
    assert len(released.written) == 50
    assert released.patients == 50
    shown = "\n".join([*released.lines(), repr(released), capsys.readouterr().out, caplog.text, *map(str, warned)])
    outputs = list((tmp_path / "dst").rglob("*.dcm"))
    assert len(outputs) == 50
    haystacks = [(str(p.relative_to(tmp_path / "dst")), p.read_bytes().lower()) for p in outputs]
    for who in everybody:
        for place, text in who.items():
            forms = [form.lower() for form in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"))]
            for name, data in haystacks:
                assert not any(form in data for form in forms), f"{place} survived"
                assert text.lower() not in name.lower(), f"{place} survived in a file name"
            assert text not in shown, f"{place} was shown"
    assert {path: path.read_bytes() for path in before} == before  # nothing is changed in place


def test_the_image_survives_and_the_header_says_what_was_done(tmp_path: Path) -> None:
    dataset, _ = planted(3)
    pixels = np.frombuffer(dataset.PixelData[:512], "<u2").reshape(16, 16)
    with quiet():
        save(dataset, tmp_path / "src" / "a.dcm")
    released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    out = pydicom.dcmread(tmp_path / "dst" / released.written[0])
    np.testing.assert_array_equal(out.pixel_array, pixels)
    assert (out.PatientIdentityRemoved, out.DeidentificationMethod) == ("YES", METHOD)
    assert [item.CodeValue for item in out.DeidentificationMethodCodeSequence] == ["113100", "113107"]
    assert out.LongitudinalTemporalInformationModified == "MODIFIED"
    assert out.preamble == b"\0" * 128
    assert out.PatientID == out.PatientName == released.written[0].split("/")[0]
    assert out.file_meta.MediaStorageSOPInstanceUID == out.SOPInstanceUID
    assert out.SOPClassUID == CT
    assert "PatientAge" not in out
    assert not out.PatientBirthDate
    assert not any(tag.is_private for tag in out.keys())  # noqa: SIM118
    assert out.ImageType == ["ORIGINAL", "PRIMARY", "AXIAL"]


def test_bits_above_the_stored_ones_are_cleared_and_signs_kept(tmp_path: Path) -> None:
    values = np.array([[-2048, -1, 0, 2047]], dtype=np.int16)
    hidden = (values.view(np.uint16) & 0x0FFF | 0x5000).view(np.int16)  # an overlay above bit 12
    dataset = image(hidden, BitsStored=12, HighBit=11)
    done = clean(Path("a.dcm"), reread(dataset), Pseudonyms(b"k" * 32), Deidentification())
    np.testing.assert_array_equal(np.frombuffer(done.dataset.PixelData, np.int16), values.ravel())


def reread(dataset: Any) -> Any:
    buffer = io.BytesIO()
    with quiet():
        dataset.save_as(buffer, enforce_file_format=True)
        return pydicom.dcmread(io.BytesIO(buffer.getvalue()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dates(datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)), min_size=2, max_size=5))
def test_dates_of_a_patient_keep_order_and_distance(days: list[datetime.date]) -> None:
    key, moved = Pseudonyms(b"s" * 32), []
    for day in days:
        dataset = image(np.zeros((2, 2), np.uint8), PatientID="P7", StudyDate=f"{day:%Y%m%d}", StudyTime="101112")
        dataset.AcquisitionDateTime = f"{day:%Y%m%d}101112.5+0100"
        out = clean(Path("a.dcm"), reread(dataset), key, Deidentification()).dataset
        moved.append(datetime.datetime.strptime(out.StudyDate, "%Y%m%d").date())
        assert out.AcquisitionDateTime == f"{out.StudyDate}101112.5+0100"
        assert out.StudyTime == "101112"
    assert [new - moved[0] for new in moved] == [day - days[0] for day in days]
    assert all(1 <= (day - new).days <= 3650 for day, new in zip(days, moved, strict=True))


def test_two_patients_move_by_different_days_and_a_secret_decides() -> None:
    key, other = Pseudonyms(b"a" * 32), Pseudonyms(b"b" * 32)
    assert len({key.days(f"P{i}", 3650) for i in range(50)}) > 40
    assert key.patient("P1") == key.patient("P1") != other.patient("P1")
    assert key.uid("1.2.3") != other.uid("1.2.3")
    assert len(key.uid("1.2.3")) <= 64
    assert "aaaa" not in repr(key)


def test_references_between_files_still_meet_and_runs_agree(tmp_path: Path) -> None:
    paths = series(tmp_path / "src", np.zeros((4, 8, 8), np.int16), PatientID="MRN0042424", PatientName="Doe^Jane")
    first = pydicom.dcmread(paths[0])
    second = pydicom.dcmread(paths[1])
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, first.SOPInstanceUID
    second.ReferencedImageSequence = [item]
    second.save_as(paths[1])
    one = deidentify_folder(tmp_path / "src", tmp_path / "one", tmp_path / "key.json")
    two = deidentify_folder(tmp_path / "src", tmp_path / "two", tmp_path / "key.json")
    uids = [
        {pydicom.dcmread(root / n).SOPInstanceUID for n in names}
        for root, names in ((tmp_path / "one", one.written), (tmp_path / "two", two.written))
    ]
    assert uids[0] == uids[1]
    named = [d for d in map(pydicom.dcmread, (tmp_path / "one").rglob("*.dcm")) if "ReferencedImageSequence" in d]
    assert named[0].ReferencedImageSequence[0].ReferencedSOPInstanceUID in uids[0]
    found = find_series(dicom_files(tmp_path / "one"))
    assert len(found.series) == 1  # still one series, in its place
    assert read_series(found.series[0]).spacing_mm == read_series(find_series(paths).series[0]).spacing_mm
    other = deidentify_folder(tmp_path / "src", tmp_path / "three", tmp_path / "other.json")
    assert other.written[0].split("/")[0] != one.written[0].split("/")[0]


@pytest.mark.parametrize(
    ("modality", "sop_class", "fields", "name"),
    [
        ("US", ULTRASOUND, {}, "US"),
        ("XA", CT, {}, "XA"),
        ("OT", CT, {}, "OT"),
        ("OT", "1.2.840.10008.5.1.4.1.1.7", {}, "SC"),
        ("CT", CT, {"ConversionType": "WSD"}, "SC"),
        ("CR", RADIOGRAPH, {"BurnedInAnnotation": "YES"}, "burned-in"),
        ("", CT, {}, ""),
    ],
)
def test_pixels_that_may_show_names_wait_for_a_person(
    tmp_path: Path, modality: str, sop_class: str, fields: dict[str, str], name: str
) -> None:
    save(image(np.zeros((4, 4), np.uint8), modality, sop_class, **fields), tmp_path / "src" / "a.dcm")
    refused = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    assert refused.written == ()
    assert f"approve {name!r}" in refused.refused[0].reason
    approved = Deidentification(approve=(name,))
    assert len(deidentify_folder(tmp_path / "src", tmp_path / "ok", tmp_path / "key.json", approved).written) == 1


def test_reports_and_plans_are_never_released(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("test-SR", "rtplan", "liver_1frame"):
        source = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        (tmp_path / "src" / f"{name}.dcm").write_bytes(Path(source).read_bytes())
    (tmp_path / "src" / "notes.txt").write_text("Jane Doe")
    released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    assert (len(released.written), len(released.refused), released.left) == (0, 3, 1)
    assert not list((tmp_path / "dst").rglob("*.*"))


def test_every_sample_of_pydicom_is_released_clean_or_refused(tmp_path: Path) -> None:
    options = Deidentification(approve=("US", "OT", "SC", "XA", "burned-in", ""))
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    released = deidentify_folder(folder, tmp_path / "dst", tmp_path / "key.json", options)
    assert len(released.written) >= 40
    for name in released.written:
        out = pydicom.dcmread(tmp_path / "dst" / name)
        assert out.pixel_array.size
        assert not any(e.VR == "PN" and str(e.value) not in ("", out.PatientID) for e in out.iterall())
        assert all(
            action(int(e.tag), e.VR) != "remove" or int(e.tag) >> 16 in (0x0012, 0x0028, 0x7FE0)
            for e in out
            if not e.tag.is_private
        )
    # the palette, compressed and big-endian ones show the same picture
    same = {pydicom.dcmread(tmp_path / "dst" / n).pixel_array.tobytes() for n in released.written}
    assert pydicom.dcmread(folder / "CT_small.dcm").pixel_array.tobytes() in same
    assert pydicom.dcmread(folder / "SC_rgb_rle.dcm").pixel_array.tobytes() in same


def test_damaged_files_do_not_stop_the_rest(tmp_path: Path) -> None:
    lay_out(tmp_path / "src", 2)
    sound = next((tmp_path / "src").rglob("*.dcm")).read_bytes()
    for name, data in (("empty", b""), ("cut", sound[:700]), ("text", b"Jane Doe" * 99), ("short", sound[:-90])):
        (tmp_path / "src" / f"{name}.dcm").write_bytes(data)
    os.mkfifo(tmp_path / "src" / "pipe.dcm")
    os.mkfifo(tmp_path / "src" / "pipe")
    (tmp_path / "src" / "gone.dcm").symlink_to(tmp_path / "nowhere")
    (tmp_path / "src" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "DICOMDIR").write_bytes(sound)
    released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    assert len(released.written) == 2
    assert sorted(refusal.path.stem for refusal in released.refused) == [
        "cut",
        "empty",
        "gone",
        "pipe",
        "short",
        "text",
    ]
    assert released.left == 3
    content = json.loads((tmp_path / "key.json").read_text())
    assert sorted(content["runs"][0]["refused"]) == [
        f"{name}.dcm" for name in ("cut", "empty", "gone", "pipe", "short", "text")
    ]


def test_text_inside_a_compressed_frame_does_not_come_along(tmp_path: Path) -> None:
    source = pydicom.dcmread(pydicom.data.get_testdata_file("SC_rgb_jpeg_dcmtk.dcm", download=False))
    frame = next(pydicom.encaps.generate_frames(source.PixelData, number_of_frames=1))
    comment = b"\xff\xfe" + (2 + 16).to_bytes(2, "big") + b"JANE DOE MRN5501"
    source.PixelData = pydicom.encaps.encapsulate([frame[:2] + comment + frame[2:]])
    source.PatientName = "Doe^Jane"
    save(source, tmp_path / "src" / "a.dcm")
    options = Deidentification(approve=("SC", "OT"))
    released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json", options)
    assert len(released.written) == 1
    assert b"MRN5501" not in (tmp_path / "dst" / released.written[0]).read_bytes()


@pytest.mark.parametrize(
    ("charset", "name", "raw"),
    [
        ("ISO_IR 192", "Müller^Jürgen", "müller"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", "yamada"),
        ("ISO_IR 144", "Люкceмбypг", "люкceмбypг"),
    ],
)
def test_names_in_other_scripts_do_not_survive(tmp_path: Path, charset: str, name: str, raw: str) -> None:
    dataset = image(np.zeros((4, 4), np.uint8), SpecificCharacterSet=charset, PatientName=name)
    dataset.Manufacturer = name.split("^")[0].split("=")[0]
    save(dataset, tmp_path / "src" / "a.dcm")
    released = deidentify_folder(tmp_path / "src", tmp_path / "dst", tmp_path / "key.json")
    assert len(released.written) == 1
    data = (tmp_path / "dst" / released.written[0]).read_bytes()
    for code in ("utf-8", "latin-1", "iso-8859-5", "iso2022_jp"):
        assert raw.encode(code, "ignore") not in data.lower() or not raw.encode(code, "ignore")
        assert (raw.title().encode(code, "ignore") or b"\xff" * 9) not in data


def test_the_last_scan_refuses_what_the_rules_let_through(tmp_path: Path) -> None:
    """A leak planted after the rules ran is found in the bytes: in the header, in UTF-16, and in the pixels."""
    for plant in ("header", "wide", "pixels"):
        dataset = image(np.zeros((8, 8), np.uint8), PatientName="Quillfeather^Ada", PatientID="MRN771234")
        done = clean(Path("a.dcm"), reread(dataset), Pseudonyms(b"k" * 32), Deidentification())
        assert checked_bytes(Path("a.dcm"), done)
        if plant == "header":
            done.dataset.Manufacturer = "of quillfeather"
        elif plant == "wide":
            done.dataset.add_new(0x00286010, "OB", "QuillFeather".encode("utf-16-le"))
        else:
            done.dataset.PixelData = b"xxMRN771234".ljust(64, b"\0")
        with pytest.raises(Unreadable, match="header" if plant != "pixels" else "pixels") as refusal:
            checked_bytes(Path("a.dcm"), done)
        assert "uill" not in str(refusal.value)


def test_characteristics_are_kept_only_on_request_and_great_age_never(tmp_path: Path) -> None:
    dataset, _ = planted(1)
    kept = clean(Path("a"), reread(dataset), Pseudonyms(b"k" * 32), Deidentification(keep_characteristics=True)).dataset
    assert (kept.PatientSex, kept.PatientAge) == ("F", "090Y")
    assert "113108" in [item.CodeValue for item in kept.DeidentificationMethodCodeSequence]
    assert "PatientSex" not in clean(Path("a"), reread(dataset), Pseudonyms(b"k" * 32), Deidentification()).dataset


def test_the_key_file_is_for_its_owner_and_says_who_is_who(tmp_path: Path) -> None:
    everybody = lay_out(tmp_path / "src", 3)
    key = tmp_path / "keys" / "key.json"
    deidentify_folder(tmp_path / "src", tmp_path / "dst", key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    content = json.loads(key.read_text())
    assert sorted(content["patients"].values()) == sorted(who["mrn"] for who in everybody)
    assert len(content["runs"][0]["files"]) == 3
    assert not list(key.parent.glob(".key-*"))


def test_wrong_places_are_refused_together_and_nothing_is_written(tmp_path: Path) -> None:
    lay_out(tmp_path / "src", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not an empty folder") as problem:
        deidentify_folder(tmp_path / "src", tmp_path / "full", tmp_path / "src" / "key.json")
    assert "key file" in str(problem.value)
    for destination in (tmp_path / "src", tmp_path / "src" / "inside", tmp_path):
        with pytest.raises(ValueError, match=r"separate|empty"):
            deidentify_folder(tmp_path / "src", destination, tmp_path.parent / "key.json")
    key = tmp_path / "key.json"
    key.write_text("{}")
    key.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        deidentify_folder(tmp_path / "src", tmp_path / "dst", key)
    key.chmod(0o600)
    with pytest.raises(ValueError, match="damaged"):
        deidentify_folder(tmp_path / "src", tmp_path / "dst", key)
    assert not (tmp_path / "dst").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_the_command_says_how_it_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path / "src", 2)
    key = tmp_path / "key.json"
    deidentify(tmp_path / "src", tmp_path / "dst", key=key)
    assert "wrote 2 files of 2 patients" in capsys.readouterr().out
    save(image(np.zeros((4, 4), np.uint8), "US", ULTRASOUND), tmp_path / "src" / "us.dcm")
    with pytest.raises(SystemExit) as end:
        deidentify(tmp_path / "src", tmp_path / "new", key=key)
    assert end.value.code == 1
    assert "refused 1: is modality US" in capsys.readouterr().out


def test_the_base_table_is_the_standards() -> None:
    assert covered() >= 640
    assert action(0x00100010, "PN") == "pseudonym"
    assert action(0x00081030, "LO") == "remove"  # StudyDescription
    assert action(0x00200032, "DS") == "keep"  # ImagePositionPatient
    assert action(0x00080020, "DA") == "date"  # StudyDate
    assert action(0x60023000, "OW") == "remove"  # any overlay
    assert action(0x00091001, "LO") == "remove"  # any private element
    assert action(0x00404567, "LT") == "remove"  # text that is not listed
