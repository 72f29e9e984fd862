"""Persistent folders of a server and of a site, readable by one user only.

```
server/                                     site/
  server.toml   name, host, port              site.toml       name, organization, data, server
  ca/           certificate authority         policy.toml     what this hospital allows
  admitted.json admitted sites                keys/           private keys, made here, never sent
  flare/        startup kits of FLARE         flare/          startup kit of FLARE
  queue/        queued runs                   reviews/        pending approvals and decisions
  studies/      study files and their runs    ledgers/        privacy budget spent
  runs/<run>/   plan, checkpoint, journal     memory/<run>/   site state of methods between rounds
  server.log                                  certificates/   every certificate of this site
                                              journal.jsonl   requests, results, refusals, replies
                                              opened-sums.jsonl  secure sums that were opened
                                              weights/        start weights that the site added
```
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
MAX_TEXT = 2**20
WEIGHTS = "POLYCLINIC_WEIGHTS"
"""The environment variable with the folder of start weights, as ``learning.weights.store`` reads it."""


class SetupError(ConfigError):
    """Invalid server or site folder, setting or name. The message says what to do."""


def name(text: object, what: str = "a site's name") -> str:
    """Return ``text`` if it can name a site, a project or a run.

    Raises:
        SetupError: If it cannot.
    """
    if isinstance(text, str) and NAME.fullmatch(text):
        return text
    raise SetupError(
        f"{what} consists of lowercase letters, digits and hyphens, begins with a letter or digit and has at most "
        f"63 characters: not {str(text)[:80]!r}"
    )


def host(text: object) -> str:
    """Return ``text`` if it can be a host name.

    Raises:
        SetupError: If it cannot.
    """
    if isinstance(text, str) and len(text) <= 253 and HOST.fullmatch(text):
        return text
    raise SetupError(f"a host name looks like fed.hospital.org or 10.1.2.3, not {str(text)[:80]!r}")


@dataclass(frozen=True)
class ServerFolder:
    """Home folder of a server."""

    path: Path

    @property
    def settings(self) -> Path:
        """``server.toml``."""
        return self.path / "server.toml"

    @property
    def authority(self) -> Path:
        """Folder of the project's certificate authority."""
        return self.path / "ca"

    @property
    def admitted(self) -> Path:
        """``admitted.json``."""
        return self.path / "admitted.json"

    @property
    def kit(self) -> Path:
        """FLARE startup kit of the server."""
        return self.path / "flare" / "server"

    @property
    def admin(self) -> Path:
        """FLARE startup kit of the coordinator, who submits jobs."""
        return self.path / "flare" / "coordinator"

    @property
    def store(self) -> Path:
        """Folder in which FLARE stores jobs."""
        return self.path / "flare" / "store"

    @property
    def queue(self) -> Path:
        """Folder of queued runs."""
        return self.path / "queue"

    def run(self, run: str) -> Path:
        """Return the folder of one run."""
        return self.path / "runs" / name(run, "a run's name")


@dataclass(frozen=True)
class SiteFolder:
    """Home folder of a site."""

    path: Path

    @property
    def settings(self) -> Path:
        """``site.toml``."""
        return self.path / "site.toml"

    @property
    def policy(self) -> Path:
        """``policy.toml``."""
        return self.path / "policy.toml"

    @property
    def keys(self) -> Path:
        """Folder of the site's private keys."""
        return self.path / "keys"

    @property
    def certificates(self) -> Path:
        """Folder of every certificate that the site has had."""
        return self.path / "certificates"

    @property
    def kit(self) -> Path:
        """FLARE startup kit of the site."""
        return self.path / "flare"

    @property
    def reviews(self) -> Path:
        """Folder of pending approvals and of decisions."""
        return self.path / "reviews"

    @property
    def journal(self) -> Path:
        """``journal.jsonl``."""
        return self.path / "journal.jsonl"

    @property
    def ledgers(self) -> Path:
        """Folder of privacy ledgers, one file per data set; ``ledger-heads.json`` holds their latest hashes."""
        return self.path / "ledgers"

    @property
    def weights(self) -> Path:
        """Folder of the start weights that this site has added."""
        return self.path / "weights"

    @property
    def opened(self) -> Path:
        """List of the secure sums that were opened, over all runs."""
        return self.path / "opened-sums.jsonl"

    def memory(self, run: str) -> Path:
        """Return the folder of the site state of one run."""
        return self.path / "memory" / name(run, "a run's name")


def private_folder(path: Path) -> Path:
    """Create ``path`` if needed, accessible to this user only, and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def hash_of(path: Path) -> tuple[int, str]:
    """Return the length and SHA-256 of the file at ``path``."""
    hasher, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def read_small(path: Path, limit: int = MAX_TEXT) -> str:
    """Return the text in ``path``.

    Raises:
        SetupError: If the file is larger than ``limit`` bytes or not text.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SetupError(f"{path} is larger than {limit} bytes: is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SetupError(f"{path} is not a text file") from None


def read_toml(path: Path, init: str) -> dict[str, Any]:
    """Return the table in the settings at ``path``; ``init`` is the command that creates them.

    Raises:
        SetupError: If the file does not exist or is not TOML.
    """
    if not path.is_file():
        raise SetupError(f"{path} does not exist: is {path.parent} the right folder? `{init}` creates one")
    try:
        return tomllib.loads(read_small(path))
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{path}: {error}") from None


def read_json(path: Path, default: Any = None) -> Any:
    """Return the value in the JSON file at ``path``, or ``default`` if the file does not exist.

    Raises:
        SetupError: If the file is not JSON.
    """
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(read_small(path, 16 * MAX_TEXT))
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from None


def toml(values: Mapping[str, str | int | bool]) -> str:
    """Return a flat table as TOML."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
