"""Addition of weights of any supported format to the store, by a conversion in a process of its own."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.errors import ConfigError
from polyclinic.learning.weights import store
from polyclinic.learning.weights.store import Card, Stored

MINUTES = 30


class NotImported(ConfigError):
    """A file or folder that was not added. The message names it and gives the reason."""


@dataclass(frozen=True)
class Imported:
    """Weights that were added.

    Attributes:
        stored: The weights in the store.
        tensors: Their number of tensors.
        numbers: Their number of numbers.
    """

    stored: Stored
    tensors: int
    numbers: int


def add(source: Path, card: Card, key: str = "", sha256: str = "") -> Imported:
    """Convert ``source`` and add it to the store.

    Args:
        source: A file or folder: safetensors, ``torch.save``, TorchScript, a MONAI bundle, a Hugging Face snapshot, a
            checkpoint of timm or nnU-Net, or a model of Polyclinic.
        card: What a person states. Empty fields are filled with what the source states itself.
        key: The entry of a file of ``torch.save`` that holds the tensors.
        sha256: The hash that the converted file must have; empty for any.

    Raises:
        NotImported: If the source is refused, or has another hash. Nothing is added.
        ConfigError: If the card is not valid.
    """
    if not source.exists():
        raise NotImported(f"{source} does not exist")
    store.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.root(), prefix=".adding-") as folder:
        target = Path(folder) / store.FILE
        found = _converted(source, target, key)
        if sha256 and (other := store.hash_of(target)) != sha256:
            raise NotImported(f"{source}: its tensors have the hash {other[:12]}..., and {sha256[:12]}... was expected")
        stated = {name: value for name, value in found["card"].items() if not getattr(card, name)}
        complete = replace(
            card,
            **stated,
            original_sha256=found["sha256"],
            original_format=found["format"],
            notes=tuple(found["notes"]),
            added_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        try:
            return Imported(store.add(target, complete), found["tensors"], found["numbers"])
        except ValueError as error:
            raise NotImported(f"{source}: {error}") from None


def stated_license(source: Path) -> str:
    """Return the license that a folder states itself; empty if it states none."""
    with tempfile.TemporaryDirectory() as folder:
        found: str = _converted(source, Path(folder) / store.FILE, "")["card"].get("license", "")
    return found


def _converted(source: Path, target: Path, key: str) -> dict[str, Any]:
    """Run the conversion in a process of its own, and return what it found."""
    module = "polyclinic.learning.weights.conversion"
    command = [sys.executable, "-m", module, str(source.resolve()), str(target), key]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60 * MINUTES, check=False)
    except subprocess.TimeoutExpired:
        raise NotImported(f"{source}: reading it took longer than {MINUTES} minutes") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        why = f"ended by signal {-done.returncode}" if done.returncode < 0 else last[0][:200]
        raise NotImported(
            f"{source}: reading it needs more memory, time or disk than its size allows, or it is damaged ({why})"
        ) from None
    if "refused" in found:
        raise NotImported(f"{source}: {found['refused']}")
    return found
