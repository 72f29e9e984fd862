"""Serialization of server states, site states, requests and replies, to files and messages.

The layout is that of safetensors (https://github.com/huggingface/safetensors): a little-endian header length, a JSON
header, raw tensors. Any safetensors tool can read these files. This module has its own reader because messages from
another site are untrusted and the common readers accept headers of any length and duplicate names; and because tensors
can then be views into a shared buffer, without a copy.

Nothing is unpickled: a value is built from tensors, plain JSON, and classes that the installed code registered with
``@savable(tag, version)``. Files and messages hold the tag and the version, and never the name of a module, so that
moving or renaming a module changes no file format. Reading a tag never imports a module: the caller first imports the
code that defines the class, usually by building the method that the plan names. Unregistered tags are refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from polyclinic.core import atomic
from polyclinic.errors import IntegrityError

MAX_HEADER = 8 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
TAG = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z][a-z0-9_-]*)*\.[A-Z][A-Za-z0-9]*")
MAX_TAG = 80
C = TypeVar("C", bound=type)


class Tag(NamedTuple):
    """The stable name of a savable class, and the version of its fields."""

    name: str
    version: int


_CLASSES: dict[str, type] = {}
_TAGS: dict[type, Tag] = {}


class Place(NamedTuple):
    """Where the bytes of a tensor are in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Corrupt(IntegrityError):
    """Bytes that are not a valid encoded value. The message gives the place and the reason."""


class TagError(TypeError):
    """Incorrect use of ``@savable``: a malformed tag, or one tag for two classes. Raised at import."""


def savable(tag: str, version: int = 1) -> Callable[[C], C]:
    """Register a ``NamedTuple`` or frozen dataclass that may be saved and sent.

    Executing the same definition again (a notebook cell, a reloaded module) replaces the class.

    Args:
        tag: The stable name under which values are stored: lowercase words and the name of the class, joined by dots,
            such as ``"fedavg.State"`` or ``"mypackage.State"``. It does not change when the module moves.
        version: The version of the class's fields. Increase it when their names, order or meaning change.

    Raises:
        TagError: If the tag or version is malformed, or another class has the tag. The message names both classes.
    """
    if not isinstance(tag, str):
        raise TagError('@savable needs a tag: write @savable("mypackage.State", 1)')
    if len(tag) > MAX_TAG or not TAG.fullmatch(tag):
        raise TagError(
            f"the tag {tag[: MAX_TAG + 1]!r} is malformed: write lowercase words and the name of the class, joined by "
            f'dots, such as "mypackage.State", of at most {MAX_TAG} characters'
        )
    if type(version) is not int or version < 1:
        raise TagError(f"the version of the tag {tag!r} must be an integer of at least 1, not {version!r}")

    def register(cls: C) -> C:
        other = _CLASSES.get(tag)
        if other is not None and _path(other) != _path(cls):
            raise TagError(
                f"the tag {tag!r} is registered for both {_path(other)} and {_path(cls)}: change one of the tags"
            )
        _CLASSES[tag], _TAGS[cls] = cls, Tag(tag, version)
        return cls

    return register


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def tag_of(cls: type) -> Tag:
    """Return the tag and version of a savable class.

    Raises:
        TypeError: If the class is not registered. The message names it.
    """
    if cls in _TAGS:
        return _TAGS[cls]
    raise TypeError(
        f'{_path(cls)} cannot be saved: use tensors, plain values, or a class marked @savable("tag", version)'
    )


def kind_of(value: Any) -> str:
    """Return the last word of the tag of ``value``'s class, which policies and journals use to name aggregates."""
    return tag_of(type(value)).name.rpartition(".")[2]


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as plain JSON, with its tensors moved into ``tensors`` and replaced by their names.

    Raises:
        TypeError: If it contains anything but tensors, plain values, mappings with string keys, sequences and
            savable classes. The message names it.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[name := str(len(tensors))] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"only mappings with string keys can be saved; {wrong[0]!r} is not a string")
        return {"map": {key: pack(item, tensors) for key, item in value.items()}}
    cls = type(value)
    if cls is tuple or cls is list:
        return {cls.__name__: [pack(item, tensors) for item in value]}
    tag = tag_of(cls)
    content = {name: pack(getattr(value, name), tensors) for name in _fields(cls)}
    return {"class": tag.name, "version": tag.version, "with": content}


