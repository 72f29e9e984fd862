"""Limits on files, checked before memory is allocated, and the common error for a refused file.

A few kilobytes can claim to be terabytes: compressed streams, headers with absurd dimensions, lengths that do not
match. Every reader in this package checks here first, so that a hostile or damaged file causes one clear message and
bounded memory use, never a crash. The meaning of an image is not examined.
"""

import contextlib
import gzip
import math
import os
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from polyclinic.errors import DataError


class Unreadable(DataError):
    """Refused file, with the reason in one line.

    The reason never quotes text from the file, which may name a patient; it contains only numbers and fixed text.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"{self.path.name}: {reason}")
        self.args = (path, reason)  # needed to unpickle this error in another process

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Convert any parser error on damaged bytes into one refusal: ``what``, and the type of the error.

    The parser's message is dropped because it may quote the file. A missing package remains an ``ImportError``.
    """
    try:
        yield
    except (Unreadable, ImportError):
        raise
    except RecursionError:
        raise Unreadable(path, "nests its parts too deeply") from None
    except MemoryError:
        raise Unreadable(path, "needs more memory than is available") from None
    except Exception as error:
        raise Unreadable(path, f"{what} ({type(error).__name__})") from None


@dataclass(frozen=True)
class Limits:
    """Limits on one file. A site's settings can raise them if its data are larger.

    Attributes:
        decoded_bytes: Bytes of one decoded image, counted with at least 4 bytes per voxel (it becomes float32).
        inflated_bytes: Bytes of a data set that is compressed as a whole (deflated DICOM).
        side: Voxels along one axis.
        file_bytes: Bytes of one file on disk.
        header_bytes: Bytes of a header or of its extensions.
        text_bytes: Bytes of a table, a manifest or a JSON file.
        members: Arrays in one archive.
    """

    decoded_bytes: int = 2**30
    inflated_bytes: int = 2**27
    side: int = 32_768
    file_bytes: int = 2**32
    header_bytes: int = 2**24
    text_bytes: int = 2**26
    members: int = 256


LIMITS = Limits()


