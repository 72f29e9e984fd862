"""The file format of a data vector, which any tool can read and which is signed by its site.

A vector is one safetensors file. Its tensors are τ = θ − θ_pre, by the names of the base model, without running
statistics of batch normalization. Its header's ``__metadata__`` has two entries, both text: ``vector``, a JSON object
with the fields of ``Card``, and ``signature``, the site's Ed25519 signature (RFC 8032) in hexadecimal over ``FORMAT``,
a line feed and the text of ``vector``. The card holds the SHA-256 of the tensors, so the signature covers everything.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from polyclinic.core import atomic, tree
from polyclinic.core.tree import Tree
from polyclinic.errors import IntegrityError
from polyclinic.studies.run.run_directory import read_tensors

FORMAT = "polyclinic data vector 1"


class VectorRefused(IntegrityError):
    """Files that do not belong together or have no valid signature. Lists every problem; nothing was written."""


@dataclass(frozen=True)
class Card:
    """Description of a vector.

    Attributes:
        format: ``FORMAT``. ``site``: whose it is. ``key``: the site's public key, in hexadecimal.
        base: SHA-256 of the base model's parameters. ``architecture``: of what its plan says of network and task.
        classes: The names of the classes, in the order of the model's outputs.
        examples: How many the site trained on. ``norm``: the Euclidean length of the vector.
        tensors: SHA-256 of the vector's tensors.
    """

    format: str
    site: str
    key: str
    base: str
    architecture: str
    classes: tuple[str, ...]
    examples: int
    norm: float
    tensors: str


def digest(params: Tree) -> str:
    """SHA-256 of names, types, shapes and numbers, in name order; whatever file they lie in."""
    found = hashlib.sha256()
    for name in sorted(params):
        leaf = params[name].detach().cpu().contiguous()
        found.update(f"{name}\n{leaf.dtype}\n{list(leaf.shape)}\n".encode())
        found.update(leaf.numpy().tobytes())
    return found.hexdigest()


def write_vector(
    out: Path, base: str, architecture: str, site: str, classes: Sequence[str], examples: int, vector: Tree, key: Any
) -> Card:
    """Signs ``vector`` and writes it. ``base`` and ``architecture`` are as in ``Card``."""
    public = key.public_key().public_bytes_raw().hex()
    card = Card(
        FORMAT,
        site,
        public,
        base,
        architecture,
        tuple(classes),
        examples,
        tree.norm(vector),
        digest(vector),
    )
    text = canonical(asdict(card))
    write_exactly(out, vector, {"vector": text, "signature": key.sign(_signed(text)).hex()})
    return card


def write_exactly(path: Path, tensors: Tree, meta: Mapping[str, str]) -> None:
    """A safetensors file whose bytes depend on what is in it alone: the header is sorted."""
    from safetensors.torch import save

    data = save({name: leaf.contiguous() for name, leaf in tensors.items()}, dict(meta))
    end = 8 + int.from_bytes(data[:8], "little")
    head = canonical(json.loads(data[8:end])).encode()
    head += b" " * (-len(head) % 8)
    atomic.write(path, len(head).to_bytes(8, "little") + head + data[end:])


def read_vector(file: Path) -> tuple[Card, Tree]:
    """A vector whose tensors are those it was signed with, by the key that it names. Whose key that is, is not known.

    Raises:
        VectorRefused: If the file is not a valid vector. The message names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            meta = opened.metadata() or {}
        vector = read_tensors(file)
    except SafetensorError as error:
        raise VectorRefused(f"{file}: not a safetensors file: {error}") from None
    try:
        card = _card(json.loads(meta["vector"]))
        _verify(card.key, bytes.fromhex(meta["signature"]), _signed(meta["vector"]))
    except KeyError as error:
        raise VectorRefused(f"{file}: not a data vector: its header has no {error}") from None
    except (ValueError, TypeError) as error:
        raise VectorRefused(f"{file}: {error}") from None
    if digest(vector) != card.tensors:
        raise VectorRefused(f"{file}: its tensors are not those that {card.site} signed")
    return card, vector


def load_key(file: Path) -> Any:
    """Return the Ed25519 private key in ``file``, as 64 hexadecimal digits. Create it, with mode 0600, if needed."""
    ed25519 = _ed25519()
    if not file.exists():
        made = ed25519.Ed25519PrivateKey.generate()
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(made.private_bytes_raw().hex() + "\n")
    text = file.read_text(encoding="utf-8").strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise VectorRefused(f"{file}: not a key of 64 hexadecimal digits")
    return ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def load_keys(file: Path) -> dict[str, str]:
    """Public keys by site: a TOML file with a line such as ``ada = "3b6a…"`` for each."""
    import tomllib

    if not file.is_file():
        raise VectorRefused(f"{file}: no such file. It has a line for each site, as printed by `vectors make`")
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise VectorRefused(f"{file}: not TOML: {error}") from None
    if wrong := [site for site, key in keys.items() if not re.fullmatch("[0-9a-f]{64}", str(key))]:
        raise VectorRefused(f"{file}: {', '.join(wrong)}: a public key is 64 hexadecimal digits in quotes")
    return keys


def canonical(value: Any) -> str:
    """``value`` as JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _card(given: Any) -> Card:
    wanted = [f.name for f in fields(Card)]
    if not isinstance(given, dict) or sorted(given) != sorted(wanted):
        raise ValueError(f"a data vector's header has the fields {', '.join(wanted)}")
    texts = ("format", "site", "key", "base", "architecture", "tensors")
    if not all(isinstance(given[name], str) for name in texts) or given["format"] != FORMAT:
        raise ValueError(f"this is not in the format {FORMAT!r}")
    if not re.fullmatch("[a-z0-9][a-z0-9-]{0,62}", given["site"]):
        raise ValueError("a site's name is of a to z, 0 to 9 and hyphens")
    if not isinstance(given["classes"], list) or not all(isinstance(name, str) for name in given["classes"]):
        raise ValueError("classes must be a list of names")
    if type(given["examples"]) is not int or given["examples"] < 1 or not math.isfinite(given["norm"]):
        raise ValueError("examples must be a count, and norm a finite number")
    return Card(**{**given, "classes": tuple(given["classes"])})


def _verify(key: str, signature: bytes, signed: bytes) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, signed)
    except InvalidSignature:
        raise ValueError("its signature is forged, or the file was changed after it was signed") from None


def _ed25519() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return ed25519


def _signed(text: str) -> bytes:
    return f"{FORMAT}\n{text}".encode()
