"""Damaged and hostile files: each costs one clear line and bounded memory, and the rest of the site is read."""

import functools
import gzip
import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyclinic.data.files import ImageOptions
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.safe_reading import Limits
from polyclinic.data.quality.site_check import check_folder
from tests.support.image_files import enhanced, image, nifti_bytes, nrrd_bytes, pydicom, series

LIMITS = Limits(decoded_bytes=2**26, inflated_bytes=2**24, file_bytes=2**26)
PIXELS = np.arange(64, dtype=np.int16).reshape(8, 8)


def dicom(**fields: Any) -> bytes:
    with quiet():
        buffer = io.BytesIO()
        image(PIXELS, **fields).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def patched(old: bytes, new: bytes) -> bytes:
    whole = dicom()
    assert whole.count(old) == 1
    return whole.replace(old, new)


def with_syntax(uid: str, body: bytes) -> bytes:
    """A file whose meta names ``uid`` and whose data set is ``body``."""
    value = uid.encode() + b"\0" * (len(uid) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
    size = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return b"\0" * 128 + b"DICM" + size + meta + body


@functools.cache
def deflated_bomb() -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 200 * 2**20)
    out = squeeze.compress(body)
    for _ in range(200):
        out += squeeze.compress(bytes(2**20))
    return with_syntax("1.2.840.10008.1.2.1.99", out + squeeze.flush())


def deep_sequences(depth: int = 3000) -> bytes:
    opening = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return with_syntax("1.2.840.10008.1.2.1", opening * depth + closing * depth)


def oversized_jpeg2000() -> bytes:
    source = Path(pydicom.data.get_testdata_file("MR_small_jp2klossless.dcm", download=False)).read_bytes()
    at = source.find(b"\xff\x4f\xff\x51") + 8
    return source[:at] + struct.pack(">II", 60_000, 60_000) + source[at + 8 :]


def sample(name: str) -> Callable[[], bytes]:
    return lambda: Path(pydicom.data.get_testdata_file(name, download=False)).read_bytes()


def nan_affine() -> bytes:
    return nifti_bytes(affine=((float("nan"), 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)))


def npz(arrays: dict[str, Any], **how: bool) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