def unpack(plain: Any, tensors: Mapping[str, Tensor | Place], place: tuple[str, ...] = ()) -> Any:
    """Rebuild a value from the result of ``pack``.

    Args:
        plain: The JSON value.
        tensors: The tensors to which it refers, or their places in a file.
        place: The fields and keys that lead to ``plain`` in the complete value, for messages.

    Raises:
        Corrupt: If ``plain`` names an unknown tag or version, a missing tensor, or the wrong fields. The message gives
            the place.
    """
    if not isinstance(plain, dict):
        if isinstance(plain, list):
            raise _corrupt(place, "a bare list is not a value")
        return plain
    match plain:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"map": dict(items)}:
            return {key: unpack(item, tensors, (*place, key)) for key, item in items.items()}
        case {"tuple": list(items)}:
            return tuple(unpack(item, tensors, (*place, str(i))) for i, item in enumerate(items))
        case {"list": list(items)}:
            return [unpack(item, tensors, (*place, str(i))) for i, item in enumerate(items)]
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"class": tag, "version": version, "with": dict(items)} if len(plain) == 3:
            cls = _registered(tag, version, place)
            if list(items) != (wanted := _fields(cls)):
                raise _corrupt(
                    place, f"{tag!r} version {version} has the fields {wanted}, not {str(list(items))[:200]}"
                )
            return cls(**{name: unpack(item, tensors, (*place, name)) for name, item in items.items()})
    raise _corrupt(place, f"not a value: {str(plain)[:80]}")


def _registered(tag: Any, version: Any, place: tuple[str, ...]) -> type:
    """Return the class of a stored tag. Never imports a module, whatever the tag is."""
    if not isinstance(tag, str) or len(tag) > MAX_TAG or not TAG.fullmatch(tag):
        raise _corrupt(place, f'{str(tag)[:MAX_TAG]!r} is not a tag, such as "fedavg.State"')
    if type(version) is not int or version < 1:
        raise _corrupt(place, f"the version of {tag!r} must be an integer of at least 1, not {str(version)[:20]!r}")
    if tag not in _CLASSES:
        raise _corrupt(
            place,
            f"no class is registered for the tag {tag!r}. Install the package that defines it, in the version that "
            "wrote this value; in your own program, import it before reading",
        )
    known = _TAGS[_CLASSES[tag]].version
    if version != known:
        do = "update the package that defines it" if version > known else "read it with the version that wrote it"
        raise _corrupt(
            place, f"{tag!r} is stored in version {version}, and this installation supports version {known}: {do}"
        )
    return _CLASSES[tag]


def _corrupt(place: tuple[str, ...], why: str) -> Corrupt:
    """Return the error, which begins with its place: the last fields and keys, shortened and printable."""
    if not place:
        return Corrupt(why)
    words = [word[:40] if word[:40].isprintable() else repr(word[:40]) for word in place[-6:]]
    return Corrupt(f"field {'.'.join(words)}: {why}")


def _fields(cls: type) -> list[str]:
    if is_dataclass(cls):
        return [f.name for f in fields(cls) if f.init]
    return list(cls._fields)  # type: ignore[attr-defined]


def header_of(value: Any, meta: Mapping[str, str] | None = None) -> tuple[bytes, list[Tensor]]:
    """Return the header of ``value``'s encoding, and the tensors whose bytes follow, in order."""
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(pack(value, tensors), separators=(",", ":"))
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), int(name)))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {**(meta or {}), "value": plain}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensors of {tensor.dtype} cannot be saved")
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in order]


def encode(value: Any, meta: Mapping[str, str] | None = None) -> bytes:
    """Encode ``value`` as bytes, with the metadata ``meta`` in the header."""
    head, tensors = header_of(value, meta)
    out = bytearray(len(head) + sum(t.numel() * t.element_size() for t in tensors))
    write_into(out, head, tensors)
    return bytes(out)


def write_into(buffer: Any, head: bytes, tensors: list[Tensor]) -> int:
    """Write an encoding into a writable ``buffer`` and return its length in bytes."""
    buffer[: len(head)] = head
    offset = len(head)
    for tensor in tensors:
        if count := tensor.numel():
            torch.frombuffer(buffer, dtype=tensor.dtype, count=count, offset=offset).copy_(tensor.reshape(-1))
            offset += count * tensor.element_size()
    return offset


def bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a tensor as bytes, without a copy if it is contiguous and on the CPU."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.stride(0) != 1:  # of a single number, which is contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def decode(buffer: Any, *, share: bool = False) -> Any:
    """Decode the value in ``buffer``. With ``share``, its tensors are views of ``buffer``, which must be writable.

    Raises:
        Corrupt: If ``buffer`` is not exactly one encoded value.
    """
    return decode_with_meta(buffer, share=share)[0]


def decode_with_meta(buffer: Any, *, share: bool = False) -> tuple[Any, dict[str, str]]:
    """Decode the value in ``buffer``, and the metadata of its header."""
    head, meta, start = _header(buffer)
    if not share:
        buffer = bytearray(buffer)
    tensors = {name: _view(buffer, place) for name, place in _places(head, start, len(buffer)).items()}
    return _value(meta, tensors), _texts(meta)


