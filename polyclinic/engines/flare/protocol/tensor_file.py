"""Values in files: written piece by piece, read leaf by leaf, so that memory does not grow with the number of sites.

The layout is that of ``core.serialization``. What is read back stays on the disk: a leaf enters memory when somebody
asks for it and leaves it with the last reference. So a server that merges fifty replies of 400 MB holds the sum and one
leaf.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import serialization
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Request


def write(path: Path, value: Any, durable: bool = True) -> tuple[int, str]:
    """Writes ``value`` to ``path``, forces it to the disk if it must be ``durable``; its length and SHA-256.

    Raises:
        OSError: Where there is no room; nothing half-written is left.
        TypeError: Where it cannot be saved.
    """
    head, tensors = serialization.header_of(value)
    beside = path.with_name(f".{path.name}.part")
    hasher, size = hashlib.sha256(), 0
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for piece in (head, *(_bytes_of(tensor) for tensor in tensors)):
                file.write(piece)
                hasher.update(piece)
                size += len(piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return size, hasher.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor as they lie in memory, without a copy where it is contiguous."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def read(path: Path) -> Any:
    """The value at ``path``; its tensors are private views of the file.

    Raises:
        Corrupt: Where it is not a value of ours.
    """
    return serialization.decode(_mapped(path), share=True)


def _mapped(path: Path) -> mmap.mmap:
    """The file at ``path`` as memory, of which nothing is read yet."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise serialization.Corrupt("the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_ask(path: Path) -> Request:
    """The ask at ``path``, whose leaves stay on the disk until somebody looks at them.

    Raises:
        Corrupt: Where the file does not hold an ask.
    """
    mapped = _mapped(path)
    request = serialization.decode(mapped, share=True)
    if not isinstance(request, Request) or not isinstance(request.trees, Mapping) or request.per_site != {}:
        raise serialization.Corrupt(f"an ask for one site was expected, not {type(request).__name__}")
    return replace(
        request, trees={name: Passing(_tree(name, leaves), mapped) for name, leaves in request.trees.items()}
    )


def read_reply(path: Path) -> Reply:
    """The reply at ``path``, whose leaves stay on the disk until somebody looks at them.

    Raises:
        Corrupt: Where the file does not hold a reply.
    """
    mapped = _mapped(path)
    reply = serialization.decode(mapped, share=True)
    if not isinstance(reply, Reply) or not isinstance(reply.parts, Mapping):
        raise serialization.Corrupt(f"a reply was expected, not {type(reply).__name__}")
    if len(reply.parts) > 1000:
        raise serialization.Corrupt(f"a reply of {len(reply.parts)} parts")
    return Reply({part: _lazy(part, stat, mapped) for part, stat in reply.parts.items()})


def _lazy(part: str, stat: Stat, mapped: mmap.mmap) -> Stat:
    """``stat`` with its trees on the disk, after checking that it is what its class says."""
    if not isinstance(stat, WeightedMean | ElementwiseMean | PerSite):
        raise serialization.Corrupt(f"{part}: a {type(stat).__name__} is no stat")
    changes: dict[str, Any] = {}
    for field in fields(stat):
        value = getattr(stat, field.name)
        if field.name in ("total", "weight") and isinstance(value, Mapping):
            changes[field.name] = OnDisk(_tree(part, value), mapped)
        elif field.name == "items" and isinstance(value, Mapping):
            changes["items"] = {site: OnDisk(_tree(part, leaves), mapped) for site, leaves in value.items()}
        elif (field.name == "weight" and isinstance(stat, WeightedMean) and isinstance(value, float)) or (
            field.name == "weights" and isinstance(value, Mapping) and all(isinstance(w, float) for w in value.values())
        ):
            continue
        else:
            raise serialization.Corrupt(f"{part}: its {field.name} is {type(value).__name__}")
    return replace(stat, **changes)


def _tree(part: str, value: Any) -> Mapping[str, Tensor]:
    if isinstance(value, Mapping) and all(isinstance(leaf, Tensor) for leaf in value.values()):
        return value
    raise serialization.Corrupt(f"{part}: a tree holds something else than tensors")


class OnDisk(Mapping[str, Tensor]):
    """A tree whose leaves lie in a file. Each access copies one leaf into memory; two trees in one are in memory."""

    def __init__(self, views: Mapping[str, Tensor], mapped: mmap.mmap) -> None:
        self._views, self._mapped = views, mapped

    def __getitem__(self, name: str) -> Tensor:
        """The leaf, in memory."""
        leaf = self._views[name].clone()
        self._mapped.madvise(mmap.MADV_DONTNEED)  # nothing was written to the pages, so nothing is lost
        return leaf

    def __iter__(self) -> Iterator[str]:
        """The leaves' names."""
        return iter(self._views)

    def __len__(self) -> int:
        """How many leaves."""
        return len(self._views)

    def __or__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This tree and another, as of two dictionaries."""
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another tree and this, as of two dictionaries."""
        return {**other, **self}

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves, without reading them."""
        return sum(view.numel() * view.element_size() for view in self._views.values())


class Passing(OnDisk):
    """A read-only tree: a leaf is a view of the file, whose pages are released when the next is requested."""

    def __getitem__(self, name: str) -> Tensor:
        """The leaf, without a copy."""
        self._mapped.madvise(mmap.MADV_DONTNEED)  # whoever still holds the leaf before reads it from the disk again
        return self._views[name]
