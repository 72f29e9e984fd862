"""The store of start weights: one folder per file, named by the SHA-256 of its safetensors.

```
<root>/<sha256>/weights.safetensors    float32 tensors, and nothing else
<root>/<sha256>/card.toml              name, source, license, what they were trained on
```
The root is the folder in the environment variable ``POLYCLINIC_WEIGHTS``, else ``weights`` in the user's data folder. A
site has a store of its own. Files are verified against their hash when a process first reads them.
"""

import hashlib
import mmap
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.core import atomic, toml_text
from polyclinic.core.serialization import Corrupt, decode_tensors
from polyclinic.errors import ConfigError, IntegrityError

VARIABLE = "POLYCLINIC_WEIGHTS"
FILE, CARD = "weights.safetensors", "card.toml"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
HASH = re.compile(r"[0-9a-f]{64}")
LONGEST = 2000
"""The largest number of characters in a field of a card."""


class UnknownWeights(ConfigError):
    """Weights that are not in the store. The message says how to add them."""


@dataclass(frozen=True)
class Card:
    """Where weights come from and under which terms, as stated by the person who added them.

    Attributes:
        name: The name in the store.
        license: SPDX identifier, or a short text.
        source: Their origin: an address or a package and version.
        trained_on: The data they were trained on.
        intended_use: The use that their authors intend.
        citation: The publication to cite.
        redistribute: Whether the license allows to pass on the weights, also as part of a trained model.
        original_sha256: Hash of the file that was added.
        original_format: Its format.
        notes: What was changed in the conversion.
        added_at: The time, in UTC.
    """

    name: str
    license: str
    source: str = ""
    trained_on: str = ""
    intended_use: str = ""
    citation: str = ""
    redistribute: bool = True
    original_sha256: str = ""
    original_format: str = ""
    notes: tuple[str, ...] = ()
    added_at: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"the name {self.name[:80]!r} of weights must be at most 63 lowercase letters, digits, dots, hyphens "
                "and underscores, and begin with a letter or digit"
            )
        if HASH.fullmatch(self.name):
            raise ConfigError("the name of weights must not look like a hash: choose a word")
        if not self.license.strip():
            raise ConfigError("weights need a license, such as MIT, Apache-2.0, CC-BY-NC-4.0 or a short text")
        for key, value in asdict(self).items():
            if isinstance(value, str) and (len(value) > LONGEST or not value.replace("\n", " ").isprintable()):
                raise ConfigError(f"{key} of the card must be printable text of at most {LONGEST} characters")


@dataclass(frozen=True)
class Stored:
    """Weights in the store.

    Attributes:
        sha256: Hash of their file.
        path: The file.
        card: Their card.
    """

    sha256: str
    path: Path
    card: Card

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def root() -> Path:
    """Return the folder of the store, which may not exist yet."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    import platformdirs

    return Path(platformdirs.user_data_dir("polyclinic")) / "weights"


def stored() -> list[Stored]:
    """Return all weights in the store by name.

    Raises:
        IntegrityError: If a card cannot be read. The message names it.
    """
    folders = [path for path in root().glob("*") if HASH.fullmatch(path.name) and (path / CARD).is_file()]
    return sorted((_read(path) for path in folders), key=lambda item: item.card.name)


def find(what: str) -> Stored:
    """Return the weights with this name or hash, or those that the file at this path was added as.

    Raises:
        UnknownWeights: If there are none. The message says how to add them.
    """
    if HASH.fullmatch(what):
        if (root() / what / CARD).is_file():
            return _read(root() / what)
        raise UnknownWeights(
            f"the start weights {what[:12]}... are not in the store {root()}: add the file that they were made from "
            "with `polyclinic weights add`, at a site with `polyclinic site weights add`"
        )
    known = stored()
    for item in known:
        if item.card.name == what:
            return item
    path = Path(what)
    if path.is_file():
        original = hash_of(path)
        for item in known:
            if original in (item.card.original_sha256, item.sha256):
                return item
    if path.exists():
        raise UnknownWeights(f"{what} is not in the store yet: polyclinic weights add {what} --license LICENSE")
    names = ", ".join(item.card.name for item in known) or "none"
    raise UnknownWeights(f"no start weights are called {what[:80]!r}. In the store: {names} ({root()})")


def add(file: Path, card: Card) -> Stored:
    """Move the safetensors ``file``, which must be valid, into the store.

    Raises:
        ConfigError: If the name belongs to other weights.
        Corrupt: If it is not a valid file.
    """
    sha256 = hash_of(file)
    for other in stored():
        if other.card.name == card.name and other.sha256 != sha256:
            raise ConfigError(
                f"the name {card.name!r} belongs to other weights ({other.sha256[:12]}...): choose another"
            )
    read_file(file)
    place = root() / sha256
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".adding-") as folder:
            shutil.move(file, Path(folder) / FILE)
            _write_card(Path(folder) / CARD, card)
            complete = Path(folder) / "complete"
            complete.mkdir()
            for name in (FILE, CARD):
                os.replace(Path(folder) / name, complete / name)
            with open(complete / FILE, "rb") as written:
                os.fsync(written.fileno())
            os.replace(complete, place)
        atomic.sync_folder(place.parent)
    else:
        _write_card(place / CARD, card)
    return _read(place)


def remove(item: Stored) -> None:
    """Delete weights from the store."""
    shutil.rmtree(item.path.parent)


def tensors(sha256: str) -> Mapping[str, Tensor]:
    """Return the tensors of weights in the store, as views of the mapped file, after verification of their hash.

    Raises:
        UnknownWeights: If they are not in the store.
        IntegrityError: If the file was changed.
    """
    path = find(sha256).path
    return _verified(path, sha256, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=4)
def _verified(path: Path, sha256: str, changed: int, size: int) -> Mapping[str, Tensor]:
    if hash_of(path) != sha256:
        raise IntegrityError(f"{path} was changed: its hash is not that of its folder. Remove it and add it again")
    return read_file(path)


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, as copy-on-write views of the mapped file.

    Raises:
        Corrupt: If it is not a valid file. The message names it.
    """
    with open(path, "rb") as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise Corrupt(f"{path} is empty") from None
    try:
        return decode_tensors(buffer)
    except Corrupt as error:
        raise Corrupt(f"{path}: {error}") from None


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> Stored:
    try:
        table = tomllib.loads((folder / CARD).read_text(encoding="utf-8"))
        known = {f.name for f in fields(Card)}
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in known
        }
        return Stored(folder.name, folder / FILE, Card(**values))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError, AttributeError, ConfigError) as error:
        raise IntegrityError(f"{folder / CARD}: {error}") from None


def _write_card(path: Path, card: Card) -> None:
    atomic.write(
        path, toml_text.dumps({key: list(v) if isinstance(v, tuple) else v for key, v in asdict(card).items()})
    )
