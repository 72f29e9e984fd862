"""Odd inputs of the kinds that people have reported: each has the right values, or a refusal that names the problem.

The source of a study and ``data check`` read the same files and must say the same.
"""

import os
import re
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from polyclinic.data.collection import FromFiles
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.files import read_case
from polyclinic.data.formats.column_roles import same_patients
from polyclinic.data.formats.parsing import clean, may_be_missing
from polyclinic.data.paired_folders import Pairs
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from tests.support.data_sets import loaded
from tests.support.image_files import image, save, series
from tests.support.known import known

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(1, 250, (20, 24)).astype(np.uint8)
DRAWN = np.zeros((20, 24), np.uint8)
DRAWN[3:9, 5:15] = 1


def picture(path: Path, i: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.roll(PIXELS, 13 * i, 0)).save(path)


def manifest(
    text: str, name: Callable[[int], str] = "img/{}.png".format, encoding: str = "utf-8"
) -> Callable[[Path], Path]:
    """Twelve pictures, and a table whose row for picture i is made from ``text``; the first line is the header."""

    def make(root: Path) -> Path:
        head, row = text.split("\n")
        for i in range(12):
            picture(root / name(i), i)
        rows = [row.format(i=i, half=i // 2, label="ab"[i % 2], name=name(i)) for i in range(12)]
        (root / "m.csv").write_bytes("\n".join([head, *rows]).encode(encoding))
        return root / "m.csv"

    return make


def replaced(path: Path, old: str, new: str) -> Path:
    path.write_text(path.read_text().replace(old, new))
    return path


def masks(save_mask: Callable[[Path, int], None]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / "masks").mkdir(parents=True)
        for i in range(4):
            picture(root / f"images/{i}.png", i)
            save_mask(root / f"masks/{i}.png", i)
        return root

    return make


def class_folders(
    save_image: Callable[[Path, int], None], classes: tuple[str, ...] = ("a", "b")
) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for i in range(12):
            place = root / classes[i % len(classes)]
            place.mkdir(parents=True, exist_ok=True)
            save_image(place / f"{i:02d}.png", i)
        return root

    return make


def palette(path: Path, i: int, colors: tuple[int, ...] = (0, 0, 0, 200, 0, 0)) -> None:
    drawn = Image.fromarray(DRAWN, "P")
    drawn.putpalette([*colors, *[0] * (768 - len(colors))])
    drawn.save(path)


def in_alpha(path: Path, i: int) -> None:
    pixels = np.zeros((20, 24, 4), np.uint8)
    pixels[..., 3] = DRAWN * 255
    Image.fromarray(pixels, "RGBA").save(path)


def see_through(path: Path, i: int) -> None:
    pixels = np.stack([np.roll(PIXELS, 13 * i, 0)] * 4, -1)
    Image.fromarray(pixels, "RGBA").save(path)


def printing(path: Path, i: int) -> None:
    Image.fromarray(np.stack([np.roll(PIXELS, 13 * i, 0)] * 4, -1), "CMYK").save(path.with_suffix(".jpg"))


def white_is_zero(path: Path, i: int) -> None:
    tifffile.imwrite(
        path.with_suffix(".tif"), np.roll(PIXELS, 13 * i, 0).astype(np.uint16) * 256, photometric="miniswhite"
    )


def turned(path: Path, i: int) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), np.roll(PIXELS, 13 * i, 0), extratags=[(274, "H", 1, 6, True)])


def animated(path: Path, i: int) -> None:
    Image.fromarray(PIXELS).save(
        path, save_all=True, append_images=[Image.fromarray(PIXELS.T[:20, :24].copy())] if i < 2 else []
    )


def volumes(
    shape: tuple[int, ...], change: Callable[[Path], object] = lambda p: None, **codes: Any
) -> Callable[[Path], Path]:
    def one(path: Path, i: int) -> None:
        data = np.random.default_rng(i).integers(0, 900, shape).astype(np.int16)
        file = nibabel.Nifti1Image(data, np.eye(4))
        if "qform" in codes:
            file.set_sform(np.eye(4), 1)
            file.set_qform(codes["qform"], 1)
        path = path.with_suffix(codes.get("suffix", ".nii"))
        nibabel.save(file, path)
        change(path)

    return class_folders(one)


