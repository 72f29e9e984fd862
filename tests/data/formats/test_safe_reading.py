"""Limits hold before anything is allocated, and no mutation of a sound file gets past the one error."""

import gzip
import io
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from polyclinic.data.formats.dicom.series import read_dicom
from polyclinic.data.formats.metaimage import read_metaimage
from polyclinic.data.formats.mgh import read_mgh
from polyclinic.data.formats.nifti import read_nifti
from polyclinic.data.formats.nrrd import read_nrrd
from polyclinic.data.formats.pictures import read_picture
from polyclinic.data.formats.safe_reading import (
    Limits,
    Unreadable,
    fits,
    inflate,
    read_npz,
    read_text,
    read_whole,
    size,
)
from tests.support.image_files import image, nifti_bytes, nrrd_bytes

SMALL = Limits(decoded_bytes=2**20, inflated_bytes=2**20, file_bytes=2**20)


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8]))
def test_what_fits_is_exactly_what_is_within_the_bytes(shape: list[int], itemsize: int) -> None:
    needed = int(np.prod([float(n) for n in shape])) * max(itemsize, 4)
    if needed <= SMALL.decoded_bytes and max(shape) <= SMALL.side:
        assert fits("a", shape, itemsize, SMALL) * max(itemsize, 4) == needed * itemsize
    else:
        with pytest.raises(Unreadable, match="limit"):
            fits("a", shape, itemsize, SMALL)


@given(st.binary(max_size=5000), st.integers(0, 6000))
def test_inflating_gives_the_bytes_or_a_refusal(data: bytes, most: int) -> None:
    packed = gzip.compress(data)
    if len(data) <= most:
        assert inflate("a", packed, most, 31) == data
    else:
        with pytest.raises(Unreadable, match="inflate to more than"):
            inflate("a", packed, most, 31)
    twice = gzip.compress(data) + gzip.compress(data)
    if 2 * len(data) <= most:
        assert inflate("a", twice, most, 31) == data + data
    if len(packed) > 20:
        with pytest.raises(Unreadable):
            inflate("a", packed[:-9], 10**4, 31)


def test_a_gigabyte_of_nothing_stops_at_the_limit() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(squeeze.compress(bytes(2**20)) for _ in range(64)) + squeeze.flush()
    with pytest.raises(Unreadable, match="1 MiB expected"):
        inflate("a", bomb, 2**20, -15)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tiff() -> bytes:
    buffer = io.BytesIO()
    data = np.random.default_rng(0).integers(0, 65535, (12, 9)).astype(np.uint16)
    tifffile.imwrite(buffer, data, compression="zlib", byteorder=">", rowsperstrip=5)
    return buffer.getvalue()


def mgh() -> bytes:
    return nibabel.MGHImage(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes()


def metaimage() -> bytes:
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    head += "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 5 4 3\n"
    return f"{head}ElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + bytes(120)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.random.default_rng(0).random((3, 4, 4)), labels=np.arange(3))
    return buffer.getvalue()


def dicom() -> bytes:
    buffer = io.BytesIO()
    fields: dict[str, Any] = {
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 1],
    }
    image(np.arange(64, dtype=np.int16).reshape(8, 8), **fields).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


READERS: list[tuple[str, bytes, Callable[[Path], object]]] = [
    ("a.nii", nifti_bytes(), lambda p: read_nifti(p, limits=SMALL)),
    ("a.nii.gz", gzip.compress(nifti_bytes()), lambda p: read_nifti(p, limits=SMALL)),
    ("m.nii", nifti_bytes(), lambda p: read_nifti(p, mask=True, limits=SMALL)),
    ("a.nrrd", nrrd_bytes(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), lambda p: read_nrrd(p, limits=SMALL)),
    ("b.nrrd", nrrd_bytes(np.ones((3, 4, 5), np.float32), "gzip"), lambda p: read_nrrd(p, limits=SMALL)),
    ("a.dcm", dicom(), lambda p: read_dicom(p, limits=SMALL)),
    ("a.npz", npz(), lambda p: read_npz(p, SMALL)),
    ("a.png", png(), lambda p: read_picture(p, SMALL)),
    ("a.tif", tiff(), lambda p: read_picture(p, SMALL)),
    ("a.mgz", gzip.compress(mgh()), lambda p: read_mgh(p, limits=SMALL)),
    ("a.mha", metaimage(), lambda p: read_metaimage(p, limits=SMALL)),
]


def refused(read: Callable[[], object]) -> str:
    """Why a file is refused; empty where it is read. Any other error is a failure."""
    try:
        read()
    except Unreadable as refusal:
        return refusal.reason
    return ""


@pytest.mark.parametrize(("name", "sound", "read"), READERS, ids=[r[0] for r in READERS])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused_and_nothing_else(
    tmp_path: Path, name: str, sound: bytes, read: Callable[[Path], object], data: st.DataObject
) -> None:
    path = tmp_path / name
    path.write_bytes(sound)
    read(path)
    mutant = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(mutant), 900) - 1))
        mutant[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        mutant = mutant[: data.draw(st.integers(0, len(mutant)))]
    path.write_bytes(bytes(mutant))
    reason = refused(lambda: read(path))
    assert "\n" not in reason
    assert len(reason) < 250


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "CMYK", "LA"])
def test_pictures_of_every_kind_come_out_gray_or_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    suffix = "tiff" if mode in ("CMYK", "I;16") else "png"
    (picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)).save(tmp_path / f"a.{suffix}")
    array = read_picture(tmp_path / f"a.{suffix}").array
    assert array.shape == ((6, 8, 3) if mode in ("RGB", "RGBA", "P", "CMYK") else (6, 8))
    if mode in ("L", "RGB", "RGBA"):
        np.testing.assert_array_equal(array[..., 0] if array.ndim == 3 else array, np.asarray(picture))


def test_text_is_bounded_and_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("naïve".encode("latin-1"))
    assert read_text(tmp_path / "a.csv") == "naïve"
    (tmp_path / "b.csv").write_bytes(b"a\0b")
    with pytest.raises(Unreadable, match="not a text"):
        read_text(tmp_path / "b.csv")
    with pytest.raises(Unreadable, match="limit is 3 bytes"):
        read_text(tmp_path / "a.csv", Limits(text_bytes=3))


def test_the_error_travels_between_processes_and_names_only_the_file() -> None:
    again = pickle.loads(pickle.dumps(Unreadable("/secret/place/a.dcm", "is empty")))
    assert str(again) == "a.dcm: is empty"
    assert again.path == Path("/secret/place/a.dcm")


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 2**30, 3 * 2**40)] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "1.5 KiB",
        "1 GiB",
        "3 TiB",
    ]


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program is still writing it."""
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_whole(tmp_path / "x") == b"0123456789"
    monkeypatch.setattr("polyclinic.data.formats.safe_reading.regular_file", lambda path, limits: 9)
    with pytest.raises(Unreadable, match="grew while it was read"):
        read_whole(tmp_path / "x")
