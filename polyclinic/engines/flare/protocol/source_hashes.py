"""Hashes of source files over their syntax (``core.syntax_hash``), remembered on disk by the content of the files.

Parsing Polyclinic's sources takes about two seconds, which every command and every process between hospitals would
spend. The table of hashes is in the user's cache folder. It is keyed by the SHA-256 of each file, so that it cannot be
out of date, whatever the times and sizes of files say. It is ignored, and not written, if another user can write it:
a user who can change it could pass changed code off as approved code, as could a user who can change the code itself.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from polyclinic.core import atomic, syntax_hash
from polyclinic.core.syntax_hash import hash_of_source

MOST = 20_000
"""Number of hashes above which the table begins anew, because most are of former versions."""


def hashes_of(sources: Sequence[bytes]) -> list[str]:
    """Return the syntax hash of each of ``sources``."""
    table, keys = _read(), [hashlib.sha256(source).hexdigest() for source in sources]
    new = {key: hash_of_source(source) for key, source in zip(keys, sources, strict=True) if key not in table}
    if new:
        _write({**(table if len(table) + len(new) <= MOST else {}), **new})
    return [new[key] if key in new else table[key] for key in keys]


def _path() -> Path:
    """Return the file of the table, whose name has the version of Python and of the hash."""
    if chosen := os.environ.get("POLYCLINIC_CACHE"):
        folder = Path(chosen)
    else:
        from platformdirs import user_cache_path

        folder = user_cache_path("polyclinic")
    algorithm = hashlib.sha256(Path(syntax_hash.__file__).read_bytes()).hexdigest()[:16]
    return folder / "syntax-hashes" / f"python{sys.version_info[0]}.{sys.version_info[1]}-{algorithm}.json"


def _read() -> dict[str, str]:
    """Return the table; empty if there is none, or it is damaged, or another user could have written it."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        path = _path()
        if _own(path) and _own(path.parent):
            stored = json.loads(path.read_text())
            if stored["checksum"] == _checksum(stored["hashes"]):
                return dict(stored["hashes"])
    return {}


def _write(table: dict[str, str]) -> None:
    with suppress(OSError):  # without the table the files are parsed again
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _own(path.parent):
            atomic.write_private(path, json.dumps({"checksum": _checksum(table), "hashes": table}), durable=False)


def _own(path: Path) -> bool:
    """Return whether ``path`` belongs to this user, is no link, and cannot be written by others."""
    status = path.lstat()
    mine = status.st_uid == os.getuid() if hasattr(os, "getuid") else True
    return mine and not stat.S_ISLNK(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _checksum(table: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
