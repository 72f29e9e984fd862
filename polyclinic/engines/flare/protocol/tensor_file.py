"""Values in files, written in pieces and read leaf by leaf, so that memory use does not grow with the number of sites.

The layout is that of ``core.serialization``. Values that are read stay on disk: a leaf is loaded at access and released
with its last reference. A server that merges fifty replies of 400 MB therefore holds the sum and one leaf.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.core import atomic, serialization
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Request


def write(path: Path, value: Any, durable: bool = True) -> tuple[int, str]:
    """Write ``value`` to ``path``, forced to disk if ``durable``; return its length and SHA-256.

    Raises:
        OSError: If there is no room; no partial file is left.
        TypeError: If the value cannot be saved.
    """
    head, tensors = serialization.header_of(value)
    hasher, size = hashlib.sha256(), 0
    with atomic.writing(path, private=True, durable=durable) as file:
        for piece in (head, *(serialization.bytes_of(tensor) for tensor in tensors)):
            file.write(piece)
            hasher.update(piece)
            size += len(piece)
    return size, hasher.hexdigest()


def read(path: Path) -> Any:
    """Return the value at ``path``; its tensors are private views of the file.

    Raises:
        Corrupt: If the file does not contain a serialized value.
    """
    return serialization.decode(_mapped(path), share=True)


def _mapped(path: Path) -> mmap.mmap:
    """Map the file at ``path`` into memory without reading it."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise serialization.Corrupt("the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_request(path: Path) -> Request:
    """Return the request at ``path``; its leaves stay on disk until they are accessed.

    Raises:
        Corrupt: If the file does not contain a request.
    """
    mapped = _mapped(path)
    request = serialization.decode(mapped, share=True)
    if not isinstance(request, Request) or not isinstance(request.trees, Mapping) or request.per_site != {}:
        raise serialization.Corrupt(f"a request for one site was expected, not {type(request).__name__}")
    return replace(
        request, trees={name: Passing(_tree(name, leaves), mapped) for name, leaves in request.trees.items()}
    )


def read_reply(path: Path) -> Reply:
    """Return the reply at ``path``; its leaves stay on disk until they are accessed.

    Raises:
        Corrupt: If the file does not contain a reply.
    """
    mapped = _mapped(path)
    reply = serialization.decode(mapped, share=True)
    if not isinstance(reply, Reply) or not isinstance(reply.parts, Mapping):
        raise serialization.Corrupt(f"a reply was expected, not {type(reply).__name__}")
    if len(reply.parts) > 1000:
        raise serialization.Corrupt(f"a reply has {len(reply.parts)} parts, and at most 1000 are allowed")
    return Reply({part: _lazy(part, stat, mapped) for part, stat in reply.parts.items()})


def _lazy(part: str, stat: Stat, mapped: mmap.mmap) -> Stat:
    """Return ``stat`` with its trees on disk, after checking that its fields have the types of its class."""
    if not isinstance(stat, WeightedMean | ElementwiseMean | PerSite):
        raise serialization.Corrupt(f"{part}: a {type(stat).__name__} is not an aggregatable value")
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
    raise serialization.Corrupt(f"{part}: a tree contains values other than tensors")


class OnDisk(Mapping[str, Tensor]):
    """Tree whose leaves are in a file. Each access loads a copy of one leaf; merging two trees loads both."""

    def __init__(self, views: Mapping[str, Tensor], mapped: mmap.mmap) -> None:
        self._views, self._mapped = views, mapped

    def __getitem__(self, name: str) -> Tensor:
        """Return a copy of the leaf in memory."""
        leaf = self._views[name].clone()
        self._mapped.madvise(mmap.MADV_DONTNEED)  # nothing was written to the pages, so nothing is lost
        return leaf

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the leaves."""
        return iter(self._views)

    def __len__(self) -> int:
        """Return the number of leaves."""
        return len(self._views)

    def __or__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge with another tree into a dictionary in memory."""
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge with another tree into a dictionary in memory."""
        return {**other, **self}

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves, without reading them."""
        return sum(view.numel() * view.element_size() for view in self._views.values())


class Passing(OnDisk):
    """Read-only tree. A leaf is a view of the file whose pages are released at the next access."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a view of the leaf, without a copy."""
        self._mapped.madvise(mmap.MADV_DONTNEED)  # an earlier leaf still in use is read from disk again
        return self._views[name]