def edited(at: int, form: str, *values: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, at, *values)
        path.write_bytes(bytes(content))

    return change


def no_affine(path: Path) -> None:
    edited(252, "<2h", 0, 1)(path)
    edited(280, "<12f", *[0.0] * 12)(path)


def damaged(root: Path) -> Path:
    class_folders(picture)(root)
    (root / "a/00.png").write_bytes((root / "a/00.png").read_bytes()[:200])
    (root / "b/01.png").write_bytes(b"")
    return root


def endless(root: Path) -> Path:
    class_folders(picture)(root)
    os.symlink(root, root / "a" / "again", target_is_directory=True)
    return root


def leftovers(root: Path) -> Path:
    class_folders(picture)(root)
    (root / "__MACOSX/a").mkdir(parents=True)
    for path in ("a/._00.png", "__MACOSX/a/00.png", "a/Thumbs.db", "a/.DS_Store"):
        (root / path).write_bytes(b"leftover")
    return root


def twins(root: Path) -> Path:
    """Two files that differ in case only, as a case-sensitive system can have."""
    table = manifest("path,label\nimg/{i}.png,{label}")(root)
    picture(root / "IMG/0.PNG", 3)
    picture(root / "Img/0.png", 4)
    return replaced(table, "img/0.png", "iMg/0.png")


def tilted(root: Path) -> Path:
    for i in range(4):
        turn = np.eye(3)
        turn[1, 2] = np.tan(np.radians(12)) if i == 0 else 0.0
        pixels = np.random.default_rng(i).integers(0, 99, (3, 8, 8)).astype(np.int16)
        series(root / f"p{i}", pixels, turn=turn, PatientID=f"P{i}")
    (root / "m.csv").write_text("path,label\n" + "".join(f"p{i},{'ab'[i % 2]}\n" for i in range(4)))
    return root / "m.csv"


def other_steps(root: Path) -> Path:
    for i in range(4):
        series(root / f"p{i}", np.zeros((3, 8, 8), np.int16) + np.int16(i), PatientID=f"P{i}")
    odd = sorted((root / "p0").iterdir())[0]
    import pydicom

    data = pydicom.dcmread(odd)
    data.PixelSpacing = [0.6, 0.6]
    data.save_as(odd)
    (root / "m.csv").write_text("path,label\n" + "".join(f"p{i},{'ab'[i % 2]}\n" for i in range(4)))
    return root / "m.csv"


def radiographs(root: Path) -> Path:
    for i in range(4):
        values = {"PhotometricInterpretation": "MONOCHROME1"} if i % 2 else {}
        save(
            image(np.full((8, 8), 10, np.uint16), "CR", BitsStored=12, HighBit=11, PatientID=f"P{i}", **values),
            root / f"{i}.dcm",
        )
    (root / "m.csv").write_text("path,label\n" + "".join(f"{i}.dcm,{'ab'[i % 2]}\n" for i in range(4)))
    return root / "m.csv"


def signed(root: Path) -> Path:
    for i in range(4):
        save(
            image(np.full((8, 8), -100 - i, np.int16), RescaleSlope=2, RescaleIntercept=-24, PatientID=f"P{i}"),
            root / f"{i}.dcm",
        )
    (root / "m.csv").write_text("path,label\n" + "".join(f"{i}.dcm,{'ab'[i % 2]}\n" for i in range(4)))
    return root / "m.csv"


def values(source: FromFiles) -> list[float]:
    """The first pixel of each image, in the order of names."""
    found = loaded(source.examples(sorted(source.table().ids))).inputs
    return found.flatten(1)[:, 0].float().tolist()


def twelve(source: FromFiles) -> None:
    assert len(source.table()) == 12
    assert len(source.examples(source.table().ids)) == 12
    labels = known(source.table().labels).tolist()
    assert labels == [i % 2 for i in range(12)] or len(set(labels)) == 2


def six_patients(source: FromFiles) -> None:
    twelve(source)
    assert len(set(source.table().patients)) == 6


