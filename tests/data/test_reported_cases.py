"""Situations that people have reported, from nnU-Net, MONAI, pydicom, dicom2nifti, fMRIPrep, Pillow and others.

Each row makes the files of one situation and says what is right: the values, or a refusal that names the problem. Both
readers of a data set, the source of a study and ``data check``, must say the same.
"""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pydantic import ValidationError

from polyclinic.data.collection import FromFiles
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.files import ImageOptions, read_case, read_image
from polyclinic.data.paired_folders import Pairs
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.dicom_images import DicomImages
from polyclinic.data.sources.folders import Folders
from tests.support.data_sets import data_spec, loaded
from tests.support.image_files import image, nifti_bytes, nrrd_bytes, pydicom, series
from tests.support.image_files import save as save_dicom

LPS = np.array([[-1.0, 0, 0, 30], [0, -1, 0, 40], [0, 0, 2, -20], [0, 0, 0, 1]])
MIRRORED = np.array([[1.0, 0, 0, 19], [0, 1, 0, 27], [0, 0, 2, -20], [0, 0, 0, 1]])
SHAPE = (12, 14, 10)
LESION = np.zeros(SHAPE, np.uint8)
LESION[2:5, 3:7, 2:4] = 1
RNG = np.random.default_rng(0)


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def nnunet(
    root: Path,
    mask: Callable[[int], np.ndarray] = lambda i: LESION,
    mask_affine: np.ndarray | None = LPS,
    affine: np.ndarray | None = LPS,
    second: np.ndarray | None = None,
    labels: dict[str, int] | None = None,
) -> Path:
    """Four cases in nnU-Net's layout; the lesion is 100 brighter than the rest."""
    for i in range(4):
        nifti(root / f"imagesTr/case_{i:03d}_0000.nii.gz", LESION.astype(np.int16) * 100 + i, affine)
        if second is not None:
            nifti(root / f"imagesTr/case_{i:03d}_0001.nii.gz", LESION.astype(np.int16), second)
        nifti(root / f"labelsTr/case_{i:03d}.nii.gz", mask(i), mask_affine)
    if labels is not None:
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def slope_nan(root: Path) -> Path:
    import gzip

    for path in (nnunet(root) / "labelsTr").iterdir():
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[112:120] = struct.pack("<2f", np.nan, np.nan)
        path.write_bytes(gzip.compress(bytes(content)))
    return root


def nrrd(root: Path, detached: bool = False) -> Path:
    """Images in LPS; masks as pynrrd writes an array without a header, or everything with detached headers."""
    for i in range(4):
        volume = LESION.T.astype(np.int16) * 100 + i
        for folder, data, plain in (("images", volume, False), ("labels", LESION.T, not detached)):
            fields = {"space": "", "space_directions": "", "space_origin": "", "endian": ""} if plain else {}
            (root / folder).mkdir(parents=True, exist_ok=True)
            content = nrrd_bytes(
                np.ascontiguousarray(data), **({"data_file": f"c{i}.raw"} if detached else {}), **fields
            )
            if detached:
                head, _, voxels = content.partition(b"\n\n")
                (root / folder / f"c{i}.nhdr").write_bytes(head + b"\n\n")
                (root / folder / f"c{i}.raw").write_bytes(voxels)
            else:
                (root / folder / f"c{i}.nrrd").write_bytes(content)
    return root


def pictures(root: Path, jpeg: bool = False, exif: int = 0) -> Path:
    drawn = np.zeros((20, 24), np.uint8)
    drawn[3:9, 5:15] = 255
    for i in range(4):
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        tags = Image.Exif()
        tags[0x0112] = exif or 1
        Image.fromarray(drawn | np.uint8(i)).save(root / f"images/c{i}.png", exif=tags)
        kwargs: dict[str, Any] = {"quality": 75} if jpeg else {}
        Image.fromarray(np.roll(drawn, i, 1)).save(root / f"masks/c{i}.{'jpg' if jpeg else 'png'}", **kwargs)
    return root


