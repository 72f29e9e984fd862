"""Import of weights: every supported format, and hostile files, each refused by one sentence without running code."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polyclinic.errors import ConfigError, IntegrityError
from polyclinic.learning.weights import importer, store
from polyclinic.learning.weights.conversion import Refused, convert
from polyclinic.learning.weights.importer import NotImported
from polyclinic.learning.weights.store import Card, UnknownWeights

LEAVES = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def converted(source: Path, key: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    target = source.parent / "converted.safetensors"
    found = convert(source, target, key)
    return found, store.read_file(target)


def saved(path: Path, value: Any, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def plain(folder: Path) -> Path:
    save_file(LEAVES, folder / "w.safetensors")
    return folder / "w.safetensors"


def with_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def monai(folder: Path) -> Path:
    (folder / "bundle" / "configs").mkdir(parents=True)
    (folder / "bundle" / "models").mkdir()
    meta = {
        "name": "spleen",
        "version": "0.5",
        "intended_use": "research",
        "data_source": "MSD",
        "license": "Apache-2.0",
    }
    (folder / "bundle" / "configs" / "metadata.json").write_text(json.dumps(meta))
    code = f"$__import__('os').system('touch {folder / 'canary'}')"
    (folder / "bundle" / "configs" / "inference.json").write_text(json.dumps({"network_def": code}))
    saved(folder / "bundle" / "models" / "model.pt", LEAVES)
    return folder / "bundle"


def snapshot(folder: Path, shards: tuple[str, ...] = ("m-1.safetensors", "m-2.safetensors")) -> Path:
    home = folder / "snapshot"
    home.mkdir()
    (home / "config.json").write_text("{}")
    (home / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'canary')!r}).touch()")
    (home / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: someone/vit\n---\n# Model\n")
    for name, key in zip(shards, LEAVES, strict=True):
        if "/" not in name:
            save_file({key: LEAVES[key]}, home / name)
    index = {"weight_map": dict(zip(LEAVES, shards, strict=True))}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    return home


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("index", torch.arange(3))
        with torch.no_grad():
            self.a.weight.copy_(LEAVES["a.weight"])
            self.a.bias.copy_(LEAVES["a.bias"])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


def script(folder: Path) -> Path:
    torch.jit.script(Scripted()).save(str(folder / "m.pt"))
    return folder / "m.pt"


NNUNET = {
    "network_weights": LEAVES,
    "init_args": {"plans": {"x": 1}},
    "_best_ema": np.float64(0.9),
    "logging": {"lr": [np.float32(1)]},
}
GOOD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "safetensors": (plain, "safetensors"),
    "torch.save": (lambda f: saved(f / "w.pth", LEAVES), "file of torch.save"),
    "legacy torch.save": (
        lambda f: saved(f / "w.pth", LEAVES, _use_new_zipfile_serialization=False),
        "file of torch.save",
    ),
    "training checkpoint": (
        lambda f: saved(f / "w.ckpt", {"epoch": 3, "state_dict": LEAVES, "optimizer": {"lr": 0.1}}),
        "file of torch.save",
    ),
    "teacher and student": (
        lambda f: saved(f / "w.pth", {"student": {"b": torch.zeros(1)}, "teacher": LEAVES}),
        "file of torch.save",
    ),
    "nnU-Net": (lambda f: saved(f / "checkpoint_final.pth", NNUNET), "nnU-Net checkpoint"),
    "TorchScript": (script, "TorchScript archive"),
    "MONAI bundle": (monai, "MONAI bundle, file of torch.save"),
    "Hugging Face": (snapshot, "Hugging Face snapshot"),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    make, form = GOOD[name]
    found, leaves = converted(make(tmp_path))
    assert found["format"] == form
    assert leaves.keys() == LEAVES.keys()
    assert all(torch.equal(leaves[key], LEAVES[key]) for key in LEAVES)
    assert (found["tensors"], found["numbers"]) == (2, 8)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
@pytest.mark.parametrize("name", ["w.safetensors", "received"])
def test_safetensors_are_recognized_whose_header_has_the_length_of_a_pickles_first_bytes(
    length: int, name: str, tmp_path: Path
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    path = tmp_path / name
    with_header(path, header, struct.pack("<2f", 1.0, 2.0))
    assert path.read_bytes()[0] == 0x80
    found, leaves = converted(path)
    assert found["format"] == "safetensors"
    assert leaves["a"].tolist() == [1.0, 2.0]


def test_folders_state_their_license_and_source(tmp_path: Path) -> None:
    assert converted(monai(tmp_path))[0]["card"] == {
        "source": "spleen 0.5",
        "trained_on": "MSD",
        "intended_use": "research",
        "license": "Apache-2.0",
    }
    assert converted(snapshot(tmp_path))[0]["card"] == {"license": "cc-by-nc-4.0", "source": "someone/vit"}


def test_other_types_of_numbers_are_converted_and_noted(tmp_path: Path) -> None:
    given = {
        "h": torch.ones(2, dtype=torch.float16),
        "d": torch.ones(2, dtype=torch.float64),
        "n": torch.ones(1).long(),
    }
    found, leaves = converted(saved(tmp_path / "w.pt", given))
    assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}
    assert found["notes"] == [
        "1 integer tensors, such as counters and tables of indices, were left out",
        "converted from float16, float64 to float32",
    ]


def test_the_entry_of_a_checkpoint_can_be_chosen(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"student": {"b": torch.zeros(1)}, "teacher": LEAVES})
    assert list(converted(path, "student")[1]) == ["b"]
    with pytest.raises(Refused, match="it has no tensors under 'ema'; its entries are student, teacher"):
        converted(path, "ema")


def zipped(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def short_storage(folder: Path) -> Path:
    """A TorchScript archive with a tensor that is larger than its storage."""
    source = script(folder)
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    storages = [name for name in entries if "/data/" in name]
    return zipped(folder / "short.pt", {n: bytes(8) if n in storages else data for n, data in entries.items()})


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle in a zip": (
        lambda f: saved(f / "w.pt", {"a": Runs(f / "canary")}),
        "it contains the object .*system, which would have to be executed",
    ),
    "bare pickle": (
        lambda f: _written(f / "w.pt", pickled({"a": Runs(f / "canary")})),
        "it contains the object .*system, which would have to be executed|PyTorch cannot read it",
    ),
    "legacy file": (
        lambda f: saved(f / "w.pt", {"a": Runs(f / "canary")}, _use_new_zipfile_serialization=False),
        "it contains the object .*system, which would have to be executed",
    ),
    "code in TorchScript": (
        lambda f: zipped(
            f / "w.pt", {"m/data.pkl": pickled(Runs(f / "canary")), "m/code/x.py": b"", "m/version": b"3"}
        ),
        "it contains the object posix.system, which is not a tensor",
    ),
    "tensor beyond its storage": (short_storage, "a tensor reaches beyond its storage"),
    "zip bomb": (
        lambda f: zipped(f / "w.pt", {"m/data.pkl": b"\0" * 2**24}, zipfile.ZIP_DEFLATED),
        "it is an archive of [0-9]+ bytes that unpacks to 16777216",
    ),
    "huge header": (
        lambda f: with_header(f / "w.safetensors", b'{"a":1}', length=2**31),
        "the header length 2147483648 exceeds the limit",
    ),
    "header of 10 GB": (
        lambda f: with_header(f / "w.safetensors", b'{"a":1}', length=10 * 2**30),
        "the header length 10737418240 exceeds the limit",
    ),
    "truncated header": (lambda f: with_header(f / "w.safetensors", b'{"a":', length=99), "the header is truncated"),
    "duplicate names": (
        lambda f: with_header(
            f / "w.safetensors",
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        "a name occurs twice",
    ),
    "offsets beyond the end": (
        lambda f: with_header(
            f / "w.safetensors", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"\0" * 4
        ),
        "the offsets of tensor 'a' do not match its shape",
    ),
    "unknown type": (
        lambda f: with_header(
            f / "w.safetensors", b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4
        ),
        "tensor 'a' is of unknown type 'F8_E4M3'",
    ),
    "deeply nested header": (lambda f: with_header(f / "w.safetensors", b'{"a":' + b"[" * 10**5), "not JSON"),
    "not finite": (
        lambda f: saved(f / "w.pt", {"a": torch.tensor([1.0, float("nan")])}),
        "'a' contains NaN or infinity",
    ),
    "sparse": (
        lambda f: saved(f / "w.pt", {"a": torch.eye(2).to_sparse()}),
        "'a' is sparse, quantized, complex|PyTorch",
    ),
    "no tensors": (lambda f: saved(f / "w.pt", {"epoch": 3}), "it contains no named tensors; its entries are epoch"),
    "one tensor": (lambda f: saved(f / "w.pt", torch.ones(3)), "it contains one Tensor instead of named tensors"),
    "integers only": (lambda f: saved(f / "w.pt", {"a": torch.ones(3).long()}), "no floating-point tensors"),
    "control characters": (lambda f: saved(f / "w.pt", {"a\x1b[2J": torch.ones(3)}), "of a tensor is not printable"),
    "a web page": (lambda f: _written(f / "w.pth", b"<html>Not found</html>"), "it is not of a known format"),
    "empty": (lambda f: _written(f / "w.pth", b""), "it is not of a known format"),
    "damaged archive": (lambda f: _written(f / "w.pth", b"PK\x03\x04" + b"\0" * 99), "it is a damaged archive"),
    "other archive": (lambda f: zipped(f / "w.zip", {"x.txt": b"x"}), "an archive without the entry data.pkl"),
    "folder of anything": (lambda f: f, "neither a MONAI bundle .* nor a Hugging Face snapshot"),
    "shard outside": (
        lambda f: snapshot(f, ("../../etc/passwd", "m.safetensors")),
        "its index names the shard '../../etc/passwd', which is not in the folder",
    ),
}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_one_sentence_and_run_no_code(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    source = make(tmp_path)
    with pytest.raises(Refused, match=message) as error:
        converted(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not (tmp_path / "canary").exists()


def test_the_canary_sings_if_a_file_is_unpickled_without_restriction(tmp_path: Path) -> None:
    torch.load(saved(tmp_path / "w.pt", {"a": Runs(tmp_path / "canary")}), weights_only=False)
    assert (tmp_path / "canary").exists()


def test_adding_runs_in_a_limited_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "w.pth", {"state_dict": LEAVES})
    found = importer.add(source, Card("small", "MIT", source="a test"))
    item = store.find("small")
    assert item == found.stored == store.find(item.sha256) == store.find(str(source))
    assert item.card.original_format == "file of torch.save"
    assert item.card.original_sha256 == store.hash_of(source)
    assert item.card.notes == ("the tensors are those under 'state_dict'",)
    assert torch.equal(store.tensors(item.sha256)["a.weight"], LEAVES["a.weight"])
    bomb = saved(tmp_path / "bomb.pth", {"a": Runs(tmp_path / "canary")})
    with pytest.raises(NotImported, match=r"bomb.pth: it contains the object .*system"):
        importer.add(bomb, Card("bomb", "MIT"))
    assert not (tmp_path / "canary").exists()
    assert [one.card.name for one in store.stored()] == ["small"]
    assert sorted(path.name for path in store.root().iterdir()) == [item.sha256]


@pytest.mark.slow
def test_adding_is_limited_in_memory(tmp_path: Path) -> None:
    """Tensors of 32 GB that share one number: contiguous copies need more memory than the file's size allows."""
    wide = saved(tmp_path / "wide.pth", {"a": torch.zeros(1).expand(2**33)})
    with pytest.raises(NotImported, match=r"wide.pth: reading it (needs more memory|failed)"):
        importer.add(wide, Card("wide", "MIT"))
    assert not store.stored()


