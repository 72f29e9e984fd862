"""Folders, manifests and pairs: what is on disk comes out with its label, patient and site; every mistake is named."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.examples import DataError
from polyclinic.data.paired_folders import Pairs
from polyclinic.data.preprocessing.transforms import CropPad, Resample, Resize, ZScore
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from tests.support.data_sets import loaded

DICE = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (6, 5), value: int | None = None, color: bool = False) -> Any:
    """A PNG, JPEG or TIFF of (height, width), random or of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if color else size
    pixels = DICE.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def nifti(path: Path, array: Any, mm: tuple[float, float, float] = (1.0, 1.0, 2.0), flip: bool = False) -> None:
    """A NIfTI volume from an array [x, y, z]; flipped, its x axis points to the patient's left."""
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*mm, 1.0])
    if flip:
        array, affine[0, 0], affine[0, 3] = array[::-1], -mm[0], mm[0] * (array.shape[0] - 1)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def test_class_folders(tmp_path: Path) -> None:
    """Bytes as they are, class by folder, site and split by level, patients by pattern; hidden files are not seen."""
    pixels = {}
    for site in ("north", "south"):
        for split in ("train", "test"):
            for kind in ("benign", "malignant"):
                for i in range(2):
                    name = f"{site}/{split}/{kind}/case{i}_view1.png"
                    pixels[name] = picture(tmp_path / name)
    (tmp_path / "north" / ".hidden.png").write_text("")
    (tmp_path / "readme.txt").write_text("")
    source = Folders(str(tmp_path), levels=("site", "split", "class"), patient=r"(case\d+)_")
    table = source.table()
    assert len(table) == 16
    assert table.sites == ("site",)
    assert set(table.columns) == {"site", "split"}
    assert set(table.patients) == {"case0", "case1"}
    examples = loaded(source.examples(table.ids[::-1]))
    assert examples.inputs.dtype == torch.uint8
    for i, name in enumerate(examples.ids):
        assert np.array_equal(examples.inputs[i, 0].numpy(), pixels[name])
        assert examples.targets[i] == int("malignant" in name)
    assert source.info.classes == ("benign", "malignant")


def test_a_zip_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    """Same examples and fingerprint, unpacked once; a path that climbs out of it stays inside."""
    for kind in "ab":
        picture(tmp_path / "f" / kind / "x.png")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for kind in "ab":
            archive.write(tmp_path / "f" / kind / "x.png", f"{kind}/x.png")
        archive.writestr("../../escaped.txt", "no")
    folder, packed = Folders(str(tmp_path / "f")), Folders(str(tmp_path / "f.zip"))
    assert folder.fingerprint == packed.fingerprint
    assert torch.equal(
        loaded(folder.examples(folder.table().ids)).inputs, loaded(packed.examples(packed.table().ids)).inputs
    )
    assert not (tmp_path / "escaped.txt").exists()
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DataError, match="cannot be unpacked"):
        Folders(str(tmp_path / "bad.zip")).table()


def test_color_depth_and_size(tmp_path: Path) -> None:
    """Colors are three channels; sixteen bits become 0 to 1; different sizes need a step."""
    colors = picture(tmp_path / "a" / "x.png", color=True)
    source = Folders(str(tmp_path))
    assert np.array_equal(loaded(source.examples(("a/x.png",))).inputs[0].numpy(), np.moveaxis(colors, -1, 0))
    deep = tmp_path / "deep" / "a" / "x.png"
    deep.parent.mkdir(parents=True)
    Image.fromarray(np.array([[0, 65535], [32768, 1]], dtype=np.uint16)).save(deep)
    found = loaded(Folders(str(tmp_path / "deep")).examples(("a/x.png",)))
    assert found.inputs.flatten().tolist() == pytest.approx([0, 1, 32768 / 65535, 1 / 65535])
    picture(tmp_path / "sizes" / "a" / "x.png")
    picture(tmp_path / "sizes" / "a" / "y.png", (9, 9))
    with pytest.raises(DataError, match="images have 2 different shapes"):
        Folders(str(tmp_path / "sizes")).examples(("a/x.png",))
    sized = Folders(str(tmp_path / "sizes"), steps=(Resize(8),))
    assert sized.examples(sized.table().ids).shape == (1, 8, 8)


def test_damaged_files_are_all_named_or_left_out(tmp_path: Path) -> None:
    """One line each; with "skip" the rest is read, and the notes say what is missing."""
    for i in range(4):
        picture(tmp_path / "a" / f"{i}.png", value=i)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "3.png").read_bytes()[:40])
    source = Folders(str(tmp_path))
    with pytest.raises(DataError) as error:
        source.examples(source.table().ids)
    assert len(error.value.problems) == 2
    assert "a/1.png" in error.value.problems[0]
    skipping = Folders(str(tmp_path), unreadable="skip")
    table = skipping.table()
    assert table.ids == ("a/0.png", "a/3.png")
    assert loaded(skipping.examples(("a/3.png",))).inputs.unique().tolist() == [3]
    assert any("2 files were left out" in note for note in skipping.info.notes)


