"""NRRD volumes against what was written, against SimpleITK, and the real ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.data.formats.nrrd import read_nrrd
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from tests.support.image_files import nrrd_bytes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_voxels_and_millimeters_come_back(tmp_path: Path, dtype: type[np.generic], encoding: str) -> None:
    data = (RNG.random((3, 4, 5)) * 100).astype(dtype)
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(data, encoding))
    volume = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.array.numpy(), data, rtol=1e-6)
    assert volume.spacing_mm == (2.0, 0.75, 0.5)
    assert volume.orientation == "LPS"
    np.testing.assert_allclose(volume.affine[:3, 3].numpy(), [-1, -2, 3])  # LPS to RAS


@pytest.mark.parametrize(
    ("space", "letters"),
    [("left-posterior-superior", "LPS"), ("RAS", "RAS"), ("left-anterior-superior", "LAS")],
)
def test_every_space_is_turned_to_ras(tmp_path: Path, space: str, letters: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(np.zeros((2, 2, 2), np.uint8), space=space))
    assert read_nrrd(tmp_path / "a.nrrd").orientation == letters


@pytest.mark.parametrize("first", [True, False])
def test_channels_come_first_wherever_the_file_has_them(tmp_path: Path, first: bool) -> None:
    data = RNG.integers(0, 9, (3, 4, 5, 2) if first else (2, 3, 4, 5)).astype(np.uint8)  # file order is reversed
    steps = "(0.5,0,0) (0,0.75,0) (0,0,2)"
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(data, space_directions=f"none {steps}" if first else f"{steps} none"))
    volume = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.array.numpy(), np.moveaxis(data, -1, 0) if first else data)
    assert volume.spacing_mm == (2.0, 0.75, 0.5)


def test_a_detached_header_reads_the_one_file_beside_it(tmp_path: Path) -> None:
    data = RNG.integers(0, 9, (3, 4, 5)).astype(np.int16)
    (tmp_path / "a.raw").write_bytes(data.tobytes())
    header = nrrd_bytes(data, data_file="a.raw").split(b"\n\n")[0]
    (tmp_path / "a.nhdr").write_bytes(header + b"\n\n")
    np.testing.assert_array_equal(read_nrrd(tmp_path / "a.nhdr").array.numpy(), data)
    for name in ("../a.raw", "/etc/passwd", "LIST", "a%03d.raw 1 3 1"):
        (tmp_path / "b.nhdr").write_bytes(nrrd_bytes(data, data_file=name).split(b"\n\n")[0] + b"\n\n")
        with pytest.raises(Unreadable, match="one file in the same folder"):
            read_nrrd(tmp_path / "b.nhdr")


def test_spacings_alone_give_millimeters_but_no_orientation(tmp_path: Path) -> None:
    data = RNG.integers(0, 9, (3, 4, 5)).astype(np.uint8)
    text = nrrd_bytes(data, space="", space_directions="", space_origin="", spacings="0.5 0.75 2")
    (tmp_path / "a.nrrd").write_bytes(text)
    volume = read_nrrd(tmp_path / "a.nrrd")
    assert volume.spacing_mm == (2.0, 0.75, 0.5)
    assert volume.measured
    assert "left and right are a guess" in volume.notes[0]
    (tmp_path / "b.nrrd").write_bytes(nrrd_bytes(data, space="", space_directions="", space_origin=""))
    assert not read_nrrd(tmp_path / "b.nrrd").measured


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"encoding": "bzip2"}, "encoding is not raw or gzip"),
        ({"type": "block"}, "type is not an integer or floating point"),
        ({"sizes": "5 4 x"}, "not whole numbers"),
        ({"sizes": "5 4"}, "not the number of its sizes"),
        ({"sizes": "5 0 3"}, "below 1"),
        ({"sizes": "99999999999 99999999999 9"}, "limit"),
        ({"sizes": "5 4 300"}, "truncated"),
        ({"endian": ""}, "byte order"),
        ({"space": "scanner-xyz"}, "space is not"),
        ({"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}, "singular"),
        ({"space_directions": "(nan,0,0) (0,1,0) (0,0,1)"}, "finite"),
        ({"space_directions": "(1,0,0) (0,1,0)"}, "2 space directions for 3 axes"),
        ({"byte_skip": "-1"}, "byte skip"),
    ],
)
def test_what_is_refused_says_why(tmp_path: Path, fields: dict[str, str], why: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(np.zeros((3, 4, 5), np.int16), **fields))
    with pytest.raises(Unreadable, match=why):
        read_nrrd(tmp_path / "a.nrrd")


def test_a_bomb_stops_at_the_size_it_states(tmp_path: Path) -> None:
    whole = nrrd_bytes(np.zeros((100, 100, 100), np.int16), "gzip").replace(b"100 100 100", b"10 10 10   ")
    (tmp_path / "a.nrrd").write_bytes(whole)
    with pytest.raises(Unreadable, match=r"inflate to more than the 1.95 KiB expected"):
        read_nrrd(tmp_path / "a.nrrd")
    with pytest.raises(Unreadable, match="limit is 1 KiB"):
        read_nrrd(tmp_path / "a.nrrd", limits=Limits(decoded_bytes=1024))


def test_real_volumes_and_their_masks(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is only a second opinion")
    for path in sorted((real_data / "pyradiomics_nrrd").glob("*.nrrd")):
        volume, theirs = read_nrrd(path, mask="label" in path.name), sitk.ReadImage(str(path))
        np.testing.assert_array_equal(volume.array.numpy(), sitk.GetArrayFromImage(theirs))
        np.testing.assert_allclose(volume.spacing_mm[::-1], theirs.GetSpacing())
        for index in ((0, 0, 0), (5, 7, 11)):
            point = theirs.TransformIndexToPhysicalPoint([int(i) for i in reversed(index)])
            ours = volume.affine.numpy() @ [*reversed(index), 1.0]
            np.testing.assert_allclose(ours[:3], np.array(point) * [-1, -1, 1], atol=1e-9)
    assert isinstance(volume.array, torch.Tensor)
