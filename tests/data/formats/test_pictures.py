"""Pictures keep every bit: TIFF of any byte order, layout and type equals tifffile, and nothing is clipped."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from polyclinic.data.files import ImageOptions, read_image, read_mask
from polyclinic.data.formats.pictures import read_picture
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from tests.support.known import known

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (20, 24)).astype(np.uint16)
COLOR = RNG.integers(0, 65536, (20, 24, 3)).astype(np.uint16)

TIFFS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "big-endian 16 bits": (DEEP, {"byteorder": ">"}),
    "little-endian 16 bits": (DEEP, {"byteorder": "<"}),
    "16-bit color": (COLOR, {"photometric": "rgb"}),
    "planar 16-bit color": (COLOR, {"photometric": "rgb", "planarconfig": "separate"}),
    "big-endian planar": (COLOR, {"photometric": "rgb", "planarconfig": "separate", "byteorder": ">"}),
    "deflate": (COLOR, {"photometric": "rgb", "compression": "zlib"}),
    "deflate with predictor": (DEEP, {"compression": "zlib", "predictor": True}),
    "tiles": (DEEP, {"tile": (16, 16), "compression": "zlib"}),
    "BigTIFF": (DEEP, {"bigtiff": True}),
    "8 bits": (DEEP.astype(np.uint8), {}),
    "8-bit color": (COLOR.astype(np.uint8), {"photometric": "rgb"}),
    "32-bit whole numbers": (DEEP.astype(np.uint32) * 60_000, {}),
    "signed": (DEEP.astype(np.int32).astype(np.int16), {}),
    "real numbers": (RNG.normal(0, 300, (20, 24)).astype(np.float32), {}),
    "double": (RNG.normal(0, 300, (20, 24)), {}),
    "five channels": (
        RNG.integers(0, 255, (5, 20, 24)).astype(np.uint8),
        {"photometric": "minisblack", "planarconfig": "separate"},
    ),
}


@pytest.mark.parametrize("name", TIFFS)
def test_every_tiff_holds_the_numbers_that_were_written(tmp_path: Path, name: str) -> None:
    data, how = TIFFS[name]
    path = tmp_path / "a.tif"
    first = np.moveaxis(data, -1, 0) if how.get("planarconfig") and data.shape[-1] == 3 else data
    tifffile.imwrite(path, first, metadata=None, **how)
    found = read_picture(path)
    last = np.moveaxis(data, 0, -1) if data.shape[0] == 5 else data
    np.testing.assert_array_equal(found.array, last)
    scales = {"u1": 255.0, "u2": 65535.0, "u4": 2.0**32 - 1}
    assert found.full_scale == scales.get(data.dtype.str[1:])
    pixels = read_image([path]).pixels.numpy()
    wanted = last / found.full_scale if found.full_scale else last
    np.testing.assert_allclose(pixels, np.moveaxis(wanted, -1, 0) if last.ndim == 3 else wanted[None], rtol=1e-6)


def test_simpleitk_reads_the_same_sixteen_bits(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    tifffile.imwrite(tmp_path / "a.tif", DEEP >> 4, byteorder=">")
    np.testing.assert_array_equal(
        read_picture(tmp_path / "a.tif").array, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.tif")))
    )


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate"])
def test_compressed_tiffs_of_pillow_are_read(tmp_path: Path, compression: str) -> None:
    for data in (DEEP, DEEP.astype(np.uint8), DEEP.astype(np.float32)):
        Image.fromarray(data).save(tmp_path / "a.tif", compression=compression)
        np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").array, data)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_turned_bright_side_up(tmp_path: Path, dtype: Any) -> None:
    data = DEEP.astype(dtype)
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "a.tif", data, photometric="miniswhite", compression=compression)
        np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").array, np.iinfo(dtype).max - data)


def test_several_pages_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 20, 24), np.uint16), photometric="minisblack")
    with pytest.raises(Unreadable, match="holds 3 pages"):
        read_picture(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((3, 20, 24), np.uint16), imagej=True)
    with pytest.raises(Unreadable, match="holds 3 pages"):
        read_picture(tmp_path / "b.tif")
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((3, 20, 24), np.uint16), photometric="minisblack", truncate=True)
    with tifffile.TiffFile(tmp_path / "c.tif") as file:
        assert len(file.pages) == 1  # the other two follow without a header of their own
    with pytest.raises(Unreadable, match="holds 3 pages"):
        read_picture(tmp_path / "c.tif")


def test_transparency_is_left_out(tmp_path: Path) -> None:
    data = RNG.integers(0, 255, (20, 24, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").array, data[..., :3])


def test_a_deflated_bomb_stops_at_the_size_of_its_picture(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), compression="zlib", rowsperstrip=64)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        start, length, tag = page.dataoffsets[0], page.databytecounts[0], page.tags["StripByteCounts"]
    bomb = zlib.compress(bytes(2**24), 9)
    at = tag.valueoffset
    content = content[:at] + struct.pack("<I", len(bomb)) + content[at + 4 : start] + bomb
    assert length < len(bomb)
    (tmp_path / "b.tif").write_bytes(content)
    with pytest.raises(Unreadable, match="inflate to more than"):
        read_picture(tmp_path / "b.tif")
    with pytest.raises(Unreadable, match="limit is 1 KiB"):
        read_picture(tmp_path / "a.tif", Limits(decoded_bytes=1024))


def test_nan_is_refused_or_filled(tmp_path: Path) -> None:
    data = np.ones((20, 24), np.float32)
    data[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", data)
    with pytest.raises(Unreadable, match=r"1 of 480 voxels are not finite.*fill = 0"):
        read_image([tmp_path / "a.tif"])
    filled = read_image([tmp_path / "a.tif"], options=ImageOptions(fill=-2)).pixels
    assert filled[0, 3, 4] == -2
    assert int((filled == 1).sum()) == 479


def test_twelve_bits_in_sixteen_are_scaled_as_declared(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", DEEP >> 4)
    np.testing.assert_allclose(
        read_image([tmp_path / "a.tif"], options=ImageOptions(bits=12)).pixels[0].numpy(), (DEEP >> 4) / 4095, rtol=1e-6
    )
    tifffile.imwrite(tmp_path / "a.tif", DEEP)
    with pytest.raises(Unreadable, match="bits = 12 allows up to 4095"):
        read_image([tmp_path / "a.tif"], options=ImageOptions(bits=12))


def test_webp_is_read_like_pillow(tmp_path: Path) -> None:
    data = RNG.integers(0, 255, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(data).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.webp").array, data)


def deep_png(path: Path, data: np.ndarray) -> None:
    """Write a PNG of 16 bits in several channels, which Pillow cannot."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    high, wide, channels = data.shape
    head = struct.pack(">IIBBBBB", wide, high, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in data)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_per_color_are_kept(tmp_path: Path, channels: int) -> None:
    pytest.importorskip("SimpleITK")
    data = RNG.integers(0, 4096, (20, 24, channels)).astype(np.uint16)
    deep_png(tmp_path / "a.png", data)
    found = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(found.array, data[..., :3])
    assert found.full_scale == 65535