def test_a_second_reading_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, until a byte or a step changes."""
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png")
    first = Folders(str(tmp_path))
    before = loaded(first.examples(first.table().ids))
    import polyclinic.data.collection as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image", lambda *_, **__: pytest.fail("decoded again"))
        again = Folders(str(tmp_path))
        found = loaded(again.examples(again.table().ids))
    assert torch.equal(found.inputs, before.inputs)
    changed = picture(tmp_path / "a" / "1.png")
    after = Folders(str(tmp_path))
    assert np.array_equal(loaded(after.examples(("a/1.png",))).inputs[0, 0].numpy(), changed)
    assert after.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": ("site",)}, 'name "class" once'),
        ({"levels": ("class", "class")}, 'name "class" once'),
        ({"patient": "("}, "is not a regular expression"),
        ({"patient": "case"}, "needs exactly one group"),
    ],
)
def test_options_of_folders_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    """Refused before anything is read."""
    with pytest.raises(DataError, match=says):
        Folders("x", **options)


def test_folders_without_what_was_asked_for(tmp_path: Path) -> None:
    """No images at that depth; an unknown class; a stray image is counted."""
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match="<site> / <class> / image"):
        Folders(str(tmp_path), levels=("site", "class")).table()
    with pytest.raises(DataError, match=r"a class that is not among classes = \['b'\]: 'a' \(1\)"):
        Folders(str(tmp_path), classes=("b",)).table()
    assert any("1 images are at another depth" in note for note in Folders(str(tmp_path)).info.notes)


def listed(tmp_path: Path, text: str) -> str:
    """A manifest in a folder with two volumes and a picture."""
    (tmp_path / "list.csv").write_text(text)
    return str(tmp_path / "list.csv")


def test_a_manifest_of_pictures(tmp_path: Path) -> None:
    """Label, patient, site and split from its columns; others are kept; classes sort."""
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.jpg", value=i)
    text = "path,label,patient,site,split,sex\nimages/2.jpg,yes,p1,N,test,f\nimages/0.jpg,no,p0,S,train,m\n"
    source = Manifest(listed(tmp_path, text))
    table = source.table()
    assert table.patients == ("p1", "p0")
    assert table.labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert table.columns == {"site": ("N", "S"), "split": ("test", "train"), "sex": ("f", "m")}
    assert source.info.classes == ("no", "yes")
    assert loaded(source.examples(("images/2.jpg",))).targets.tolist() == [1]
    several = Manifest(listed(tmp_path, "path,a,b\nimages/0.jpg,0,1\nimages/1.jpg,1,1\n"), label=("a", "b"))
    assert several.info.task == "multilabel"
    assert loaded(several.examples(("images/0.jpg",))).targets.tolist() == [[0, 1]]
    numbers = Manifest(listed(tmp_path, "path,label\nimages/0.jpg,3.5\n"), regression=True)
    assert loaded(numbers.examples(("images/0.jpg",))).targets.tolist() == [[3.5]]
    assert any("names no patients" in note for note in numbers.info.notes)


def test_a_manifest_of_volumes_with_channels_and_masks(tmp_path: Path) -> None:
    """Two files a case become two channels; orientation is undone; millimeters are those of the file."""
    t1, t2 = DICE.random((4, 6, 5)).astype(np.float32), DICE.random((4, 6, 5)).astype(np.float32)
    mask = (t1 > 0.5).astype(np.uint8)
    for name, array in (("t1", t1), ("t2", t2), ("seg", mask)):
        nifti(tmp_path / f"{name}.nii.gz", array, flip=True)
    source = Manifest(listed(tmp_path, "one,two,mask\nt1.nii.gz,t2.nii.gz,seg.nii.gz\n"), images=("one", "two"))
    x, y = source.examples(source.table().ids)[torch.tensor([0])]
    assert np.allclose(x[0].numpy(), np.stack([t1.transpose(2, 1, 0), t2.transpose(2, 1, 0)]))
    assert np.array_equal(y[0].numpy(), mask.transpose(2, 1, 0))
    even = Manifest(source.path, images=("one", "two"), steps=(Resample(1.0), ZScore()))
    assert even.examples(even.table().ids).shape == (2, 10, 6, 4)


def test_every_mistake_of_a_manifest_at_once(tmp_path: Path) -> None:
    """Missing file, missing name, unknown kind, listed twice, empty label, no patient: one line each."""
    picture(tmp_path / "0.png")
    (tmp_path / "notes.txt").write_text("")
    text = "path,label,patient\n0.png,a,p\n0.png,a,p\n1.png,a,p\n,b,p\nnotes.txt,,p\n0.png,b,\n"
    with pytest.raises(DataError) as error:
        Manifest(listed(tmp_path, text), classes=("a", "b")).table()
    expected = [
        "1 row names a file that does not exist (row 4: 1.png)",
        "1 row names no file in path (row 5)",
        "1 row names a file of a format that is not supported (row 6: notes.txt)",
        "0.png is listed 3 times",
        "1 row without a label (row 6)",
        "1 rows name no patient",
    ]
    assert all(any(says in problem for problem in error.value.problems) for says in expected)
    with pytest.raises(DataError, match="neither a column of labels nor one of masks"):
        Manifest(listed(tmp_path, "path\n0.png\n")).table()
    with pytest.raises(DataError, match="has no column 'file'"):
        Manifest(listed(tmp_path, "path,label\n0.png,a\n"), images=("file",)).table()
    with pytest.raises(DataError, match="no number in label"):
        Manifest(listed(tmp_path, "path,label\n0.png,a\n"), regression=True).table()


def nnunet(root: Path, channels: int = 1, cases: int = 3) -> None:
    """A data set of nnU-Net's layout."""
    for k in range(cases):
        for c in range(channels):
            nifti(
                root / "imagesTr" / f"site{k % 2}_case{k}_{c:04d}.nii.gz", DICE.random((5 + k, 6, 4)).astype(np.float32)
            )
        nifti(root / "labelsTr" / f"site{k % 2}_case{k}.nii.gz", DICE.integers(0, 3, (5 + k, 6, 4)).astype(np.uint8))
    (root / "dataset.json").write_text('{"labels": {"background": 0, "core": 1, "rim": 2}}')


