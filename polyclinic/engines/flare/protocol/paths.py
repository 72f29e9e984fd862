"""Where a server and a site keep what must survive: one folder each, its files private to one user.

```
server/                                     site/
  server.toml   name, host, port              site.toml       name, organization, data, server
  ca/           the project's authority       policy.toml     what this hospital allows
  admitted.json who may join                  keys/           made here, never leave
  flare/        what FLARE needs              flare/          what FLARE needs
  queue/        studies that wait             reviews/        what waits for a person, what was approved
  studies/      study files, and their runs   ledgers/        what was spent of the privacy budget
  runs/<run>/   plan, checkpoint, journal     memory/<run>/   what methods keep here between rounds
  server.log                                  certificates/   every one that this site had
                                              journal.jsonl   what was asked, done, refused, sent
                                              opened-sums.jsonl  which secure sums were opened
```
"""

import hashlib
import json
import os
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


class SetupError(ConfigError):
    """A folder that is not what it should be, or a name that cannot be used. The message says what to do."""


def name(text: object, what: str = "a site's name") -> str:
    """``text``, if it can name a site, a project or a run.

    Raises:
        SetupError: Where it cannot.
    """
    if isinstance(text, str) and NAME.fullmatch(text):
        return text
    raise SetupError(
        f"{what} is made of small letters, digits and hyphens, begins with a letter or digit and has at most "
        f"63 characters: not {str(text)[:80]!r}"
    )


def host(text: object) -> str:
    """``text``, if it can be a host's name.

    Raises:
        SetupError: Where it cannot.
    """
    if isinstance(text, str) and len(text) <= 253 and HOST.fullmatch(text):
        return text
    raise SetupError(f"a host is named like fed.hospital.org or 10.1.2.3, not {str(text)[:80]!r}")


@dataclass(frozen=True)
class ServerFolder:
    """The folder of a server."""

    path: Path

    @property
    def settings(self) -> Path:
        """server.toml"""
        return self.path / "server.toml"

    @property
    def authority(self) -> Path:
        """The folder of the project's certificate authority."""
        return self.path / "ca"

    @property
    def admitted(self) -> Path:
        """admitted.json"""
        return self.path / "admitted.json"

    @property
    def kit(self) -> Path:
        """FLARE's folder for the server."""
        return self.path / "flare" / "server"

    @property
    def admin(self) -> Path:
        """FLARE's folder for the coordinator, who submits jobs."""
        return self.path / "flare" / "coordinator"

    @property
    def store(self) -> Path:
        """Where FLARE keeps jobs."""
        return self.path / "flare" / "store"

    @property
    def queue(self) -> Path:
        """Studies that wait for their turn."""
        return self.path / "queue"

    def run(self, run: str) -> Path:
        """The folder of one run."""
        return self.path / "runs" / name(run, "a run's name")


@dataclass(frozen=True)
class SiteFolder:
    """The folder of a site."""

    path: Path

    @property
    def settings(self) -> Path:
        """site.toml"""
        return self.path / "site.toml"

    @property
    def policy(self) -> Path:
        """policy.toml"""
        return self.path / "policy.toml"

    @property
    def keys(self) -> Path:
        """The folder of the site's private keys."""
        return self.path / "keys"

    @property
    def certificates(self) -> Path:
        """The folder of every certificate that the site had."""
        return self.path / "certificates"

    @property
    def kit(self) -> Path:
        """FLARE's folder."""
        return self.path / "flare"

    @property
    def reviews(self) -> Path:
        """What waits for a person, and what was decided."""
        return self.path / "reviews"

    @property
    def journal(self) -> Path:
        """journal.jsonl"""
        return self.path / "journal.jsonl"

    @property
    def ledgers(self) -> Path:
        """What was spent of the privacy budget, one file per data set; ``ledger-heads.json`` holds their heads."""
        return self.path / "ledgers"

    @property
    def opened(self) -> Path:
        """Which secure sums were opened, over all runs."""
        return self.path / "opened-sums.jsonl"

    def memory(self, run: str) -> Path:
        """What methods keep at this site for one run."""
        return self.path / "memory" / name(run, "a run's name")


def private_folder(path: Path) -> Path:
    """``path``, made if it is not there, for this user alone."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str | bytes, durable: bool = True) -> None:
    """Writes a file that only this user reads. If it is ``durable``, a crash leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
        if durable:
            sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def hash_of(path: Path) -> tuple[int, str]:
    """The length and SHA-256 of the file at ``path``."""
    hasher, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def sync(folder: Path) -> None:
    """Forces the names in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_small(path: Path, limit: int = MAX_TEXT) -> str:
    """The text in ``path``.

    Raises:
        SetupError: Where it is larger than ``limit`` bytes, or not text.
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
    """The table in the settings at ``path``; ``init`` is the command that makes them.

    Raises:
        SetupError: Where there are none, or they are not TOML.
    """
    if not path.is_file():
        raise SetupError(f"{path} does not exist: is {path.parent} the right folder? `{init}` makes one")
    try:
        return tomllib.loads(read_small(path))
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{path}: {error}") from None


def read_json(path: Path, default: Any = None) -> Any:
    """The value in the JSON file at ``path``, or ``default`` where there is no file.

    Raises:
        SetupError: Where it is not JSON.
    """
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(read_small(path, 16 * MAX_TEXT))
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from None


def toml(values: Mapping[str, str | int | bool]) -> str:
    """A flat table as TOML."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