def test_numbers_that_would_lose_a_part_are_refused(tmp_path: Path) -> None:
    deep_png(tmp_path / "a.png", np.zeros((20, 24, 2), np.uint16))
    with pytest.raises(Unreadable, match="16 bits with transparency"):
        read_picture(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", np.ones((20, 24), np.complex64))
    with pytest.raises(Unreadable, match="complex numbers"):
        read_picture(tmp_path / "a.tif")


def test_a_mask_must_not_have_lost_detail(tmp_path: Path) -> None:
    drawn = np.zeros((40, 48), np.uint8)
    drawn[7:23, 9:31] = 3
    drawn[11:20, 17:25] = 250
    for name, lossy in (
        ("a.jpg", True),
        ("a.webp", True),
        ("b.webp", False),
        ("a.tif", True),
        ("b.tif", False),
        ("a.png", False),
    ):
        kwargs: dict[str, Any] = {"lossless": not lossy} if name.endswith("webp") else {}
        kwargs |= {"compression": "jpeg" if lossy else "tiff_lzw"} if name.endswith("tif") else {}
        picture = Image.fromarray(drawn)
        (picture.convert("RGB") if name.endswith("webp") else picture).save(tmp_path / name, **kwargs)
        if lossy:
            with pytest.raises(Unreadable, match="compression loses detail"):
                read_mask(tmp_path / name)
        else:
            np.testing.assert_array_equal(read_mask(tmp_path / name)[0].array[0].numpy(), drawn)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    picture = Image.fromarray(RNG.integers(0, 255, (6, 9)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        upright = np.asarray(ImageOps.exif_transpose(saved))
    for name in ("a.png", "a.tif"):
        picture.save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(read_picture(tmp_path / name).upright, upright)
    if orientation > 1:
        picture.save(tmp_path / "b.tif", exif=exif, compression="tiff_lzw")
        with pytest.raises(Unreadable, match="save it upright"):
            read_picture(tmp_path / "b.tif")
    pixels = read_image([tmp_path / "a.png"]).pixels
    assert torch.equal(pixels[0], torch.from_numpy(upright.astype(np.float32)) / 255)


def test_exif_of_an_image_and_not_of_its_mask(tmp_path: Path) -> None:
    """A quarter turn shows in the sizes; half a turn does not, so it is refused."""
    drawn = np.zeros((6, 9), np.uint8)
    drawn[1:3, 2:7] = 255
    for orientation, told in ((6, True), (8, True), (3, False), (2, False)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(drawn).save(tmp_path / "i.png", exif=exif)
        upright = read_picture(tmp_path / "i.png").upright
        for mask in (drawn, upright):
            Image.fromarray(mask).save(tmp_path / "m.png")
            if told:
                picture = read_image([tmp_path / "i.png"], tmp_path / "m.png")
                assert torch.equal(known(picture.mask) == 255, picture.pixels[0] == 1)
            else:
                with pytest.raises(Unreadable, match="save the image upright"):
                    read_image([tmp_path / "i.png"], tmp_path / "m.png")
        Image.fromarray(drawn).save(tmp_path / "m.png", exif=exif)
        both = read_image([tmp_path / "i.png"], tmp_path / "m.png")
        assert torch.equal(known(both.mask) == 255, both.pixels[0] == 1)