def test_network_and_processes_are_blocked_in_the_conversion(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, socket, subprocess, os; from pathlib import Path; from polyclinic.learning.weights import conversion\n"
        f"conversion._limit(Path({str(plain(tmp_path))!r}))\n"
        "for do in (lambda: socket.socket(), lambda: subprocess.run(['true']), lambda: os.system('true'), os.fork):\n"
        "    try:\n        do()\n    except conversion.Refused as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
    assert all("which is not allowed" in line for line in done.stdout.splitlines())


def test_changed_files_and_foreign_names_are_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(UnknownWeights, match=r"no start weights are called 'x'\. In the store: none"):
        store.find("x")
    with pytest.raises(UnknownWeights, match="polyclinic site weights add"):
        store.find("0" * 64)
    item = store.add(plain_at(tmp_path / "one.safetensors", 1.0), Card("one", "MIT"))
    assert (
        store.add(plain_at(tmp_path / "again.safetensors", 1.0), Card("one", "Apache-2.0")).card.license == "Apache-2.0"
    )
    with pytest.raises(ConfigError, match="the name 'one' belongs to other weights"):
        store.add(plain_at(tmp_path / "two.safetensors", 2.0), Card("one", "MIT"))
    item.path.write_bytes(item.path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match="was changed: its hash is not that of its folder"):
        store.tensors(item.sha256)
    (item.path.parent / "card.toml").write_text("name = 3")
    with pytest.raises(IntegrityError, match=r"card\.toml"):
        store.stored()


def plain_at(path: Path, value: float) -> Path:
    save_file({"a": torch.full((2,), value)}, path)
    return path


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": "../up", "license": "MIT"}, "must be at most 63 lowercase letters"),
        ({"name": "0" * 64, "license": "MIT"}, "must be at most 63|must not look like a hash"),
        ({"name": "a", "license": " "}, "weights need a license"),
        ({"name": "a", "license": "x\x1b"}, "license of the card must be printable"),
    ],
)
def test_cards_are_checked(facts: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Card(**facts)  # type: ignore[arg-type]