def size(nbytes: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "bytes" or nbytes >= 100 else f"{nbytes:.3g} {unit}"


def regular_file(path: str | os.PathLike[str], limits: Limits = LIMITS) -> int:
    """Return the size in bytes of a nonempty regular file; refuse pipes and devices, on which a reader would block."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise Unreadable(path, "is a link to nothing" if os.path.islink(path) else "there is no such file") from None
    except (OSError, ValueError) as error:
        raise Unreadable(path, f"cannot be opened ({type(error).__name__})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(path, "is not an ordinary file")
    if status.st_size == 0:
        raise Unreadable(path, "is empty (0 bytes)")
    if status.st_size > limits.file_bytes:
        raise Unreadable(path, f"is {size(status.st_size)}, the limit is {size(limits.file_bytes)}")
    return status.st_size


def read_whole(path: str | os.PathLike[str], limits: Limits = LIMITS) -> bytes:
    """Return the bytes of a regular file of at most ``limits.file_bytes``."""
    length = regular_file(path, limits)
    try:
        with open(path, "rb") as file:
            data = file.read(length + 1)
    except OSError as error:
        raise Unreadable(path, f"cannot be read ({type(error).__name__})") from None
    if len(data) > length:
        raise Unreadable(path, "grew while it was read: read it again when it is complete")
    return data


def read_text(path: str | os.PathLike[str], limits: Limits = LIMITS) -> str:
    """Return the text of a table or JSON file in UTF-8 (or Latin-1) of at most ``limits.text_bytes``."""
    length = regular_file(path, limits)
    if length > limits.text_bytes:
        raise Unreadable(path, f"is a text of {size(length)}, the limit is {size(limits.text_bytes)}")
    data = read_whole(path, limits)
    if b"\0" in data[:4096]:
        raise Unreadable(path, "is not a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_toml(path: Path, limits: Limits = LIMITS) -> dict[str, Any]:
    """Return the table in a TOML file of at most ``limits.text_bytes``.

    Raises:
        DataError: If it cannot be read, or is not TOML. The message names the file.
    """
    try:
        return tomllib.loads(read_text(path, limits))
    except (Unreadable, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from None


def fits(
    path: str | os.PathLike[str], shape: Sequence[int], itemsize: int, limits: Limits = LIMITS, what: str = "image"
) -> int:
    """Return the bytes of a stored array of ``shape``, after checking that it is within the limits."""
    if not shape or any(n < 1 for n in shape):
        raise Unreadable(path, f"the {what} has a dimension below 1: {_by(shape)}")
    if len(shape) > 8 or max(shape) > limits.side:
        raise Unreadable(path, f"the {what} claims {_by(shape)} voxels; the limit is {limits.side} along an axis")
    voxels = math.prod(int(n) for n in shape)
    if voxels * max(itemsize, 4) > limits.decoded_bytes:
        needed = size(voxels * max(itemsize, 4))
        raise Unreadable(
            path, f"the {what} claims {_by(shape)} voxels, {needed} decoded; the limit is {size(limits.decoded_bytes)}"
        )
    return voxels * itemsize


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(int(n)) for n in shape[:8])


def read_exactly(path: str | os.PathLike[str], file: BinaryIO | gzip.GzipFile, count: int, what: str) -> bytes:
    """Return ``count`` bytes from a plain or gzip stream, or refuse the file."""
    try:
        data = file.read(count)
    except (EOFError, OSError, zlib.error) as error:
        raise Unreadable(path, f"the compressed data is damaged ({type(error).__name__}) in the {what}") from None
    if len(data) < count:
        raise Unreadable(path, f"is truncated: {len(data)} of the {count} bytes of the {what} are there")
    return data


def inflate(path: str | os.PathLike[str], data: bytes, most: int, wbits: int) -> bytes:
    """Inflate at most ``most`` bytes; refuse more than that, and damaged data.

    ``wbits`` is -15 for raw deflate, 15 for zlib, 31 for gzip.
    """
    parts, room, rest = [], most + 1, data
    while True:
        stream = zlib.decompressobj(wbits)
        try:
            parts.append(stream.decompress(rest, room))
        except zlib.error:
            raise Unreadable(path, "the compressed data is damaged") from None
        room, rest = room - len(parts[-1]), stream.unused_data
        if room == 0:
            raise Unreadable(path, f"{size(len(data))} compressed inflate to more than the {size(most)} expected")
        if not stream.eof:
            raise Unreadable(path, "is truncated: the compressed data stops in the middle")
        if wbits < 16 or not rest.startswith(b"\x1f\x8b"):  # gzip may consist of several members
            return b"".join(parts)


def read_npz(path: str | os.PathLike[str], limits: Limits = LIMITS) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a NumPy archive after checking headers and sizes; refuse Python objects."""
    regular_file(path, limits)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with refusing(path, "is not a sound NumPy archive"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > limits.members:
            raise Unreadable(path, f"holds {len(members)} arrays, the limit is {limits.members}")
        total = 0
        for member in members:
            with archive.open(member) as file:
                total += _npy_bytes(path, file, limits)
            if total > limits.decoded_bytes:
                raise Unreadable(path, f"its arrays take over {size(limits.decoded_bytes)} together")
        for member in members:
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    file, allow_pickle=False, max_header_size=10_000
                )
    return arrays


def _npy_bytes(path: str | os.PathLike[str], file: Any, limits: Limits) -> int:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise Unreadable(path, "holds an array in an unknown NumPy format version")
    shape, _, dtype = read(file, max_header_size=10_000)
    if dtype.hasobject:
        raise Unreadable(path, "holds Python objects, which are never loaded; save plain arrays")
    total = math.prod(int(n) for n in shape) * dtype.itemsize
    if any(n < 0 for n in shape) or total > limits.decoded_bytes:
        raise Unreadable(path, f"holds an array of {size(total)}; the limit is {size(limits.decoded_bytes)}")
    return total