def noted(text: str) -> Callable[[FromFiles], None]:
    def right(source: FromFiles) -> None:
        twelve(source)
        assert any(text in note for note in source.info.notes), source.info.notes

    return right


def inverted(source: FromFiles) -> None:
    assert values(source)[0] == pytest.approx((65535 - int(PIXELS[0, 0]) * 256) / 65535)


def upright(source: FromFiles) -> None:
    found = source.examples(source.table().ids)
    assert found.shape[1:] == (24, 20)
    np.testing.assert_array_equal((found.image(0)[0] * 255).round().byte().numpy(), PIXELS[::-1].T)


def equal_names(source: FromFiles) -> None:
    table = source.table()
    assert len(set(table.patients)) == 12
    assert source.collection.sites == ("site",)


@dataclass(frozen=True)
class Case:
    """Files, their source, and either what is checked or what the refusal says. ``warns``: what the check also says."""

    make: Callable[[Path], Path]
    right: Callable[[Any], object] | None = None
    refusal: str = ""
    kind: type[FromFiles] = Manifest
    options: dict[str, Any] = field(default_factory=dict)
    warns: str = ""


def decimals(root: Path) -> Path:
    """Every second row of a patient is a number with a decimal, as pandas writes columns with missing values."""
    table = manifest("path,label,patient\nimg/{i}.png,{label},1{half}")(root)
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line + ".0" * (i % 2) * bool(i) for i, line in enumerate(lines)))
    return table


