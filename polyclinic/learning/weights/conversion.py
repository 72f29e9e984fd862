"""Conversion of weights of other formats to safetensors, in a process of its own with limited memory and rights.

This is the only place that meets pickled files. It reads them with PyTorch's restricted unpickler (``weights_only``),
which refuses everything but tensors and plain containers; archives of TorchScript are read as data, by an unpickler
that knows tensors only. No code of a file or folder is executed, and no configuration is evaluated.

Run as ``python -m polyclinic.learning.weights.conversion SOURCE TARGET KEY``. It writes TARGET and prints one line of
JSON: what was found, or the reason why the source is refused.
"""

import json
import pickle
import re
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.serialization import Corrupt
from polyclinic.learning.weights.store import hash_of, read_file

KEYS = (
    "network_weights",
    "state_dict",
    "model_state_dict",
    "model_ema",
    "model",
    "teacher",
    "student",
    "net",
    "network",
    "module",
)
"""Keys under which training programs store a network's tensors, in the order in which they are tried."""
MOST_TENSORS = 50_000
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
MEMORY = 2**30
"""Memory in bytes beyond a multiple of the file's size."""
BLOCKED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "pty.",
)
"""Audit events of Python that a conversion never needs, and that therefore end it."""


class Refused(Exception):
    """A source that is not converted. The message gives the reason."""


@dataclass
class Found:
    """What a source contains.

    Attributes:
        tensors: The floating-point tensors.
        format: The format of the source, in words.
        file: The file whose hash identifies the source.
        notes: What was changed or left out.
        card: Facts for the card that the source states itself.
    """

    tensors: dict[str, Tensor]
    format: str
    file: Path
    notes: list[str] = field(default_factory=list)
    card: dict[str, str] = field(default_factory=dict)


def convert(source: Path, target: Path, key: str = "") -> dict[str, Any]:
    """Write the tensors in ``source`` to ``target`` as float32 safetensors; return what was found, as plain data.

    Args:
        source: A file or folder of a supported format.
        target: The file to write.
        key: The entry of the file that holds the tensors; by default the first of ``KEYS``, or the file itself.

    Raises:
        Refused: If the source is not converted.
    """
    found = _read_folder(source, key) if source.is_dir() else _read_file(source, key)
    leaves = _plain(found)
    from safetensors.torch import save_file

    save_file(leaves, target)
    facts = asdict(found) | {"tensors": len(leaves), "file": "", "sha256": hash_of(found.file)}
    return facts | {"numbers": sum(leaf.numel() for leaf in leaves.values())}


def _plain(found: Found) -> dict[str, Tensor]:
    """Return the floating-point tensors as separate float32 tensors, and note what changed."""
    if not found.tensors:
        raise Refused("it contains no tensors")
    if len(found.tensors) > MOST_TENSORS:
        raise Refused(f"it contains {len(found.tensors)} tensors, and at most {MOST_TENSORS} are read")
    leaves, whole, cast = dict[str, Tensor](), 0, set[str]()
    for name, leaf in sorted(found.tensors.items()):
        if len(name) > 500 or not name.isprintable():
            raise Refused(f"the name {name[:60]!r} of a tensor is not printable or longer than 500 characters")
        if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_complex() or leaf.device.type == "meta":
            raise Refused(f"tensor {name!r} is sparse, quantized, complex or without data, which is not supported")
        if not leaf.is_floating_point():
            whole += 1
            continue
        if leaf.dtype != torch.float32:
            cast.add(str(leaf.dtype).removeprefix("torch."))
        leaf = leaf.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not bool(torch.isfinite(leaf).all()):
            raise Refused(f"tensor {name!r} contains NaN or infinity")
        leaves[name] = leaf
    if whole:
        found.notes.append(f"{whole} integer tensors, such as counters and tables of indices, were left out")
    if cast:
        found.notes.append(f"converted from {', '.join(sorted(cast))} to float32")
    if not leaves:
        raise Refused("it contains no floating-point tensors")
    return leaves


def _read_file(path: Path, key: str) -> Found:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        return _zipped(path, size, key)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _safetensors(path)  # the length of a header may look like the beginning of a pickle
    if head.startswith(LEGACY_MAGIC) or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _torch_file(path, key, mapped=False)
    if len(head) >= 9 and head[8:9] == b"{":
        return _safetensors(path)
    raise Refused("it is not of a known format: safetensors, or a file of torch.save or torch.jit.save")


def _safetensors(path: Path) -> Found:
    try:
        tensors = read_file(path)
    except Corrupt as error:
        raise Refused(str(error).removeprefix(f"{path}: ")) from None
    found = Found(dict(tensors), "safetensors", path)
    meta = _metadata(path)
    if "plan" in meta:
        plan = json.loads(meta["plan"])
        found.format = f"model of Polyclinic ({str(plan.get('network'))[:60]})"
        if plan.get("tuning"):
            raise Refused(
                "it contains the trained tensors of a network with start weights only: write the whole network with "
                "`polyclinic export RUN FILE --form safetensors`, and add that file"
            )
    return found


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        meta = json.loads(file.read(length)).get("__metadata__", {})
    return meta if isinstance(meta, dict) else {}