def class_folders(root: Path, make: Callable[[Path, int, str], object]) -> Path:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(6):
            make(root / label / str(i), i, label)
    return root


TWELVE = RNG.integers(0, 4096, (20, 24)).astype(np.uint16)


def big_endian(path: Path, i: int, label: str) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), np.roll(TWELVE, i + 7 * (label == "b")), byteorder=">")


def with_nan(path: Path, i: int, label: str) -> None:
    values = RNG.random((20, 24)).astype(np.float32)
    values[2, 3] = np.nan if i == 0 else 0
    tifffile.imwrite(path.with_suffix(".tif"), values)


def float_beside_png(path: Path, i: int, label: str) -> None:
    if label == "a":
        tifffile.imwrite(path.with_suffix(".tif"), (RNG.random((20, 24)) * 255).astype(np.float32))
    else:
        Image.fromarray((RNG.random((20, 24)) * 255).astype(np.uint8)).save(path.with_suffix(".png"))


def twelve_beside_eight(path: Path, i: int, label: str) -> None:
    if label == "a":
        tifffile.imwrite(path.with_suffix(".tif"), np.roll(TWELVE, i))
    else:
        Image.fromarray((RNG.random((20, 24)) * 255).astype(np.uint8)).save(path.with_suffix(".png"))


def overlaps(source: FromFiles) -> None:
    """The lesion is bright, and the mask is on it, in every case."""
    examples = loaded(source.examples(source.table().ids))
    for x, y in zip(examples.inputs, examples.targets, strict=True):
        assert torch.equal(x[0] > 50, y == 1)
    assert source.info.classes[:1] == ("background",)
    assert len(source.info.classes) == 2


def twelve_bits(source: FromFiles) -> None:
    row = {name: i for i, name in enumerate(source.table().ids)}
    found = loaded(source.examples(source.table().ids)).inputs
    np.testing.assert_allclose(found[row["b/3.tif"], 0].numpy(), np.roll(TWELVE, 10) / 65535, rtol=1e-6)


@dataclass(frozen=True)
class Situation:
    """Files, the options under which they are read, and either what is checked or what the refusal says."""

    make: Callable[[Path], Path]
    right: Callable[[Any], None] | None = None
    refusal: str = ""
    kind: type[FromFiles] = Pairs
    options: dict[str, Any] = field(default_factory=dict)