def two_sites(root: Path) -> Path:
    for i in range(12):
        picture(root / ("x", "y")[i // 6] / "ab"[i % 2] / f"{i % 6}.png", i)
    return root


F = Folders
DECOMPOSED = unicodedata.normalize("NFD", "Mönch")
CASES: dict[str, Case] = {
    # Pictures and masks
    "mask in transparency only": Case(masks(in_alpha), refusal="differs in transparency only", kind=Pairs),
    "mask with colors in its palette": Case(masks(palette), refusal="is a color picture, not a mask", kind=Pairs),
    "mask with grays in its palette": Case(
        masks(lambda p, i: palette(p, i, (0, 0, 0, 255, 255, 255))), lambda s: None, kind=Pairs
    ),
    "transparent pictures": Case(
        class_folders(see_through), noted("transparency is left out"), kind=F, warns="transparency is left out"
    ),
    "colors for printing": Case(class_folders(printing), noted("for printing (CMYK)"), kind=F, warns="for printing"),
    "16 bits, white is zero": Case(class_folders(white_is_zero), inverted, kind=F),
    "TIFF with an orientation": Case(class_folders(turned), upright, kind=F),
    "animated PNG": Case(class_folders(animated), refusal="holds 2 pages", kind=F),
    "names with two extensions": Case(
        class_folders(lambda p, i: picture(p.with_suffix(".jpg.png"), i)), twelve, kind=F
    ),
    "truncated and empty files": Case(damaged, refusal="is not a sound PNG|is empty", kind=F),
    # Folders
    "a loop of links": Case(endless, twelve, kind=F, warns="links to folders are not followed"),
    "leftovers of other systems": Case(leftovers, twelve, kind=F),
    "folders in two Unicode forms": Case(
        class_folders(picture, ("b", unicodedata.normalize("NFC", "é"), "b", unicodedata.normalize("NFD", "é"))),
        twelve,
        kind=F,
    ),
    "equal names at two sites": Case(two_sites, equal_names, kind=F, options={"levels": ("site", "class")}),
    "a folder called unknown": Case(
        class_folders(picture, ("a", "unknown")), refusal="may mean a missing value", kind=F
    ),
    # Volumes
    "volumes over time": Case(
        volumes((6, 5, 4, 3)), noted("3 volumes (a fourth dimension)"), kind=F, warns="read as channels"
    ),
    "one volume over time": Case(volumes((6, 5, 4, 1)), twelve, kind=F),
    "an affine of zeros": Case(volumes((6, 5, 4), no_affine), refusal="its affine is singular", kind=F),
    "sform and qform 50 mm apart": Case(
        volumes((6, 5, 4), qform=np.array([[1.0, 0, 0, 50], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
        noted("place the voxels differently"),
        kind=F,
        warns="place the voxels differently",
    ),
    "sform and qform of other voxel sizes": Case(
        volumes((6, 5, 4), qform=np.diag([2.0, 2, 2, 1])),
        noted("place the voxels differently"),
        kind=F,
        warns="disagree",
    ),
    "a plain file called .nii.gz": Case(
        volumes((6, 5, 4), lambda p: p.rename(p.with_suffix(".nii.gz"))), twelve, kind=F
    ),
    # DICOM
    "a tilted gantry": Case(tilted, refusal=r"sheared by 1\d.* degrees"),
    "spacing that differs within a series": Case(
        other_steps, refusal="differ in orientation or pixel spacing|contains 2 series"
    ),
    "radiographs of both polarities": Case(
        radiographs, lambda s: values(s) == [10.0, 4085.0, 10.0, 4085.0] or pytest.fail(str(values(s)))
    ),
    "signed values with a slope": Case(
        signed, lambda s: values(s) == [-224.0, -226.0, -228.0, -230.0] or pytest.fail(str(values(s)))
    ),
    # Tables
    "backslashes in paths": Case(manifest("path,label\nimg\\{i}.png,{label}"), twelve),
    "a table of composed letters for decomposed names": Case(
        manifest("path,label\nimg/Mönch{i}.png,{label}", lambda i: f"img/{DECOMPOSED}{i}.png"), twelve
    ),
    "names in another case": Case(manifest("path,label\nimg/{i}.png,{label}", "IMG/{}.PNG".format), twelve),
    "names that fit two files": Case(twins, refusal="fit several files that differ in case"),
    "paths of another machine": Case(
        manifest("path,label\nC:\\data\\{i}.png,{label}"), refusal="a file that does not exist"
    ),
    "patients by case": Case(
        lambda p: replaced(manifest("path,label,patient\nimg/{i}.png,{label},P{half}")(p), "b,P", "b,p"),
        six_patients,
        warns="spelled in several ways",
    ),
    "patients by leading zeros": Case(
        lambda p: replaced(manifest("path,label,patient\nimg/{i}.png,{label},{half}")(p), "b,", "b,00"),
        six_patients,
        warns="spelled in several ways",
    ),
    "patients as decimal numbers": Case(decimals, six_patients, warns="spelled in several ways"),
    "patients by an invisible character": Case(
        lambda p: replaced(manifest("path,label,patient\nimg/{i}.png,{label},p{half}")(p), "b,p", "b,\u200bp"),
        six_patients,
        warns="spelled in several ways",
    ),
    "patients that a spreadsheet rounded": Case(
        manifest("path,label,patient\nimg/{i}.png,{label},1.{half}E+11"),
        six_patients,
        warns="a spreadsheet has rounded",
    ),
    "patients numbered by each site": Case(
        lambda p: replaced(manifest("path,label,patient,hospital\nimg/{i}.png,{label},{half},x")(p), "b,0,x", "b,0,y"),
        six_patients,
        warns="1 patient at several sites",
    ),
    "classes by an invisible character": Case(
        lambda p: replaced(manifest("path,label\nimg/{i}.png,{label}")(p), "3.png,b", "3.png,b\u200b"), twelve
    ),
    "a dash as a class": Case(
        lambda p: replaced(manifest("path,label\nimg/{i}.png,{label}")(p), "3.png,b", "3.png,-"),
        refusal=r"'-' \(1\), which may mean a missing value",
    ),
    "unknown as a class": Case(
        lambda p: replaced(manifest("path,label\nimg/{i}.png,{label}")(p), "3.png,b", "3.png,Not reported"),
        refusal="may mean a missing value",
    ),
    "unknown as a declared class": Case(
        lambda p: replaced(manifest("path,label\nimg/{i}.png,{label}")(p), "3.png,b", "3.png,unknown"),
        lambda s: s.info.classes == ("a", "b", "unknown") or pytest.fail(str(s.info.classes)),
        options={"classes": ("a", "b", "unknown")},
    ),
    "plus and minus are classes": Case(
        lambda p: replaced(replaced(manifest("path,label\nimg/{i}.png,{label}")(p), ",a", ",+"), ",b", ",-"), twelve
    ),
    "decimal commas": Case(
        manifest("path;age\nimg/{i}.png;{i},5"),
        refusal="write numbers with a decimal point",
        options={"label": "age", "regression": True},
    ),
    "a byte order mark and semicolons": Case(manifest("path;label\nimg/{i}.png;{label}", encoding="utf-8-sig"), twelve),
    "a column that occurs twice": Case(manifest("path,label,label\nimg/{i}.png,{label},x"), refusal="occurs twice"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_right_or_refused_and_the_check_says_the_same(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    (tmp_path / "data").mkdir()
    root = case.make(tmp_path / "data")
    source = case.kind(path=str(root), **case.options)  # type: ignore[call-arg]
    if case.right is not None:
        case.right(source)
        report = check_folder(root, given=case.options)
        assert not [f.message for f in report.findings if f.level == "error"]
        assert report.examples == len(source.table())
    else:
        with pytest.raises(DataError, match=case.refusal):
            source.examples(source.table().ids)
        try:
            report = check_folder(root, given=case.options)
            errors = "\n".join(f.message for f in report.findings if f.level == "error")
        except DataError as refusal:  # nothing could be read
            errors = str(refusal)
        assert re.search(case.refusal, errors), errors
    if case.warns:
        assert any(case.warns in f.message for f in report.findings), [f.message for f in report.findings]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("P1", "p1", True),
        ("P 2", "P-2", True),
        ("P_2", "P/2", True),
        ("007", "7", True),
        ("12.0", "12", True),
        ("P03", "P3", True),
        ("é", "e\u0301", True),
        ("p1\ufeff", "p1", True),
        ("1-12", "11-2", False),
        ("12", "1.2", False),
        ("P10", "P1", False),
        ("P2", "P20", False),
        ("a1", "b1", False),
        ("-1", "1", False),
    ],
)
def test_spellings_of_one_patient(one: str, other: str, equal: bool) -> None:
    patients, notes = same_patients([one, other, "someone else"])
    assert (patients[0] == patients[1]) is equal
    assert bool(notes) is equal
    assert not any(one in note for note in notes if len(one) > 1)  # a report never shows an id


def test_feature_tables_use_the_same_rule(tmp_path: Path) -> None:
    rows = [f"{'Pp'[i % 2]}{i // 2},{40 + i},{i % 2}" for i in range(24)]
    (tmp_path / "t.csv").write_text("\n".join(["id,age,label", *rows]))
    source = FeatureTable(path=str(tmp_path / "t.csv"), label="label", patient="id")
    assert len(set(source.table().patients)) == 12
    assert any("spelled in several ways" in note for note in source.info.notes)
    (tmp_path / "t.csv").write_text("\n".join(["id;age;label", *(f"{i};4{i},5;{i % 2}" for i in range(24))]))
    comma = FeatureTable(path=str(tmp_path / "t.csv"), label="label", patient="id")
    with pytest.raises(DataError, match="write numbers with a decimal point"):
        comma.examples(comma.table().ids)


@pytest.mark.parametrize("word", ["-", "--", "Unknown", "not available", "N.A.", "UNK", "."])
def test_words_that_may_mean_missing(word: str) -> None:
    assert may_be_missing(word)


@pytest.mark.parametrize("word", ["+", "negative", "none", "normal", "HER2-", "0", "no finding"])
def test_words_that_do_not(word: str) -> None:
    assert not may_be_missing(word)


def test_invisible_characters_are_left_out() -> None:
    assert clean(" \ufeffa\u200bb\u00a0") == "ab"


def test_the_recognized_table_reads_odd_paths(tmp_path: Path) -> None:
    """``data check`` of a table with backslashes prints a [data] table that reads it."""
    table = manifest("path,label,patient\nimg\\{i}.png,{label},p{half}")(tmp_path)
    data = check_folder(table).data
    assert len(DataSpec(**data).source().table()) == 12


def test_units_other_than_millimeters_are_converted(tmp_path: Path) -> None:
    file = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([500.0, 500, 500, 1]))
    file.header.set_xyzt_units("micron")
    nibabel.save(file, tmp_path / "a.nii")
    assert read_case([tmp_path / "a.nii"]).image.spacing_mm == (0.5, 0.5, 0.5)