def _zipped(path: Path, size: int, key: str) -> Found:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise Refused(f"it is a damaged archive ({error})") from None
    if (unpacked := sum(entry.file_size for entry in entries)) > size + 2**20:
        raise Refused(f"it is an archive of {size} bytes that unpacks to {unpacked}: weights are stored uncompressed")
    names = [entry.filename for entry in entries]
    if any(re.search(r"(^|/)code/", name) for name in names):
        return _torchscript(path)
    if not any(name.endswith("data.pkl") for name in names):
        raise Refused("it is an archive without the entry data.pkl, and not a file of torch.save")
    return _torch_file(path, key, mapped=True)


def _torch_file(path: Path, key: str, mapped: bool) -> Found:
    """Read a file of ``torch.save``. A file of nnU-Net contains scalars of NumPy, which are data too."""
    import numpy as np
    from numpy.dtypes import Float32DType, Float64DType, Int64DType

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]  # the name under which NumPy pickles a number
    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        scalar,
        np.dtype,
        Float32DType,
        Float64DType,
        Int64DType,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True if mapped else None)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"(?:Unsupported global: |Unsupported class |GLOBAL )\s*(\S+)", str(error))
        what = f"the object {blocked[1][:80]}" if blocked else "objects other than tensors"
        raise Refused(
            f"it contains {what}, which would have to be executed to be read: ask its author for safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise Refused(
            f"PyTorch cannot read it: {str(error).splitlines()[0][:200] if str(error) else 'damaged'}"
        ) from None
    tensors, used = _state(value, key)
    kind = (
        "nnU-Net checkpoint" if isinstance(value, Mapping) and {"network_weights", "init_args"} <= value.keys() else ""
    )
    notes = [f"the tensors are those under {used!r}"] if used else []
    return Found(tensors, kind or "file of torch.save", path, notes)