S = Situation
ONE_HOT = np.stack([1 - LESION, LESION], -1)
CASES: dict[str, Situation] = {
    "A1 mask with identity affine": S(
        lambda p: nnunet(p, mask_affine=np.eye(4)), refusal="another grid than its image"
    ),
    "A1c channels on another grid": S(lambda p: nnunet(p, second=np.eye(4)), refusal="the channel is on another grid"),
    "A1d mask in another axis order": S(lambda p: nnunet(p, lambda i: LESION[::-1, ::-1], MIRRORED), overlaps),
    "A2 one-hot mask": S(
        lambda p: nnunet(p, lambda i: ONE_HOT), refusal=r"2 channels that hold one-hot.*regions = \[0, 1\]"
    ),
    "A2 one-hot mask, declared": S(lambda p: nnunet(p, lambda i: ONE_HOT), overlaps, options={"regions": (0, 1)}),
    "A4 slope of NaN": S(slope_nan, overlaps),
    "A5 masks of 0/1 and 0/255": S(
        lambda p: nnunet(p, lambda i: LESION * np.uint8(1 + 254 * (i % 2))),
        refusal=r"1 \(in 2 of 4 masks\), 255 \(in 2\)",
    ),
    "A5 masks of 0/255 only": S(lambda p: nnunet(p, lambda i: LESION * np.uint8(255)), overlaps),
    "A10 detached headers": S(lambda p: nrrd(p, detached=True), overlaps),
    "A11 labels beyond dataset.json": S(
        lambda p: nnunet(p, lambda i: LESION * 2, labels={"background": 0, "tumor": 1}),
        refusal=r"2 \(in 4 of 4 masks\)",
    ),
    "A11 a number that dataset.json leaves out": S(
        lambda p: nnunet(p, lambda i: LESION * (1 + i % 2), labels={"background": 0, "tumor": 2}),
        refusal=r"1 \(in 2 of 4 masks\). Declared are 0, 2",
    ),
    "A13 NRRD mask without space": S(nrrd, overlaps),
    "A14 image without form, mask with one": S(
        lambda p: nnunet(p, mask_affine=np.eye(4), affine=None), refusal="its image states none"
    ),
    "E2 big-endian 16-bit TIFF": S(lambda p: class_folders(p, big_endian), twelve_bits, kind=Folders),
    "E2d NaN in a TIFF": S(
        lambda p: class_folders(p, with_nan), refusal="2 of .*|1 of 480 voxels are not finite", kind=Folders
    ),
    "E9b EXIF of the image only": S(lambda p: pictures(p, exif=3), refusal="EXIF orientation 3"),
    "E12 JPEG masks": S(lambda p: pictures(p, jpeg=True), refusal="its compression loses detail"),
    "E14 real numbers among PNG": S(
        lambda p: class_folders(p, float_beside_png), refusal="signed or real numbers", kind=Folders
    ),
    "E14 twelve bits among eight": S(
        lambda p: class_folders(p, twelve_beside_eight), refusal="set bits = 12", kind=Folders
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_right_or_refused_and_the_check_says_the_same(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    root = case.make(tmp_path / "data")
    source = case.kind(path=str(root), **case.options)  # type: ignore[call-arg]
    report = check_folder(root, given=case.options)
    found = "\n".join(f.message for f in report.findings if f.level == "error")
    if case.right is not None:
        case.right(source)
        assert not found
        assert report.examples == len(source.table())
        return
    with pytest.raises(DataError, match=case.refusal):
        source.examples(source.table().ids)

    assert re.search(case.refusal, found), found


def header(path: Path, **fields: Any) -> Path:
    """A NIfTI file whose header was edited by hand."""
    content = bytearray(nifti_bytes())
    for at, form, *values in fields.get("edits", ()):
        struct.pack_into(form, content, at, *values)
    path.write_bytes(bytes(content))
    return path


QFORM, SFORM, SLOPE, ZOOM = (252, "<h", 1), (254, "<h", 0), (112, "<2f", np.nan, np.nan), (76, "<f", 0.0)


@pytest.mark.parametrize("edits", [[SLOPE], [QFORM, SFORM, ZOOM], [QFORM, SFORM, (76, "<f", -1.0)]])
def test_headers_are_read_as_nibabel_and_itk_do(tmp_path: Path, edits: list[Any]) -> None:
    """B b2 (slope of NaN) and b8b (qfac of 0)."""
    sitk = pytest.importorskip("SimpleITK")
    path = header(tmp_path / "a.nii", edits=edits)
    ours, theirs, itk = read_case([path]).image, nibabel.load(path), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(ours.array.numpy(), np.asarray(theirs.dataobj).T)
    np.testing.assert_allclose(ours.affine.numpy(), theirs.affine, atol=1e-6)
    np.testing.assert_array_equal(ours.array.numpy(), sitk.GetArrayFromImage(itk))
    corner = ours.affine.numpy() @ [3, 4, 5, 1]
    np.testing.assert_allclose(itk.TransformIndexToPhysicalPoint((3, 4, 5)), corner[:3] * [-1, -1, 1], atol=1e-5)


def test_doubtful_geometry_is_noted(tmp_path: Path) -> None:
    """B b1 (sform and qform mirror each other) and b5 (sheared)."""
    mirrored = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    mirrored.set_sform(np.eye(4), 1)
    mirrored.set_qform(np.diag([-1.0, 1, 1, 1]), 1)
    nibabel.save(mirrored, tmp_path / "b1.nii")
    assert any("mirror images of each other" in note for note in read_case([tmp_path / "b1.nii"]).notes)
    sheared = np.eye(4)
    sheared[1, 2] = np.tan(np.radians(15))
    image_ = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    image_.set_sform(sheared, 1)
    nibabel.save(image_, tmp_path / "b5.nii")
    assert any("not perpendicular" in note for note in read_case([tmp_path / "b5.nii"]).notes)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "sound.nii")
    assert read_case([tmp_path / "sound.nii"]).notes == ()


def test_nan_background_needs_a_fill(tmp_path: Path) -> None:
    """B b9: SPM and CAT12 write NaN outside the brain."""
    data = RNG.random((4, 5, 6)).astype(np.float32)
    data[0] = np.nan
    nifti(tmp_path / "a.nii", data)
    with pytest.raises(DataError, match=r"30 of 120 voxels.*set fill = 0"):
        read_image([tmp_path / "a.nii"])
    found = read_image([tmp_path / "a.nii"], options=ImageOptions(fill=0.0)).pixels
    assert int((found == 0).sum()) == 30
    assert bool(torch.isfinite(found).all())


def test_the_check_reads_as_the_study_is_told_to(tmp_path: Path) -> None:
    """fill, regions, ignore and geometry_tolerance_mm: what is refused without them passes with them."""
    moved = LPS.copy()
    moved[0, 3] += 0.05
    unknown = np.where(LESION, LESION, 0)
    unknown[0] = 255
    cases: tuple[tuple[str, Callable[[Path], Path], dict[str, Any], str], ...] = (
        ("fill", lambda p: nan_volumes(p), {"fill": 0}, "not finite numbers"),
        ("regions", lambda p: nnunet(p, lambda i: ONE_HOT), {"regions": [0, 1]}, "one-hot"),
        ("ignore", lambda p: nnunet(p, lambda i: unknown), {"ignore": 255}, "some masks|mask values are not"),
        ("tolerance", lambda p: nnunet(p, mask_affine=moved), {"geometry_tolerance_mm": 0.1}, "another grid"),
    )
    for name, make, given, says in cases:
        root = make(tmp_path / name)
        wrong = "\n".join(f.message for f in check_folder(root).findings if f.level == "error")
        assert re.search(says, wrong), name
        report = check_folder(root, given=given)
        assert not [f.message for f in report.findings if f.level == "error"], name
        assert report.data.items() >= given.items()
        source = DataSpec(**report.data).source()
        assert len(source.examples(source.table().ids)) == report.examples


def nan_volumes(root: Path) -> Path:
    for label in ("a", "b"):
        for i in range(3):
            data = RNG.random((4, 5, 6)).astype(np.float32)
            data[0] = np.nan
            nifti(root / label / f"{i}.nii", data)
    return root


def test_the_check_selects_series_as_the_study_does(tmp_path: Path) -> None:
    stack(tmp_path / "d", [0.0, 2, 4, 6], PatientID="P1", SeriesDescription="T1 axial")
    stack(tmp_path / "d", [0.0, 2, 4], "t", PatientID="P1", SeriesDescription="T2")
    report = check_folder(tmp_path / "d", given={"series": {"description": "t1*"}})
    assert report.examples == 1
    assert any("1 series do not have the values" in f.message for f in report.findings)
    assert check_folder(tmp_path / "d").examples == 2


def test_brains_with_nan_can_be_a_study(tmp_path: Path) -> None:
    nan_volumes(tmp_path)
    refused, filled = Folders(path=str(tmp_path)), Folders(path=str(tmp_path), fill=0.0)
    with pytest.raises(DataError, match="set fill = 0"):
        refused.examples(refused.table().ids)
    assert int((loaded(filled.examples(filled.table().ids)).inputs == 0).sum()) == 6 * 30
    assert refused.fingerprint != filled.fingerprint


def table(root: Path, *patients: str) -> str:
    (root / "labels.csv").write_text(
        "patient,label\n" + "".join(f"{p},{'ab'[i % 2]}\n" for i, p in enumerate(patients))
    )
    return str(root / "labels.csv")


def stack(folder: Path, heights: list[float], prefix: str = "s", **values: Any) -> list[Path]:
    """A CT series with slices at the given heights; slice k has the value k."""
    uid, paths = pydicom.uid.generate_uid(), []
    for k, height in enumerate(heights):
        data = image(np.full((8, 8), k, np.int16), SeriesInstanceUID=uid, RescaleSlope=1, RescaleIntercept=0)
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, height]
        data.PixelSpacing, data.SliceThickness = [1, 1], 1
        for name, value in values.items():
            setattr(data, name, value)
        paths.append(save_dicom(data, folder / f"{prefix}{k:03d}.dcm"))
    return paths


def test_slices_that_jitter_are_refused_unless_declared(tmp_path: Path) -> None:
    """D2b (0.02 mm in 1 mm) and D2c (positions rounded)."""
    for heights, tolerance in (([0, 1.02, 1.99, 3.01, 4, 5.02], 0.03), ([0, 1, 3, 4, 5, 6], 0.7)):
        folder = tmp_path / str(tolerance)
        stack(folder, list(map(float, heights)))
        with pytest.raises(DataError, match=r"unevenly spaced|slices are missing"):
            read_case([folder])
        volume = read_case([folder], options=ImageOptions(geometry_tolerance_mm=tolerance)).image
        assert volume.array[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        with pytest.raises(DataError, match=r"unevenly spaced|slices are missing"):
            read_case([folder], options=ImageOptions(geometry_tolerance_mm=0.01))


def test_a_copied_slice_is_called_a_copy(tmp_path: Path) -> None:
    """D4."""
    paths = stack(tmp_path, [0.0, 2, 4, 6])
    (tmp_path / "s002 (1).dcm").write_bytes(paths[2].read_bytes())
    with pytest.raises(DataError, match="is a copy of another file"):
        read_case([tmp_path])


def test_localizers_and_flat_exports_are_grouped_by_series(tmp_path: Path) -> None:
    """D6x (a localizer in the folder) and D21c (two patients in one folder)."""
    stack(tmp_path / "d", [0.0, 2, 4, 6], PatientID="P1", SeriesDescription="T1 axial")
    stack(tmp_path / "d", [0.0, 2, 4], "t", PatientID="P2", SeriesDescription="T2")
    stack(tmp_path / "d", [0.0], "loc", PatientID="P1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    source = DicomImages(path=str(tmp_path / "d"), labels=table(tmp_path, "P1", "P2"))
    assert len(source.table()) == 2
    assert "Left out: 1 localizers." in source.collection.info.notes
    assert sorted(len(entry.images) for entry in source.collection.entries) == [3, 4]
    report = check_folder(tmp_path / "d")
    assert report.examples == 2
    assert not [f for f in report.findings if f.code == "unreadable"]
    one = replace(source, series={"description": "t1*"})
    picture = loaded(one.examples(one.table().ids))
    assert picture.inputs.shape == (1, 1, 4, 8, 8)
    with pytest.raises(DataError, match=r"2 series of .*choose one with series = {description = ...}"):
        read_case([tmp_path / "d"])
    assert read_case([tmp_path / "d"], options=ImageOptions(series={"description": "T2"})).image.size == (3, 8, 8)
    with pytest.raises(DataError, match="none of which has the values"):
        read_case([tmp_path / "d"], options=ImageOptions(series={"number": "9"}))
    with pytest.raises(DataError, match="series = patient"):
        replace(source, series={"patient": "P1"})


def test_a_localizer_that_is_not_marked_is_named(tmp_path: Path) -> None:
    """D6x: a single slice in the folder of a series."""
    stack(tmp_path / "d", [0.0, 2, 4, 6], PatientID="P1", SeriesNumber=2)
    stack(tmp_path / "d", [0.0], "loc", PatientID="P1", SeriesNumber=1)
    source = DicomImages(path=str(tmp_path / "d"), labels=table(tmp_path, "P1"))
    with pytest.raises(DataError, match=r"some are single slices and some are volumes.*slices = 2"):
        source.examples(source.table().ids)
    assert "1 single slice among volumes" in "\n".join(check_folder(tmp_path / "d").lines())
    for chosen in (replace(source, slices=2), replace(source, series={"number": "2"})):
        assert loaded(chosen.examples(chosen.table().ids)).inputs.shape == (1, 1, 4, 8, 8)
    with pytest.raises(DataError, match=r"2 series of \d and \d files; choose one with series = {number = ...}"):
        read_case([tmp_path / "d"])


def test_files_without_a_suffix_are_dicom_by_content(tmp_path: Path) -> None:
    """D21b: radiographs named IM0, IM1."""
    for i in range(2):
        save_dicom(image(np.full((8, 8), i, np.int16), "CR", PatientID=f"P{i}"), tmp_path / "d" / f"IM{i}")
    source = DicomImages(path=str(tmp_path / "d"), labels=table(tmp_path, "P0", "P1"))
    assert loaded(source.examples(source.table().ids)).inputs[:, 0, 0, 0].tolist() == [0, 1]
    assert check_folder(tmp_path / "d").examples == 2


def test_padding_is_noted_or_filled(tmp_path: Path) -> None:
    """D9: PixelPaddingValue outside the field of view."""
    pixels = np.full((8, 8), 50, np.int16)
    pixels[0] = -2000
    path = save_dicom(
        image(pixels, RescaleSlope=1, RescaleIntercept=-1024, PixelPaddingValue=-2000), tmp_path / "a.dcm"
    )
    case = read_case([path])
    assert any("padding voxels (PixelPaddingValue)" in note for note in case.notes)
    assert float(case.image.array.min()) == -3024
    filled = read_case([path], options=ImageOptions(fill=-1024.0)).image.array
    assert sorted(set(filled.flatten().tolist())) == [-1024, -974]


def test_ct_without_rescale_is_not_hounsfield(tmp_path: Path) -> None:
    """D24."""
    plain = read_case([save_dicom(image(np.zeros((8, 8), np.int16)), tmp_path / "a.dcm")])
    assert plain.image.units == ""
    assert any("not Hounsfield units" in note for note in plain.notes)
    scaled = save_dicom(image(np.zeros((8, 8), np.int16), RescaleSlope=1, RescaleIntercept=0), tmp_path / "b.dcm")
    assert read_case([scaled]).image.units == "HU"


def test_notes_reach_the_report(tmp_path: Path) -> None:
    source = Pairs(path=str(nrrd(tmp_path)))
    assert "4 images: the mask states no position and takes the grid of its image." in source.info.notes


def test_one_reason_is_one_line(tmp_path: Path) -> None:
    """Sixty masks with one fault are one line, with the number of files and the first names."""
    root = nnunet(tmp_path, mask_affine=np.eye(4))
    source = Pairs(path=str(root))
    with pytest.raises(DataError) as refusal:
        source.examples(source.table().ids)
    (line,) = refusal.value.problems
    assert line.startswith("4 files: the mask is on another grid")
    assert line.endswith("(case_000, case_001, case_002, ...)")
    (found,) = [line for line in check_folder(root).lines() if "another grid" in line]
    assert found.startswith("x the mask is on another grid")
    assert "and 1 more" in found
    for i in range(4):
        (root / f"imagesTr/case_{i:03d}_0000.nii.gz").write_bytes(b"")
    (found,) = [line for line in check_folder(root).lines() if "0 bytes" in line]
    assert found.endswith("and 1 more: is empty (0 bytes)")


def test_nan_in_an_archive_is_found(tmp_path: Path) -> None:
    images = RNG.random((6, 8, 8)).astype(np.float32)
    images[2, 1, 1] = np.nan
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 2)
    found = [f.message for f in check_folder(tmp_path / "a.npz").findings if f.level == "error"]
    assert any("1 of 64 voxels are not finite" in message for message in found)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".hdr", ".nii.gz"])