def test_nnunets_layout(tmp_path: Path) -> None:
    """Channels by number, masks by case, labels by dataset.json (both ways round), sites and patients by name."""
    nnunet(tmp_path, channels=2)
    source = Pairs(str(tmp_path), site=r"(site\d)", patient=r"(case\d)", steps=(CropPad((4, 6, 6)),))
    table = source.table()
    assert table.ids == ("site0_case0", "site0_case2", "site1_case1")
    assert table.patients == ("case0", "case2", "case1")
    assert table.columns["site"] == ("site0", "site0", "site1")
    assert source.info.classes == ("background", "core", "rim")
    x, y = source.examples(table.ids)[torch.arange(3)]
    assert x.shape == (3, 2, 4, 6, 6)
    assert y.shape == (3, 4, 6, 6)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "core", "2": "rim"}}')
    assert Pairs(str(tmp_path)).collect().info.classes == ("background", "core", "rim")


def test_pairs_of_pictures(tmp_path: Path) -> None:
    """Any two folders with equal names; a mask of black and white is one of 0 and 1."""
    (tmp_path / "outlines").mkdir()
    for i in range(2):
        picture(tmp_path / "scans" / f"{i}.jpg", color=True)
        mask = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8).repeat(3, 0))
        mask.save(tmp_path / "outlines" / f"{i}.png")
    source = Pairs(str(tmp_path), images="scans", masks="outlines")
    with pytest.raises(DataError, match=r"mask of 1 x 6 x 2 voxels"):
        source.examples(("0",))
    for i in range(2):
        picture(tmp_path / "scans" / f"{i}.jpg", (6, 2), color=True)
    examples = loaded(Pairs(str(tmp_path), images="scans", masks="outlines").examples(("0", "1")))
    assert examples.shape == (3, 6, 2)
    assert set(examples.targets.unique().tolist()) == {0, 1}


def test_what_does_not_pair_is_said(tmp_path: Path) -> None:
    """No such folders; an image without a mask and the reverse; unequal channels; a broken dataset.json."""
    with pytest.raises(DataError, match="there are no folders imagesTr and labelsTr"):
        Pairs(str(tmp_path)).table()
    nnunet(tmp_path)
    (tmp_path / "labelsTr" / "site0_case0.nii.gz").rename(tmp_path / "labelsTr" / "other.nii.gz")
    with pytest.raises(DataError) as error:
        Pairs(str(tmp_path)).table()
    assert "site0_case0 has no mask" in error.value.problems[0]
    assert "other has no image" in error.value.problems[1]
    (tmp_path / "labelsTr" / "other.nii.gz").rename(tmp_path / "labelsTr" / "site0_case0.nii.gz")
    nifti(tmp_path / "imagesTr" / "site0_case0_0001.nii.gz", DICE.random((5, 6, 4)).astype(np.float32))
    with pytest.raises(DataError, match="cases have 1 or 2 channels"):
        Pairs(str(tmp_path)).table()
    (tmp_path / "imagesTr" / "site0_case0_0001.nii.gz").unlink()
    (tmp_path / "dataset.json").write_text("[")
    with pytest.raises(DataError, match=r"is not nnU-Net's dataset\.json"):
        Pairs(str(tmp_path)).table()
