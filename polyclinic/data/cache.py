"""What was decoded once is kept on disk, under a name that is the hash of everything it was made from."""

import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import serialization
from polyclinic.data.examples import DataError
from polyclinic.data.source import digest

CHECKED = 2**30
"""Files up to this many bytes are compared with their checksum whenever they are opened; larger ones are mapped."""


def folder() -> Path:
    """Where decoded data lies: the environment variable ``POLYCLINIC_CACHE``, or this user's own cache folder."""
    if chosen := os.environ.get("POLYCLINIC_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("polyclinic"))


def cached(kind: str, key: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``build`` makes, from disk where it was built before.

    Tensors are read as they are touched (the file is mapped, not loaded), so a data set may be larger than memory.
    A damaged file is built again. A file is whole or absent: it is written beside its place and renamed.

    Args:
        kind: The folder within the cache, such as ``"nodules"``.
        key: A hash of all that the result depends on.
        build: Makes the result, a table of tensors and plain values; called only where it is not there.

    Raises:
        DataError: Where the cache cannot be written, with what to do.
    """
    path = folder() / kind / f"{key}.safetensors"
    if (kept := _read(path)) is not None:
        return kept
    built = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        serialization.save(path, built, {"checksum": _checksum(built)})
    except OSError as error:
        raise DataError(
            f"cannot write the cache {path.parent} ({error.strerror}): free some space, or point POLYCLINIC_CACHE at "
            "a folder that you may write"
        ) from error
    return built


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            # A private mapping: pages come from the file when they are touched, and changes never reach it.
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        value, meta = serialization.decode_with_meta(buffer, share=True)
        whole = len(buffer) > CHECKED or meta.get("checksum") == _checksum(value)
    except (OSError, ValueError):  # absent, empty or damaged
        return None
    return value if isinstance(value, dict) and whole else None


def _checksum(value: Mapping[str, Any]) -> str:
    return digest(*(_bytes(part) if isinstance(part, Tensor) else (name, part) for name, part in value.items()))


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