def decode_tensors(buffer: Any) -> dict[str, Tensor]:
    """Decode the tensors of a safetensors file that any tool wrote, as views of the writable ``buffer``.

    Raises:
        Corrupt: If ``buffer`` is not exactly one valid file.
    """
    head, _, start = _header(buffer)
    return {name: _view(buffer, place) for name, place in _places(head, start, len(buffer)).items()}


def layout(path: Path) -> tuple[Any, dict[str, str]]:
    """Read only the header of the file at ``path``: its value with a ``Place`` for each tensor, and its metadata.

    Raises:
        Corrupt: If the file is not exactly one encoded value; a truncated file is recognized by its size.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        begin = file.read(8)
        begin += file.read(min(int.from_bytes(begin, "little"), MAX_HEADER + 1))
        size = file.seek(0, 2)
    head, meta, start = _header(begin)
    return _value(meta, _places(head, start, size)), _texts(meta)


def _value(meta: Any, tensors: Mapping[str, Tensor | Place]) -> Any:
    """Return the value that the metadata describe."""
    if not isinstance(meta, dict) or not isinstance(meta.get("value"), str):
        raise Corrupt("the header does not describe the tensors")
    try:
        return unpack(_json(meta["value"]), tensors)
    except (RecursionError, TypeError) as error:
        raise Corrupt(f"not a value: {error}") from None


def _texts(meta: dict[str, str]) -> dict[str, str]:
    """Return the metadata without the description of the value."""
    return {key: text for key, text in meta.items() if key != "value"}


def _header(buffer: Any) -> tuple[dict[str, Any], Any, int]:
    """Return the description of the tensors, the metadata, and where the tensors begin."""
    if len(buffer) < 8:
        raise Corrupt(f"{len(buffer)} bytes are too few for a header")
    length = int.from_bytes(bytes(buffer[:8]), "little")
    if length > MAX_HEADER:
        raise Corrupt(f"the header length {length} exceeds the limit of {MAX_HEADER} bytes")
    if 8 + length > len(buffer):
        raise Corrupt("the header is truncated")
    header = _json(bytes(buffer[8 : 8 + length]))
    if not isinstance(header, dict):
        raise Corrupt("the header is not a JSON object")
    return header, header.pop("__metadata__", None), 8 + length


def _json(text: str | bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise Corrupt("a name occurs twice")
        return table

    try:
        return json.loads(text, object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Corrupt(f"not JSON: {error}") from None


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    """Return the byte range of a tensor. Sorted by it, empty tensors precede the one that begins at the same offset."""
    match item[1]:
        case {"dtype": str(), "shape": list(), "data_offsets": [int(begin), int(end)]} if len(item[1]) == 3:
            return begin, end
    raise Corrupt(f"tensor {item[0][:40]!r} is not described by dtype, shape and offsets")


def _places(head: Mapping[str, Any], start: int, size: int) -> dict[str, Place]:
    """Return the place of each tensor in an encoding of ``size`` bytes, whose tensors begin at ``start``."""
    places, expected = {}, 0
    for name, entry in sorted(head.items(), key=_offset):
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise Corrupt(f"tensor {name!r} is of unknown type {entry['dtype'][:20]!r}")
        if len(shape) > 16 or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
            raise Corrupt(f"tensor {name!r} has an invalid shape")
        if begin != expected or end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
            raise Corrupt(f"the offsets of tensor {name!r} do not match its shape")
        places[name], expected = Place(dtype, tuple(shape), start + begin), end
    if start + expected != size:
        raise Corrupt(f"{size - start - expected} bytes after the last tensor")
    return places


def _view(buffer: Any, place: Place) -> Tensor:
    """Return the tensor at ``place`` as a view of ``buffer``."""
    if not place.nbytes:
        return torch.empty(place.shape, dtype=place.dtype)
    if place.start % place.dtype.itemsize:  # written by another tool, but valid: copy what cannot be a view
        flat = torch.frombuffer(bytearray(buffer[place.start : place.start + place.nbytes]), dtype=place.dtype)
    else:
        flat = torch.frombuffer(buffer, dtype=place.dtype, count=math.prod(place.shape), offset=place.start)
    return flat.reshape(place.shape)


def save(path: Path, value: Any, meta: Mapping[str, str] | None = None) -> str:
    """Write ``value`` to ``path`` atomically: after a crash the file is the old or the new one.

    Returns:
        The SHA-256 of the file.
    """
    data = encode(value, meta)
    atomic.write(path, data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path) -> Any:
    """Read the value in the file at ``path``.

    Raises:
        Corrupt: If the file is not a valid encoded value. The message names the file.
    """
    try:
        return decode(bytearray(path.read_bytes()), share=True)
    except Corrupt as error:
        raise Corrupt(f"{path}: {error}") from None