class Canary:
    """Code that would run if anything were unpickled."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("/tmp/polyclinic-canary"), "ran")


def pickled_npz() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        archive.writestr("images.npy", head.getvalue() + pickle.dumps([Canary()]))
    return buffer.getvalue()


def npz_bomb(shape: tuple[int, ...], body: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
        archive.writestr("images.npy", head.getvalue() + bytes(body))
    return buffer.getvalue()


def nrrd_bomb() -> bytes:
    head = nrrd_bytes(PIXELS[None, :0], sizes="8 8 1", encoding="raw").replace(b"encoding: raw", b"encoding: gzip")
    return head + gzip.compress(bytes(2**25))


def many_arrays() -> bytes:
    return npz({f"a{i}": np.zeros(1) for i in range(300)})


def png(size: tuple[int, int], cut: int | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16), 7).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data[:cut])


def pages() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))] * 3)
    return buffer.getvalue()


CASES: list[tuple[str, str, Callable[[], bytes], str]] = [
    # a DICOM tree
    ("dicom", "empty.dcm", lambda: b"", "is empty"),
    ("dicom", "text.dcm", lambda: b"Jane Doe, born 1970\n" * 40, "is not a DICOM file"),
    ("dicom", "random.dcm", lambda: np.random.default_rng(0).bytes(5000), "is not a DICOM file"),
    ("dicom", "cut-meta.dcm", lambda: dicom()[:150], "transfer syntax|truncated"),
    ("dicom", "cut-header.dcm", lambda: dicom()[:420], "truncated|damaged|holds no image|does not state"),
    ("dicom", "cut-pixels.dcm", lambda: dicom()[:-40], r"states 128 bytes, 88 are present"),
    ("dicom", "no-syntax.dcm", sample("meta_missing_tsyntax.dcm"), "does not state its transfer syntax"),
    ("dicom", "rows.dcm", lambda: dicom(Rows=65535, Columns=65535), "65535 x 65535"),
    ("dicom", "bits.dcm", lambda: dicom(BitsAllocated=17), "17 bits per pixel"),
    ("dicom", "stored.dcm", lambda: dicom(BitsStored=30), "BitsStored"),
    ("dicom", "samples.dcm", lambda: dicom(SamplesPerPixel=9), "9 samples"),
    ("dicom", "zero-rows.dcm", lambda: dicom(Rows=0), "below 1"),
    (
        "dicom",
        "length.dcm",
        lambda: patched(b"OW\0\0\x80\0\0\0", b"OW\0\0\xf0\xff\xff\xff"),
        "states 4294967280 bytes, 128 are present",
    ),
    ("dicom", "frames.dcm", lambda: dicom(NumberOfFrames=10**9), "limit"),
    ("dicom", "frames-text.dcm", sample("badVR.dcm"), "NumberOfFrames is not a whole number"),
    ("dicom", "slope.dcm", lambda: dicom(RescaleSlope="nan"), "RescaleSlope is not 1 finite number"),
    ("dicom", "bomb.dcm", deflated_bomb, "inflate to more than the 16 MiB expected"),
    ("dicom", "deflate-cut.dcm", lambda: sample("image_dfl.dcm")()[:-200], "damaged|stops in the middle"),
    ("dicom", "deep.dcm", deep_sequences, "nests its parts too deeply|damaged"),
    (
        "dicom",
        "syntax.dcm",
        lambda: patched(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"),
        "transfer syntax|damaged",
    ),
    ("dicom", "j2k.dcm", oversized_jpeg2000, r"compressed from \(60000, 60000\) pixels"),
    ("dicom", "no-decoder.dcm", sample("SC_rgb_jpeg_gdcm.dcm"), "pip install"),
    ("dicom", "enhanced.dcm", lambda: enhanced_short(), "describes 4 frames and holds 2"),
    # loose images
    ("files", "empty.nii.gz", lambda: b"", "is empty"),
    ("files", "text.nii", lambda: b"Jane Doe\n" * 90, "does not start with a NIfTI header"),
    ("files", "short.nii", lambda: nifti_bytes()[:100], "is truncated"),
    ("files", "cut.nii", lambda: nifti_bytes()[:-7], "113|is truncated"),
    ("files", "cut.nii.gz", lambda: gzip.compress(nifti_bytes())[:-40], "truncated|damaged"),
    ("files", "flipped.nii.gz", lambda: b"\x1f\x8b" + b"\x07" * 90, "damaged"),
    ("files", "huge.nii", lambda: nifti_bytes((32767,) * 3), "32767 x 32767 x 32767"),
    ("files", "negative.nii", lambda: nifti_bytes((4, -5, 6)), "impossible dimensions"),
    ("files", "nine.nii", lambda: b"\x5c\x01\0\0".ljust(40, b"\0") + b"\x09\0" + nifti_bytes()[42:], "impossible dim"),
    ("files", "type.nii", lambda: nifti_bytes(code=4096), "unknown data type 4096"),
    ("files", "complex.nii", lambda: nifti_bytes(code=32, bits=64), "not a real number"),
    ("files", "affine.nii", nan_affine, "affine"),
    ("files", "singular.nii", lambda: nifti_bytes(affine=((1, 0, 0, 0),) * 2 + ((0, 0, 1, 0),)), "singular"),
    ("files", "slope.nii", lambda: nifti_bytes(inter=float("nan")), "its intensity intercept is not a finite number"),
    ("files", "offset.nii", lambda: nifti_bytes(offset=float("inf")), "is impossible"),
    ("files", "offset2.nii", lambda: nifti_bytes(offset=3e9), "is impossible"),
    (
        "files",
        "bomb.nii.gz",
        lambda: gzip.compress(nifti_bytes((500, 500, 400), 64, 64, voxels=bytes(2**20))),
        "763 MiB",
    ),
    ("files", "sizes.nrrd", lambda: nrrd_bytes(PIXELS[None], sizes="99999999 99999999 9999"), "limit is"),
    ("files", "bomb.nrrd", nrrd_bomb, "inflate to more than"),
    ("files", "endless.nrrd", lambda: b"NRRD0004\n" + b"# more\n" * 9000, "does not end"),
    ("files", "escape.nhdr", lambda: nrrd_bytes(PIXELS[None], data_file="../../etc/passwd"), "same folder"),
    ("files", "bomb.png", lambda: png((60_000, 60_000)), "claims more pixels"),
    ("files", "cut.png", lambda: png((16, 16), 50), "not a sound"),
    ("files", "text.jpg", lambda: b"<svg onload=alert(1)>" * 30, "not a sound"),
    ("files", "pages.tiff", pages, "holds 4 pages"),
    # NumPy archives
    ("npz", "objects.npz", pickled_npz, "Python objects, which are never loaded"),
    ("npz", "bomb.npz", lambda: npz_bomb((2**27,), 2**20), "array of 1 GiB"),
    ("npz", "negative.npz", lambda: npz_bomb((-1, 4)), "not a sound|array of"),
    ("npz", "claims.npz", lambda: npz_bomb((100, 100)), "not a sound"),
    ("npz", "many.npz", many_arrays, "holds 300 arrays"),
    ("npz", "cut.npz", lambda: npz({"images": np.zeros((3, 8, 8))})[:-60], "not a sound"),
    ("npz", "other.npz", lambda: npz({"weights": np.zeros(4)}), "no array named images"),
    ("npz", "uneven.npz", lambda: npz({"images": np.zeros((3, 8, 8)), "labels": np.zeros(2)}), "3 images in "),
]


def enhanced_short() -> bytes:
    buffer = io.BytesIO()
    enhanced(np.stack([PIXELS, PIXELS]), [0, 1, 2, 3]).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def good(kind: str, folder: Path) -> int:
    """Sound data of a kind; how many examples it is."""
    if kind == "dicom":
        series(folder / "good", np.random.default_rng(0).integers(0, 99, (3, 8, 8)).astype(np.int16))
        return 1
    if kind == "files":
        (folder / "good1.nii.gz").write_bytes(gzip.compress(nifti_bytes()))
        (folder / "good2.nrrd").write_bytes(nrrd_bytes(PIXELS[None]))
        return 2
    (folder / "good.npz").write_bytes(npz({"train_images": np.random.default_rng(0).random((5, 8, 8))}))
    return 5


@pytest.mark.parametrize(("kind", "name", "make", "why"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_one_line_bounded_memory_and_the_rest_is_read(
    tmp_path: Path, kind: str, name: str, make: Callable[[], bytes], why: str
) -> None:
    expected = good(kind, tmp_path)
    (tmp_path / name).write_bytes(make())
    tracemalloc.start()
    try:
        report = check_folder(tmp_path, options=ImageOptions(limits=LIMITS))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**27, f"{peak / 2**20:.0f} MiB"
    refused = [finding for finding in report.findings if finding.code == "unreadable"]
    assert [finding.files for finding in refused] == [(name,)]
    line = refused[0].line()
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 220
    assert "Jane" not in line
    assert re.search(why, line), line
    assert report.examples == expected
    assert not report.ok
    assert not Path("/tmp/polyclinic-canary").exists()


def test_pipes_links_and_folders_do_not_hang(tmp_path: Path) -> None:
    good("dicom", tmp_path)
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "nowhere.dcm").symlink_to(tmp_path / "missing.dcm")
    (tmp_path / "folder.dcm").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    report = check_folder(tmp_path, options=ImageOptions(limits=LIMITS))
    lines = sorted(f.line() for f in report.findings if f.code == "unreadable")
    assert lines == ["nowhere.dcm: is a link to nothing", "pipe.dcm: is not an ordinary file"]
    assert any(f.line() == "1 links to folders are not followed" for f in report.findings)
    assert report.examples == 1


def test_all_of_them_together_still_leave_the_good_ones(tmp_path: Path) -> None:
    expected = good("dicom", tmp_path)
    bad = [case for case in CASES if case[0] == "dicom"]
    for _, name, make, _ in bad:
        (tmp_path / name).write_bytes(make())
    report = check_folder(tmp_path, options=ImageOptions(limits=LIMITS))
    assert report.examples == expected
    assert sorted(f.files[0] for f in report.findings if f.code == "unreadable") == sorted(
        name for _, name, _, _ in bad
    )