def test_volumes_that_simpleitk_writes_are_read_alike(tmp_path: Path, suffix: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    data = RNG.integers(-900, 900, (4, 5, 6)).astype(np.int16)
    theirs = sitk.GetImageFromArray(data)
    theirs.SetSpacing((0.5, 0.75, 2.0))
    theirs.SetOrigin((5, -6, 7))
    theirs.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    for compressed in (False, True):
        sitk.WriteImage(theirs, str(tmp_path / f"a{suffix}"), compressed)
        ours = read_case([tmp_path / f"a{suffix}"]).image
        np.testing.assert_array_equal(ours.array.numpy(), data)
        corner = ours.affine.numpy() @ [1, 2, 3, 1]
        np.testing.assert_allclose(corner[:3] * [-1, -1, 1], theirs.TransformIndexToPhysicalPoint((1, 2, 3)), atol=1e-5)
        assert ours.positioned


def test_freesurfer_volumes_are_read_as_nibabel_does(tmp_path: Path) -> None:
    data = RNG.integers(0, 255, (4, 5, 6)).astype(np.uint8)
    nibabel.save(nibabel.MGHImage(data, LPS), tmp_path / "a.mgz")
    ours, theirs = read_case([tmp_path / "a.mgz"]).image, nibabel.load(tmp_path / "a.mgz")
    np.testing.assert_array_equal(ours.array.numpy(), np.asarray(theirs.dataobj).T)
    np.testing.assert_allclose(ours.affine.numpy(), theirs.affine)
    assert ours.positioned


def test_analyze_has_a_size_and_no_orientation(tmp_path: Path) -> None:
    data = RNG.integers(0, 255, (4, 5, 6)).astype(np.int16)
    nibabel.save(nibabel.AnalyzeImage(data, np.diag([2.0, 3, 4, 1])), tmp_path / "a.img")
    ours = read_case([tmp_path / "a.hdr"])
    np.testing.assert_array_equal(ours.image.array.numpy(), data.T)
    assert ours.image.spacing_mm == (4, 3, 2)
    assert not ours.image.positioned
    assert any("left and right are a guess" in note for note in ours.notes)


def test_damaged_metaimages_are_refused(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(RNG.integers(0, 9, (4, 5, 6)).astype(np.int16)), str(path), True)
    sound = path.read_bytes()
    damages: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
        (lambda b: b[:-20], "truncated|damaged"),
        (lambda b: b.replace(b"DimSize = 6 5 4", b"DimSize = 6 5 9"), "truncated"),
        (lambda b: b.replace(b"DimSize = 6 5 4", b"DimSize = 6 5 1"), "inflate to more"),
        (lambda b: b.replace(b"DimSize = 6 5 4", b"DimSize = 60000 5 4"), "limit is 32768"),
        (lambda b: b.replace(b"LOCAL", b"../x.raw"), "one file in the same folder"),
        (lambda b: b[:40], "header"),
    )
    for change, reason in damages:
        path.write_bytes(change(sound))
        with pytest.raises(DataError, match=reason):
            read_case([path])


def test_a_series_of_the_helper_is_sound(tmp_path: Path) -> None:
    series(tmp_path, np.zeros((3, 4, 5), np.int16))
    assert read_case([tmp_path]).notes == ()


def test_a_study_file_may_state_every_option(tmp_path: Path) -> None:
    stack(tmp_path / "d", [0.0, 2, 4], PatientID="P1", SeriesDescription="T1 axial")
    own: dict[str, Any] = {
        "labels": table(tmp_path, "P1"),
        "series": {"description": "T1*"},
        "fill": 0.0,
        "geometry_tolerance_mm": 0.1,
    }
    source = DataSpec(path=str(tmp_path / "d"), kind="dicom", **own).source()
    assert isinstance(source, DicomImages)
    assert source.options == ImageOptions(0.0, 0.1, (), 0, {"description": "T1*"})
    with pytest.raises(ValidationError, match="bits") as refusal:
        data_spec(path=str(tmp_path / "d"), kind="pairs", bits=17)
    assert refusal.value.errors()[0]["loc"] == ("bits",)
