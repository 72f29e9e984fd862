"""Tiles of whole-slide images: their pixels, where tissue is, and files that are refused."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from polyclinic.data.cases.tiles import Tile, Tiling
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.files import read_case
from polyclinic.data.formats import slides
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from tests.support.data_sets import data_spec
from tests.support.known import known
from tests.support.slide_files import save_slide, slide_pixels

pytest.importorskip("openslide", reason="needs the slides extra")
PLAIN = Tiling(size=64, level=0, count=0)


def class_folders(root: Path, each: int = 3, **options: Any) -> Path:
    for i in range(2 * each):
        save_slide(root / "ab"[i % 2] / f"s{i}.tif", slide_pixels((256, 320), i), **options)
    return root


def tile_source(root: Path, **options: Any) -> Folders:
    return Folders(path=str(root), **{"tiles": PLAIN, **options})


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_pixels_are_those_that_were_written(tmp_path: Path, compression: str | None) -> None:
    pixels = slide_pixels()
    path = save_slide(tmp_path / "a.tif", pixels, compression=compression)
    for tile in PLAIN.tiles(path):
        volume = tile.read(path)
        expected = pixels[tile.y : tile.y + 64, tile.x : tile.x + 64]
        np.testing.assert_array_equal(volume.array[:, 0].movedim(0, -1).numpy(), expected)
        assert volume.full_scale == 255
        np.testing.assert_allclose(volume.spacing_mm[1:], 0.0005)


def test_tissue_is_found_where_it_is(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels())
    found = {(tile.x, tile.y) for tile in PLAIN.tiles(path)}
    assert found == {(x, y) for x in range(320, 640, 64) for y in range(256, 512, 64)}
    everything = replace(PLAIN, tissue=0.0).tiles(path)
    assert {(tile.x, tile.y) for tile in everything} == found


def test_glass_alone_is_no_example(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", np.full((512, 512, 3), 240, np.uint8))
    with pytest.raises(DataError, match="has no tile with 50% of tissue among 64"):
        PLAIN.tiles(path)


def test_a_tile_partly_on_tissue_is_taken_by_its_share(tmp_path: Path) -> None:
    pixels = np.full((512, 512, 3), 240, np.uint8)
    pixels[:, 256 + 16 : 256 + 64] = (200, 100, 160)  # three quarters of a column of tiles
    path = save_slide(tmp_path / "a.tif", pixels)
    assert len(replace(PLAIN, tissue=0.7).tiles(path)) == 8
    with pytest.raises(DataError, match="no tile with 80%"):
        replace(PLAIN, tissue=0.8).tiles(path)


@pytest.mark.parametrize(("mpp", "factor"), [(0.5, 1), (1.0, 2), (2.0, 4), (4.0, 8)])
def test_the_resolution_is_the_wanted_one(tmp_path: Path, mpp: float, factor: int) -> None:
    """Level 2 is the stored one; the others are reduced from the next finer level."""
    pixels = slide_pixels()
    path = save_slide(tmp_path / "a.tif", pixels, levels=(1, 4))
    for tile in Tiling(size=32, mpp=mpp, count=0).tiles(path):
        span = 32 * factor
        area = pixels[tile.y : tile.y + span, tile.x : tile.x + span].astype(float)
        expected = area.reshape(32, factor, 32, factor, 3).mean((1, 3))
        found = tile.read(path).array[:, 0].movedim(0, -1).numpy()
        assert np.abs(found - expected)[1:-1, 1:-1].mean() < 2.0
        assert tile.mm == pytest.approx(mpp / 1000)


def test_scanners_of_two_resolutions_give_one_scale(tmp_path: Path) -> None:
    """Stripes of 16 micrometers have one width in tiles of 0.5 micrometers per pixel, whatever the scanner."""
    widths = []
    for mpp in (0.25, 0.5):
        pixels = np.full((600, 600, 3), (200, 100, 160), np.uint8)
        period = round(32 / mpp)
        pixels[:, np.arange(600) % period < period // 2] = (120, 60, 100)
        path = save_slide(tmp_path / f"{mpp}.tif", pixels, mpp)
        tile = Tiling(size=256, mpp=0.5, count=0).tiles(path)[0]
        row = tile.read(path).array[0, 0, 128].numpy().astype(int)
        widths.append(np.diff(np.flatnonzero(np.abs(np.diff((row > 160).astype(int))))))
    assert set(widths[0]) == set(widths[1]) == {32}


def test_aperio_files_state_their_resolution(tmp_path: Path) -> None:
    text = "Aperio Image Library v11.2.1\r\n640x512 (256x256)|AppMag = 40|MPP = 0.25"
    path = save_slide(tmp_path / "a.svs", slide_pixels(), None, description=text)
    assert slides.describe(path).mpp == 0.25
    assert Tiling(size=64, mpp=0.5, count=0).tiles(path)[0].scale == 2
    with pytest.raises(DataError, match=r"has 0.25 micrometers per pixel, and mpp = 0.1 is finer"):
        Tiling(size=64, mpp=0.1).tiles(path)


def test_a_resolution_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels(), None)
    with pytest.raises(DataError, match="does not state its resolution: give level"):
        Tiling(size=64, mpp=0.5).tiles(path)
    assert PLAIN.tiles(path)[0].mm is None
    with pytest.raises(DataError, match="has 2 levels, and level = 2 is not one"):
        Tiling(size=64, level=2).tiles(path)


def test_a_mask_replaces_the_rule(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels())
    drawn = np.zeros((32, 40), np.uint8)
    drawn[:8, :8] = 7  # in the upper left, which is glass
    (tmp_path / "masks").mkdir()
    Image.fromarray(drawn).save(tmp_path / "masks/a.png")
    found = {(t.x, t.y) for t in replace(PLAIN, mask="masks/{name}.png").tiles(path)}
    assert found == {(x, y) for x in range(0, 128, 64) for y in range(0, 128, 64)}
    Image.fromarray(drawn.T).save(tmp_path / "masks/a.png")
    with pytest.raises(DataError, match="another shape than its slide"):
        replace(PLAIN, mask="masks/{name}.png").tiles(path)
    with pytest.raises(DataError, match="no such file"):
        replace(PLAIN, mask="{name}.none.png").tiles(path)


def test_the_number_of_tiles_is_limited_and_the_same_ones_are_drawn(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels())
    few = replace(PLAIN, count=9)
    assert len(few.tiles(path)) == 9
    assert few.tiles(path) == few.tiles(path)
    assert set(few.tiles(path)) < set(PLAIN.tiles(path))
    assert len({tile.y for tile in few.tiles(path)}) > 2  # not the first rows only


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 8, "level": 0}, "size = 8"),
        ({}, "either mpp"),
        ({"mpp": 0.5, "level": 0}, "either mpp"),
        ({"mpp": 0.0}, "mpp = 0.0"),
        ({"level": -1}, "level = -1"),
        ({"level": 0, "count": -1}, "count = -1"),
        ({"level": 0, "tissue": 1.5}, "tissue = 1.5"),
        ({"level": 0, "mask": "../{name}.png"}, "within the slide's folder"),
        ({"level": 0, "mask": "/etc/{name}.png"}, "within the slide's folder"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Tiling(**options)


def test_tiles_of_a_slide_are_one_patient_and_share_its_label(tmp_path: Path) -> None:
    source = tile_source(class_folders(tmp_path))
    table = source.table()
    by_slide = dict[str, tuple[str, int]]()
    for name, patient, label, slide in zip(
        table.ids, table.patients, known(table.labels).tolist(), table.columns["slide"], strict=True
    ):
        assert by_slide.setdefault(slide, (patient, label)) == (patient, label)
        assert name.startswith(f"{slide}#x")
    assert len(by_slide) == 6
    assert len(table) == 6 * 6
    roles = federate(
        data_spec(
            path=str(tmp_path),
            kind="folders",
            tiles={"size": 64, "level": 0},
            min_patients=1,
            sites={"partition": "iid", "count": 1},
        )
    )
    parts = [set(examples.patients) for examples in roles.sites["site-1"].values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6


def test_tiles_are_read_when_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tile_source(class_folders(tmp_path))
    reads, plain = list[Tile](), Tile.read

    def read(self: Tile, *a: Any, **k: Any) -> Any:
        reads.append(self)
        return plain(self, *a, **k)

    monkeypatch.setattr(Tile, "read", read)
    examples = source.examples(source.table().ids)
    assert source.info.classes == ("a", "b")
    assert examples.shape == (3, 64, 64)
    assert source.fingerprint
    assert len(set(examples.input_hashes())) == len(examples)
    assert not reads
    x, y = examples[torch.tensor([0, 5])]
    assert len(reads) == 2
    assert x.shape == (2, 3, 64, 64)
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert y.tolist() == [0, 0]
    expected = slide_pixels((256, 320), 0)
    first = source.collection.entries[0].part
    assert isinstance(first, Tile)
    found = (examples.image(0).movedim(0, -1) * 255).round().byte().numpy()
    np.testing.assert_array_equal(found, expected[first.y : first.y + 64, first.x : first.x + 64])


def test_steps_apply_to_tiles_and_keep_their_size(tmp_path: Path) -> None:
    from polyclinic.data.preprocessing.transforms import Channels, Resize

    root = class_folders(tmp_path)
    gray = tile_source(root, steps=(Channels(1),))
    examples = gray.examples(gray.table().ids)
    assert examples.shape == (1, 64, 64)
    assert examples[torch.tensor([0])][0].shape == (1, 1, 64, 64)
    small = tile_source(root, steps=(Resize(32),))
    with pytest.raises(DataError, match=r"tiles become 32 x 32 pixels; set their size"):
        small.examples(small.table().ids)


def test_the_fingerprint_follows_slide_tiles_and_steps(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    known = {tile_source(root).fingerprint}
    for other in (replace(PLAIN, count=2), replace(PLAIN, size=32), replace(PLAIN, tissue=0.9, size=48)):
        found = tile_source(root, tiles=other).fingerprint
        assert found not in known
        known.add(found)
    pixels = slide_pixels((256, 320), 0)
    pixels[200, 200] = 0
    save_slide(root / "a/s0.tif", pixels)
    assert tile_source(root).fingerprint not in known
    assert tile_source(root).fingerprint == tile_source(root).fingerprint


def test_a_slide_that_changes_during_a_run_is_an_error(tmp_path: Path) -> None:
    source = tile_source(class_folders(tmp_path))
    examples = source.examples(source.table().ids)
    save_slide(tmp_path / "a/s0.tif", slide_pixels((256, 320), 99), levels=(1, 2, 4))
    with pytest.raises(DataError, match="changed while the study ran"):
        examples.image(0)
    (tmp_path / "a/s0.tif").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        examples.image(0)


def test_a_manifest_names_slides_patients_and_sites(tmp_path: Path) -> None:
    rows = ["path,label,patient,hospital"]
    for i in range(8):
        save_slide(tmp_path / f"s/{i}.svs", slide_pixels((256, 320), i))
        rows.append(f"s/{i}.svs,{i % 2},p{i // 2},{'north' if i < 4 else 'south'}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    spec = data_spec(
        path=str(tmp_path / "m.csv"),
        kind="manifest",
        tiles={"size": 64, "mpp": 0.5, "count": 3},
        min_patients=1,
        split=[0.5, 0.0, 0.5],
    )
    table = spec.source().table()
    assert len(table) == 24
    assert set(table.patients) == {"p0", "p1", "p2", "p3"}
    assert "8 files are divided into 24 tiles." in spec.source().info.notes
    assert set(federate(spec).sites) == {"north", "south"}


def test_masks_patches_and_channels_are_refused_with_tiles(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    with pytest.raises(DataError, match="and so does patch"):
        tile_source(root, patch=(32, 32))
    (tmp_path / "m.csv").write_text("path,mask\na/s0.tif,a/s0.tif\n")
    with pytest.raises(DataError, match="needs a label for each file"):
        Manifest(str(tmp_path / "m.csv"), tiles=PLAIN).table()
    (tmp_path / "m.csv").write_text("path,other,label\na/s0.tif,a/s2.tif,1\n")
    with pytest.raises(DataError, match="each example is one file"):
        Manifest(str(tmp_path / "m.csv"), images=("path", "other"), tiles=PLAIN).table()


def test_a_slide_without_tiles_is_refused_with_the_key(tmp_path: Path) -> None:
    for path in (save_slide(tmp_path / "a.svs", slide_pixels()), save_slide(tmp_path / "a.tif", slide_pixels())):
        with pytest.raises(DataError, match=r"is a whole-slide image: divide it with tiles = \{size = 256"):
            read_case([path])


def edited(path: Path, tag: int, value: int) -> None:
    """Sets the value of a tag of the first directory of a little-endian classic TIFF file."""
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for i in range(count):
        at = start + 2 + 12 * i
        if struct.unpack_from("<H", content, at)[0] == tag:
            struct.pack_into("<HI", content, at + 2, 4, 1)
            struct.pack_into("<I", content, at + 8, value)
    path.write_bytes(content)


def huge_tiles(path: Path) -> None:
    edited(path, 322, 2**16)
    edited(path, 323, 2**16)


def looped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<I", content, start + 2 + 12 * count, start)
    path.write_bytes(content)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "no TIFF": (lambda p: p.write_bytes(b"not a slide" * 100), "is not a sound slide"),
    "a huge side": (lambda p: edited(p, 256, 2**31 - 1), "the limit is 1048576"),
    "a side of 0": (lambda p: edited(p, 257, 0), "the limit is|not a sound slide"),
    "huge stored tiles": (huge_tiles, "has tiles of 12884901888 bytes"),
    "a loop of directories": (looped, "a loop|not a sound slide"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:3000]), "is not a sound slide"),
    "a png by that name": (lambda p: Image.new("RGB", (64, 64)).save(p, "PNG"), "is not a sound slide"),
    "tiles beyond the end": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "is not a sound slide"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    path = save_slide(tmp_path / "a.svs", slide_pixels())
    change, reason = HOSTILE[name]
    change(path)
    with pytest.raises(DataError, match=reason):
        _ = [tile.read(path) for tile in PLAIN.tiles(path)]


def test_a_damaged_region_is_named_and_does_not_spoil_others(tmp_path: Path) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels(), compression="zlib")
    tiles = PLAIN.tiles(path)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        row, column = tiles[0].y // 256, tiles[0].x // 256
        at = page.dataoffsets[row * -(-640 // 256) + column]
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    slides._handles.clear()
    with pytest.raises(DataError, match=r"a\.tif: is not a sound slide"):
        tiles[0].read(path)
    assert tiles[-1].read(path).array.shape == (3, 1, 64, 64)


def test_a_slide_without_levels_of_low_resolution_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_slide(tmp_path / "a.tif", slide_pixels(), levels=(1,))
    monkeypatch.setattr(slides, "REGION", 256 * 256)
    with pytest.raises(DataError, match="save it with more levels"):
        PLAIN.tiles(path)


def test_damaged_slides_are_all_named_or_left_out(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    for name in ("a/s0.tif", "b/s1.tif"):
        (root / name).write_bytes(b"II*\0damaged")
    with pytest.raises(DataError) as refusal:
        tile_source(root).table()
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["s0.tif", "s1.tif"]
    kept = tile_source(root, unreadable="skip")
    assert len(kept.table()) == 4 * 6
    assert any(note.startswith("2 files were left out") for note in kept.info.notes)


def test_check_and_new_study_recognize_slides(tmp_path: Path) -> None:
    from polyclinic.data.quality.recognition import recognize
    from polyclinic.studies.config import study_config
    from polyclinic.studies.config.new_study import new_study

    root = class_folders(tmp_path / "d", 5)
    recognized = recognize(root)
    assert recognized.options["tiles"] == {"size": 256, "mpp": 0.5}
    assert any(question.key == "tiles" for question in recognized.questions)
    given = {"tiles": {"size": 64, "mpp": 0.5}}
    report = check_folder(root, given=given)
    assert not [f.message for f in report.findings if f.level == "error"]
    source = DataSpec(**report.data).source()
    assert report.examples == len(source.table()) == 60
    assert report.patients is None
    assert report.modalities == {"SM": 60}
    study = study_config.parse(new_study(recognize(root, given=given), "s", 1).text)
    assert len(study.data.source().table()) == 60


def test_the_check_warns_of_pictures_of_the_label(tmp_path: Path) -> None:
    text = "Aperio Image Library v11.2.1\r\n640x512 (256x256)|AppMag = 40|MPP = 0.25"
    for i in range(4):
        save_slide(tmp_path / "ab"[i % 2] / f"{i}.svs", slide_pixels(), None, description=text, label=i == 0)
    assert slides.describe(tmp_path / "a/0.svs").pictures == ("label",)
    found = [
        f
        for f in check_folder(tmp_path, given={"tiles": {"size": 64, "mpp": 0.5, "count": 4}}).findings
        if f.code == "metadata"
    ]
    assert [f.message for f in found] == ["1 file with a picture of the label, which may name a person"]
    assert found[0].files == ("a/0.svs",)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from polyclinic.errors import MissingDependency

    path = save_slide(tmp_path / "a.tif", slide_pixels())
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(MissingDependency, match=r'pip install "polyclinic\[slides\]"'):
        PLAIN.tiles(path)


def test_a_study_of_slides_runs_and_its_cases_are_slides(tmp_path: Path) -> None:
    """Two workers read the same slides; the test predictions of a slide's tiles are one case, their mean."""
    from polyclinic.evaluation.records.predictions import as_cases, read_predictions
    from polyclinic.studies.config.study_config import parse
    from polyclinic.studies.run.scheduler import run

    for i in range(24):
        shade = (200, 100, 160) if i // 2 % 2 else (120, 60, 200)
        pixels = np.full((256, 256, 3), 240, np.uint8)
        pixels[128:, 64:] = shade
        save_slide(
            tmp_path / "d" / ("north", "south")[i % 2] / "ab"[i // 2 % 2] / f"s{i}.tif", pixels + np.uint8(i % 5)
        )
    text = f"""
name = "slides"
rounds = 1
[data]
path = "{tmp_path / "d"}"
kind = "folders"
levels = ["site", "class"]
tiles = {{ size = 32, mpp = 0.5, count = 4 }}
min_patients = 4
split = [0.5, 0.0, 0.5]
[task]
network = "cnn"
[[methods]]
name = "fedavg"
[engine]
kind = "workers"
workers = 2
parallel = "sites"
"""
    events = list(run(parse(text), text, tmp_path / "run"))
    assert [event.label for event in events if event.what == "tested"] == ["fedavg"]
    (file,) = (tmp_path / "run").rglob("predictions.safetensors")
    found = read_predictions(file, "classification", "auc", ["north", "south"], [])
    for predictions in found.values():
        cases = as_cases(predictions)
        assert len(predictions) == 4 * len(cases.patient)
        first = predictions.patient == cases.patient[0]
        np.testing.assert_allclose(cases.score[0], known(predictions.score)[first].mean(0))
