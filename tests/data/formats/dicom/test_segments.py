"""DICOM segmentations and structure sets are masks on the grid of their image, wherever their frames and contours lie."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from polyclinic.cli.app import app
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.files import ImageOptions, read_case, read_image
from polyclinic.data.formats.dicom.segments import read_segments, segments_of
from polyclinic.data.formats.grids import GridMismatch
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.quality.recognition import recognize
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.dicom_images import DicomImages
from polyclinic.data.sources.manifest import Manifest
from polyclinic.studies.config import study_config
from polyclinic.studies.config.new_study import new_study
from tests.support.data_sets import loaded
from tests.support.image_files import Dataset, Items, image, oblique, pydicom, save, series

SIZE = (5, 8, 9)
STEP = (2.5, 0.5, 0.75)
ORIGIN = np.array([10.0, -20.0, 30.0])
VALUES = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE)
BOTH = ImageOptions(segments=("liver", "tumor"))


def drawn(seed: int = 0) -> np.ndarray:
    """Two segments that overlap; shape [2, Z, Y, X]."""
    rng = np.random.default_rng(seed)
    liver = rng.random(SIZE) < 0.4
    liver[0] = False
    return np.stack([liver, rng.random(SIZE) < 0.1])


def seg(
    masks: np.ndarray,
    turn: np.ndarray,
    names: Sequence[str] = ("Liver", "Tumor"),
    kind: str = "BINARY",
    flip: bool = False,
    corner: tuple[int, int] = (0, 0),
) -> Dataset:
    """A segmentation of the volume that ``series`` writes; empty frames are left out, and frames are in random order.

    ``flip``: rows run the other way. ``corner``: first row and column of a smaller frame.
    """
    top, left = corner
    frames, places = [], []
    for number, mask in enumerate(masks, 1):
        for k in np.flatnonzero(mask.any((1, 2))):
            plane = mask[k, top:, left:]
            start = ORIGIN + turn @ np.array([left * STEP[2], top * STEP[1], k * STEP[0]])
            if flip:
                start, plane = start + turn[:, 1] * STEP[1] * (plane.shape[0] - 1), plane[::-1]
            frames.append(plane.astype(np.uint8) * (255 if kind == "FRACTIONAL" else 1))
            places.append((number, start))
    order = np.random.default_rng(1).permutation(len(frames))
    pixels = np.stack([frames[i] for i in order])
    data = image(pixels, "SEG", "1.2.840.10008.5.1.4.1.1.66.4", SegmentationType=kind)
    if kind == "BINARY":
        packed = np.packbits(pixels.reshape(-1), bitorder="little").tobytes()
        data.PixelData = packed + b"\0" * (len(packed) % 2)
        data.BitsAllocated, data.BitsStored, data.HighBit = 1, 1, 0
    else:
        data.MaximumFractionalValue = 255
    data.SegmentSequence = Items([entry(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(names, 1)])
    down = turn[:, 1] * (-1 if flip else 1)
    turned = entry(ImageOrientationPatient=[float(f"{v:.9g}") for v in (*turn[:, 0], *down)])
    measures = entry(PixelSpacing=[STEP[1], STEP[2]], SliceThickness=STEP[0])
    shared = entry(PlaneOrientationSequence=Items([turned]), PixelMeasuresSequence=Items([measures]))
    data.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for i in order:
        number, start = places[i]
        at = entry(ImagePositionPatient=[float(f"{v:.9g}") for v in start])
        which = entry(ReferencedSegmentNumber=number)
        groups.append(entry(PlanePositionSequence=Items([at]), SegmentIdentificationSequence=Items([which])))
    data.PerFrameFunctionalGroupsSequence = Items(groups)
    return data


def entry(**values: Any) -> Dataset:
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def painted(masks: np.ndarray) -> np.ndarray:
    return np.where(masks[1], 2, np.where(masks[0], 1, 0))


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turn", [np.eye(3), oblique()], ids=["axial", "oblique"])
def test_frames_are_placed_by_position(tmp_path: Path, turn: np.ndarray, flip: bool, kind: str) -> None:
    series(tmp_path / "ct", VALUES, STEP, turn, ORIGIN)
    masks = drawn()
    case = read_case([tmp_path / "ct"], save(seg(masks, turn, kind=kind, flip=flip), tmp_path / "seg.dcm"), BOTH)
    assert case.mask is not None
    np.testing.assert_array_equal(case.image.array.numpy(), VALUES)
    np.testing.assert_array_equal(case.mask.array.numpy(), painted(masks))


def test_a_segmentation_of_a_part_and_an_image_of_another_format(tmp_path: Path) -> None:
    """The image was converted to NIfTI in another axis order; the frames cover a part of its slices."""
    masks = drawn()
    masks[:, :, :2] = masks[:, :, :, :3] = False
    path = save(seg(masks, np.eye(3), corner=(2, 3)), tmp_path / "seg.dcm")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.diag([-STEP[2], -STEP[1], STEP[0]]), ORIGIN * [-1, -1, 1]
    turned = nibabel.Nifti1Image(VALUES.transpose(2, 1, 0), affine).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nibabel.save(turned, tmp_path / "ct.nii.gz")
    picture = read_image([tmp_path / "ct.nii.gz"], path, BOTH)
    assert picture.mask is not None
    for label in (1, 2):
        assert set(picture.pixels[0][picture.mask == label].tolist()) == set(VALUES[painted(masks) == label].tolist())


def test_names_choose_segments_and_their_labels(tmp_path: Path) -> None:
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    masks = drawn()
    path = save(seg(masks, np.eye(3), ("Tumor, left", "LIVER")), tmp_path / "seg.dcm")
    assert segments_of(path) == {1: "Tumor, left", 2: "LIVER"}
    found = read_case([tmp_path / "ct"], path, ImageOptions(segments=("liver", "tumor*"))).mask
    assert found is not None
    np.testing.assert_array_equal(found.array.numpy(), painted(masks[::-1]))
    for segments, says in (((), "contains 2 segments: name those to read"), (("spleen",), "none of which is named")):
        with pytest.raises(Unreadable, match=says) as refusal:
            read_case([tmp_path / "ct"], path, ImageOptions(segments=segments))
        assert "Tumor" not in str(refusal.value)
    with pytest.raises(Unreadable, match="is a mask of an image, not an image"):
        read_case([path])


def test_the_command_lists_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(seg(drawn(), np.eye(3)), tmp_path / "seg.dcm")
    app(["data", "segments", str(path)], result_action="return_value")
    assert capsys.readouterr().out.split() == ["1", "Liver", "2", "Tumor"]
    with pytest.raises(DataError, match="neither a DICOM segmentation nor a structure set"):
        segments_of(save(image(VALUES[0]), tmp_path / "ct.dcm"))


def moved(data: Dataset, mm: float) -> Dataset:
    for item in data.PerFrameFunctionalGroupsSequence:
        place = item.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(place.ImagePositionPatient[0]) + mm, *place.ImagePositionPatient[1:]]
    return data


def spaced(data: Dataset) -> Dataset:
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1, 1]
    return data


def without(data: Dataset, *names: str) -> Dataset:
    for item in data.PerFrameFunctionalGroupsSequence:
        for name in names:
            delattr(item, name)
    return data


def with_values(data: Dataset, **values: Any) -> Dataset:
    for name, value in values.items():
        setattr(data, name, value)
    return data


STRANGE: dict[str, tuple[Callable[[Dataset], Dataset], str]] = {
    "between voxels": (lambda d: moved(d, 0.3), "another grid than its image: its pixels are up to 0.3 mm"),
    "another spacing": (spaced, "another grid than its image"),
    "outside": (lambda d: moved(d, 7.5), "marks pixels outside of its image"),
    "outside, at negative indices": (lambda d: moved(d, -2.25), "marks pixels outside of its image"),
    "no position": (lambda d: without(d, "PlanePositionSequence"), "state no position"),
    "no segment": (lambda d: without(d, "SegmentIdentificationSequence"), "does not state the segment of each frame"),
    "absurd size": (lambda d: with_values(d, NumberOfFrames=10**6), "its header|claims|truncated|describes"),
    "no list of segments": (lambda d: with_values(d, SegmentSequence=Items([])), "contains no segments"),
    "unknown type": (lambda d: with_values(d, SegmentationType="X"), "none of the standard's"),
    "cut": (lambda d: with_values(d, PixelData=d.PixelData[:4]), "truncated"),
    "far away": (lambda d: moved(d, 1e30), "outside of its image"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_segmentations_are_refused(tmp_path: Path, name: str) -> None:
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    change, says = STRANGE[name]
    path = save(change(seg(drawn(), np.eye(3))), tmp_path / "seg.dcm")
    with pytest.raises(Unreadable, match=says):
        read_case([tmp_path / "ct"], path, BOTH)


def test_an_image_without_a_position_has_no_segmentation(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(VALUES.transpose(2, 1, 0), None), tmp_path / "a.nii")
    path = save(seg(drawn(), np.eye(3)), tmp_path / "seg.dcm")
    with pytest.raises(GridMismatch, match="which its image does not state"):
        read_case([tmp_path / "a.nii"], path, BOTH)


def structures(
    contours: Sequence[tuple[int, Any]], names: Sequence[str] = ("GTV-1", "Lung"), kind: str = "CLOSED_PLANAR"
) -> Dataset:
    """A structure set with contours [n, 3] in LPS mm, each of the ROI with the given number."""
    data = image(np.zeros((1, 1), np.uint8), "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3")
    for name in (
        "PixelData",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "SamplesPerPixel",
        "PhotometricInterpretation",
    ):
        delattr(data, name)
    data.StructureSetROISequence = Items([entry(ROINumber=n, ROIName=name) for n, name in enumerate(names, 1)])
    rois = []
    for number in range(1, len(names) + 1):
        own = [
            entry(
                ContourGeometricType=kind,
                NumberOfContourPoints=len(points),
                ContourData=[float(f"{v:.9g}") for v in np.ravel(points)],
            )
            for roi, points in contours
            if roi == number
        ]
        rois.append(entry(ReferencedROINumber=number, ContourSequence=Items(own)))
    data.ROIContourSequence = Items(rois)
    return data


def contour(turn: np.ndarray, corners: Any, k: float) -> np.ndarray:
    """Corners (column, row) on slice ``k`` as points in LPS mm."""
    index = np.array([[x * STEP[2], y * STEP[1], k * STEP[0]] for x, y in corners])
    points: np.ndarray = ORIGIN + index @ turn.T
    return points


def enclosed(corners: Any) -> np.ndarray:
    """Pixels whose centers a polygon encloses, by Matplotlib."""
    from matplotlib.path import Path as Polygon

    y, x = np.mgrid[: SIZE[1], : SIZE[2]]
    return Polygon(np.array(corners)).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(SIZE[1:])


OUTER = [(0.4, 0.6), (7.7, 1.3), (6.6, 6.6), (1.5, 6.4)]
INNER = [(2.4, 2.6), (5.3, 2.7), (4.4, 4.6)]
ASIDE = [(6.7, 0.2), (8.3, 0.3), (8.2, 5.7)]


@pytest.mark.parametrize("turn", [np.eye(3), oblique()], ids=["axial", "oblique"])
def test_contours_mark_the_voxels_that_they_enclose(tmp_path: Path, turn: np.ndarray) -> None:
    series(tmp_path / "ct", VALUES, STEP, turn, ORIGIN)
    drawn = [
        (1, contour(turn, OUTER, 1)),
        (1, contour(turn, INNER, 1)),
        (2, contour(turn, ASIDE, 1)),
        (2, contour(turn, OUTER, 3)),
    ]
    path = save(structures(drawn), tmp_path / "rt.dcm")
    found = read_case([tmp_path / "ct"], path, ImageOptions(segments=("lung", "gtv*"))).mask
    assert found is not None
    expected = np.zeros(SIZE, int)
    expected[1][enclosed(ASIDE)] = expected[3][enclosed(OUTER)] = 1
    expected[1][enclosed(OUTER) ^ enclosed(INNER)] = 2
    np.testing.assert_array_equal(found.array.numpy(), expected)
    assert (expected[1] == 2).sum() > 10


WRONG: dict[str, tuple[Dataset, str]] = {
    "between slices": (structures([(1, contour(np.eye(3), OUTER, 1.4))]), "do not lie on slices"),
    "tilted": (structures([(1, contour(oblique(), OUTER, 1))]), "do not lie on slices"),
    "outside": (structures([(1, contour(np.eye(3), OUTER, 7))]), "outside of its image"),
    "open": (structures([(1, contour(np.eye(3), OUTER, 1))], kind="OPEN_PLANAR"), "not closed and planar"),
    "two points": (structures([(1, contour(np.eye(3), OUTER[:2], 1))]), "not 3 to 39 points"),
    "too many points": (structures([(1, contour(np.eye(3), OUTER * 10, 1))]), "not 3 to 39 points"),
    "nothing enclosed": (
        structures([(1, contour(np.eye(3), [(1.1, 1.1), (1.2, 1.1), (1.1, 1.2)], 1))]),
        "enclose no voxel",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_strange_contours_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.data.formats.dicom.segments.MOST_POINTS", 39)
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    data, says = WRONG[name]
    with pytest.raises(Unreadable, match=says):
        read_case([tmp_path / "ct"], save(data, tmp_path / "rt.dcm"), ImageOptions(segments=("gtv-1",)))


def test_a_study_reads_them_as_masks(tmp_path: Path) -> None:
    """A manifest of series and segmentations; in one of them the tumor is absent."""
    rows = ["image,mask,patient"]
    for i in range(3):
        series(tmp_path / f"ct{i}", VALUES + np.int16(i), STEP, None, ORIGIN, PatientID=f"P{i}")
        masks = drawn(i)
        masks[1] &= i > 0
        save(seg(masks, np.eye(3)), tmp_path / f"seg{i}.dcm")
        rows.append(f"ct{i},seg{i}.dcm,P{i}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = Manifest(path=str(tmp_path / "list.csv"), segments=("Liver", "Tumor"))
    examples = loaded(source.examples(source.table().ids))
    assert source.info.classes == ("background", "Liver", "Tumor")
    assert [int((y == 2).sum()) > 0 for y in examples.targets] == [False, True, True]
    assert source.fingerprint != Manifest(path=source.path, segments=("Tumor", "Liver")).fingerprint
    report = check_folder(tmp_path, given={"segments": ["Liver", "Tumor"]})
    assert not [f.message for f in report.findings if f.level == "error" and f.code != "health"]
    assert report.mask_labels == {0: 3, 1: 3, 2: 2}
    refused = "\n".join(f.message for f in check_folder(tmp_path).findings if f.level == "error")
    assert "contains 2 segments: name those to read" in refused


def of_series(data: Dataset, uid: str) -> Dataset:
    """The mask, which states the series that it was made from."""
    item = entry(SeriesInstanceUID=uid)
    if data.Modality == "SEG":
        data.ReferencedSeriesSequence = Items([item])
    else:
        study = entry(RTReferencedSeriesSequence=Items([item]))
        data.ReferencedFrameOfReferenceSequence = Items([entry(RTReferencedStudySequence=Items([study]))])
    return data


def tree(root: Path) -> dict[str, str]:
    """Four series in one tree: three with a mask each, in files of any name; and their SeriesInstanceUIDs."""
    uids = {}
    for i, name in enumerate("abcd"):
        paths = series(root / name, VALUES + np.int16(i), STEP, None, ORIGIN, PatientID=f"P{i}")
        uids[name] = str(pydicom.dcmread(paths[0]).SeriesInstanceUID)
    for i, name in enumerate("ca"):  # in another order than the series
        masks = drawn(i)
        masks[1] &= name == "c"
        save(of_series(seg(masks, np.eye(3)), uids[name]), root / "masks" / f"{i}")
    corners = [contour(np.eye(3), OUTER, 1.0)]
    rois = structures([(1, corners[0])], ("Liver", "Lung"))
    save(of_series(rois, uids["b"]), root / "b" / "rt.dcm")
    return uids


def test_a_tree_pairs_series_with_the_masks_that_refer_to_them(tmp_path: Path) -> None:
    uids = tree(tmp_path / "t")
    source = DicomImages(str(tmp_path / "t"), segments=("Liver", "Tumor"))
    table = source.table()
    assert table.ids == ("a", "b", "c")
    assert source.info.task == "segmentation"
    assert source.info.classes == ("background", "Liver", "Tumor")
    assert any("1 series without a segmentation" in note for note in source.info.notes)
    examples = loaded(source.examples(table.ids))
    assert [bool((y == 2).any()) for y in examples.targets] == [False, False, True]
    assert int((examples.targets[1] == 1).sum()) == int(enclosed(OUTER).sum())
    alone = read_case([tmp_path / "t" / "c"], tmp_path / "t" / "masks" / "0", ImageOptions(segments=("Liver", "Tumor")))
    assert alone.mask is not None
    assert int((examples.targets[2] > 0).sum()) == int((alone.mask.array > 0).sum())
    (tmp_path / "sites.csv").write_text("patient,hospital\nP0,north\nP2,south\n")
    listed = DicomImages(str(tmp_path / "t"), str(tmp_path / "sites.csv"), segments=("Liver",)).table()
    assert listed.columns["hospital"] == ("north", "south")
    assert listed.sites == ("hospital", "scanner")
    assert len(uids) == 4


def test_masks_of_no_series_and_of_one_series_twice_are_told(tmp_path: Path) -> None:
    uids = tree(tmp_path / "t")
    save(of_series(seg(drawn(), np.eye(3)), uids["a"]), tmp_path / "t" / "again.dcm")
    with pytest.raises(DataError, match=r"1 series have several segmentations or structure sets \(as \w+"):
        DicomImages(str(tmp_path / "t"), segments=("Liver",)).table()
    series(tmp_path / "alone", VALUES, STEP, None, ORIGIN)
    save(seg(drawn(), np.eye(3)), tmp_path / "alone" / "seg.dcm")  # refers to nothing
    with pytest.raises(DataError, match="refers to a selected series"):
        DicomImages(str(tmp_path / "alone"), segments=("Liver",)).table()
    damaged = seg(drawn(), np.eye(3))
    damaged.ReferencedSeriesSequence = Items([entry(SeriesDescription="no UID")])
    save(damaged, tmp_path / "alone" / "seg.dcm")
    with pytest.raises(DataError, match="its references to images are damaged"):
        DicomImages(str(tmp_path / "alone"), segments=("Liver",)).table()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "give labels = "),
        ({"segments": ("Liver",), "label": "grade"}, "leave label, event and regression out"),
        ({"labels": "x.csv", "event": "died"}, "name the column of times with label"),
        ({"labels": "x.csv", "event_codes": ("2",)}, "need event = "),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        DicomImages("x", **keys)


def test_segmentations_in_a_tree_are_no_examples(tmp_path: Path) -> None:
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    save(seg(drawn(), np.eye(3)), tmp_path / "seg.dcm")
    report = check_folder(tmp_path)
    assert report.examples == 1
    assert any("1 DICOM objects are not images" in f.message for f in report.findings)
    assert read_segments(next((tmp_path / "ct").iterdir()), None, ()) is None


def test_check_and_new_study_recognize_masks_in_a_tree(tmp_path: Path) -> None:
    """Segments that most masks have are proposed, by the order of their numbers; the check reads the same pairs."""
    tree(tmp_path / "t")
    found = recognize(tmp_path / "t")
    assert found.task == "segmentation"
    assert found.options["segments"] == ["Liver", "Tumor"]
    (question,) = found.questions
    assert question.key == "segments"
    assert set(question.choices) == {"Liver", "Tumor", "Lung"}
    report = check_folder(tmp_path / "t")
    assert report.data == found.options
    source = DataSpec(**report.data).source()
    assert report.examples == len(source.table()) == 3
    assert report.mask_labels == {0: 3, 1: 3, 2: 1}
    assert not [f.message for f in report.findings if f.code in ("study", "unreadable")]
    study = study_config.parse(new_study(recognize(tmp_path / "t", {"segments": ["Tumor"]}), "t", 1).text)
    assert study.data.options["segments"] == ["Tumor"]
    assert study.task.kind == "segmentation"


def test_a_table_of_labels_is_used_if_a_label_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "t")
    (tmp_path / "t/labels.csv").write_text("patient,label\n" + "".join(f"P{i},{i % 2}\n" for i in range(4)))
    masks = recognize(tmp_path / "t")
    assert masks.options["labels"].endswith("labels.csv")
    assert "label" not in masks.options
    assert DataSpec(**masks.options).source().info.task == "segmentation"
    labeled = recognize(tmp_path / "t", {"label": "label"})
    assert labeled.task == "classification"
    assert "segments" not in labeled.options


def test_names_with_wildcards_are_proposed_as_they_are(tmp_path: Path) -> None:
    paths = series(tmp_path / "a", VALUES, STEP, None, ORIGIN, PatientID="P0")
    uid = str(pydicom.dcmread(paths[0]).SeriesInstanceUID)
    rois = structures([(1, contour(np.eye(3), OUTER, 1.0))], ("GTV[1]*", "GTV1"))
    save(of_series(rois, uid), tmp_path / "a" / "rt.dcm")
    found = recognize(tmp_path)
    assert found.options["segments"] == ["GTV[[]1][*]", "GTV1"]
    source = DataSpec(**found.options).source()
    assert int((loaded(source.examples(source.table().ids)).targets == 1).sum()) == int(enclosed(OUTER).sum())
