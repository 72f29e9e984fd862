"""On-disk cache of decoded data, keyed by a hash of everything that a result depends on."""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import serialization
from polyclinic.data.examples import DataError
from polyclinic.data.source import digest

CHECKED = 2**30
"""Largest file in bytes whose checksum is verified at each opening; larger files are mapped without verification."""


def folder() -> Path:
    """Return the cache folder: the environment variable ``POLYCLINIC_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("POLYCLINIC_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("polyclinic"))


def cached(kind: str, key: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of ``build``, from disk if it was built before.

    Tensors are memory-mapped, so a data set may be larger than memory. A damaged file is rebuilt. Files are written
    atomically.

    Args:
        kind: Folder within the cache, such as ``"nodules"``.
        key: Hash of everything that the result depends on.
        build: Builds the result, a table of tensors and plain values; called only if it is not cached.

    Raises:
        DataError: If the cache cannot be written, with what to do.
    """
    path = folder() / kind / f"{key}.safetensors"
    if (stored := _read(path)) is not None:
        return stored
    built = build()
    with writing_in(path.parent):
        serialization.save(path, built, {"checksum": _checksum(built)})
    return built


@contextmanager
def writing_in(place: Path) -> Iterator[None]:
    """Create the folder ``place`` of the cache for the block, which writes files there.

    Raises:
        DataError: If the block cannot write, with what to do.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the cache {place} ({error.strerror}): free some space, or point POLYCLINIC_CACHE at a "
            "writable folder"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            # A private mapping: pages are read when accessed, and changes are not written to the file.
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        value, meta = serialization.decode_with_meta(buffer, share=True)
        intact = len(buffer) > CHECKED or meta.get("checksum") == _checksum(value)
    except (OSError, ValueError):  # absent, empty or damaged
        return None
    return value if isinstance(value, dict) and intact else None


def _checksum(value: Mapping[str, Any]) -> str:
    return digest(*(_bytes(part) if isinstance(part, Tensor) else (name, part) for name, part in value.items()))


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