def _state(value: Any, key: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a network in what ``torch.save`` saved, and the key they were under."""
    if not isinstance(value, Mapping):
        raise Refused(f"it contains one {type(value).__name__} instead of named tensors")
    if key:
        if not isinstance(value.get(key), Mapping):
            raise Refused(f"it has no tensors under {key!r}; its entries are {', '.join(map(str, list(value)[:20]))}")
        return _tensors(value[key]), key
    for candidate in KEYS:
        inner = value.get(candidate)
        if isinstance(inner, Mapping) and _tensors(inner):
            return _tensors(inner), candidate
    if tensors := _tensors(value):
        return tensors, ""
    raise Refused(f"it contains no named tensors; its entries are {', '.join(map(str, list(value)[:20])) or 'none'}")


def _tensors(table: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in table.items() if isinstance(name, str) and isinstance(leaf, Tensor)}


class _Record:
    """An object of TorchScript: its attributes, without its class."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})


class _DataOnly(pickle.Unpickler):
    """Reads the objects of a TorchScript archive as records and tensors. Every other class is refused."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Return a record for a class of TorchScript, or the builder of a tensor."""
        if module.startswith("__torch__"):
            return _Record
        match module, name:
            case ("torch._utils", "_rebuild_tensor_v2"):
                return _tensor
            case ("torch._utils", "_rebuild_parameter"):
                return lambda leaf, *_: leaf
            case ("collections", "OrderedDict"):
                return dict
            case ("torch.jit._pickle", "restore_type_tag"):
                return lambda value, _: value
            case ("torch.jit._pickle", "build_intlist" | "build_doublelist" | "build_boollist" | "build_tensorlist"):
                return list
            case ("torch", str(kind)) if kind.endswith("Storage"):
                return _STORAGES.get(kind, torch.uint8)
        raise Refused(f"it contains the object {module}.{name}, which is not a tensor"[:200])

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the bytes of a storage."""
        _, dtype, key, *_ = pid
        return self._storage(str(key), dtype)


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    if min([offset, *size, *stride], default=0) < 0 or last >= max(len(storage), 1):
        raise Refused("a tensor reaches beyond its storage")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _torchscript(path: Path) -> Found:
    """Read the tensors of a TorchScript archive as data. Its code is not read."""
    with zipfile.ZipFile(path) as archive:
        (pickled, *_) = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"] or [
            ""
        ]
        if not pickled:
            raise Refused("it is an archive of TorchScript without the entry data.pkl")
        folder = pickled.removesuffix("data.pkl") + "data/"

        def storage(key: str, dtype: torch.dtype) -> Tensor:
            data = archive.read(folder + key)
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

        with archive.open(pickled) as file:
            try:
                value = _DataOnly(file, storage).load()
            except Refused:
                raise
            except Exception as error:  # a damaged pickle may raise anything
                raise Refused(
                    f"its objects cannot be read as data ({type(error).__name__}: {str(error)[:120]})"
                ) from None
    found: dict[str, Tensor] = {}
    _collect(value, "", found, depth=0)
    note = "from a TorchScript archive: its tensors were read as data, and its code was not"
    return Found(found, "TorchScript archive", path, [note])


def _collect(value: Any, prefix: str, found: dict[str, Tensor], depth: int) -> None:
    if depth > 60:
        raise Refused("its modules are nested too deeply")
    if isinstance(value, Tensor):
        found[prefix] = value
    elif isinstance(value, _Record):
        for name, item in value.__dict__.items():
            if isinstance(item, Tensor | _Record):
                _collect(item, f"{prefix}.{name}" if prefix else name, found, depth + 1)


def _read_folder(folder: Path, key: str) -> Found:
    if (folder / "configs" / "metadata.json").is_file():
        return _bundle(folder, key)
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors*")):
        return _snapshot(folder)
    raise Refused(
        "it is a folder, but neither a MONAI bundle (configs/metadata.json) nor a Hugging Face snapshot (config.json "
        "with model.safetensors)"
    )


def _bundle(folder: Path, key: str) -> Found:
    """Read the weights of a MONAI bundle. Its configuration is not evaluated."""
    for name in ("model.safetensors", "model.pt", "model.pth"):
        if (folder / "models" / name).is_file():
            found = _read_file(folder / "models" / name, key)
            break
    else:
        raise Refused("it is a MONAI bundle without models/model.safetensors or models/model.pt")
    about = _json_table(folder / "configs" / "metadata.json")
    texts = {
        "version": "",
        "name": "source",
        "data_source": "trained_on",
        "intended_use": "intended_use",
        "license": "license",
    }
    for theirs, ours in texts.items():
        if ours and isinstance(about.get(theirs), str):
            found.card[ours] = about[theirs][:500]
    if isinstance(about.get("version"), str):
        found.card["source"] = f"{found.card.get('source', 'MONAI bundle')} {about['version'][:40]}"
    found.format = f"MONAI bundle, {found.format}"
    return found


def _snapshot(folder: Path) -> Found:
    """Read the shards of a Hugging Face snapshot, and the license in its model card."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        shards = [single]
    elif index.is_file():
        weight_map = _json_table(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise Refused("model.safetensors.index.json has no weight_map")
        names = sorted(set(weight_map.values()))
        if wrong := [name for name in names if "/" in name or "\\" in name or name.startswith(".")]:
            raise Refused(f"its index names the shard {wrong[0][:80]!r}, which is not in the folder")
        shards = [folder / name for name in names]
    else:
        raise Refused("it has no model.safetensors and no model.safetensors.index.json")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not shard.is_file():
            raise Refused(f"the shard {shard.name} is missing")
        part = _safetensors(shard).tensors
        if twice := tensors.keys() & part.keys():
            raise Refused(f"the tensor {sorted(twice)[0]!r} is in two shards")
        tensors |= part
    found = Found(tensors, "Hugging Face snapshot", shards[0] if len(shards) == 1 else index)
    readme = folder / "README.md"
    if readme.is_file() and (
        front := re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace")[:20_000], re.S)
    ):
        for theirs, ours in {"license": "license", "base_model": "source"}.items():
            if line := re.search(rf"^{theirs}: *(\S.*)$", front[1], re.M):
                found.card[ours] = line[1].strip().strip("\"'")[:200]
    return found


def _json_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes()[: 2**24])
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path.name} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise Refused(f"{path.name} is not a JSON object")
    return table


def _size(source: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _limit(source: Path) -> None:
    """Limit memory, time and the size of written files, and block network and other processes."""
    size = _size(source)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * size + MEMORY,) * 2)
    seconds = 120 + size // 10_000_000
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * size + 2**20,) * 2)

    def forbid(event: str, _: Any) -> None:
        if event.startswith(BLOCKED):
            raise Refused(f"reading it would do {event}, which is not allowed")

    sys.addaudithook(forbid)


def main(source: str, target: str, key: str) -> None:
    """Convert under limits, and print one line of JSON."""
    from safetensors.torch import save_file  # noqa: F401  # before the limits

    torch.set_num_threads(1)
    _limit(Path(source))
    try:
        found = convert(Path(source), Path(target), key)
    except Refused as error:
        found = {"refused": str(error)}
    except MemoryError:
        found = {"refused": "reading it needs more memory than its size allows"}
    except RecursionError:
        found = {"refused": "its objects are nested too deeply"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
