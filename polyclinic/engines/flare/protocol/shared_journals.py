"""Journals written by several processes, and signatures of their latest hashes by both ends, which reveal a rewrite."""

import base64
import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.core.audit_log import Journal

log = logging.getLogger(__name__)


class SharedJournal:
    """Journal that is locked while it is written. Each entry contains the time."""

    def __init__(self, path: Path) -> None:
        """Use the journal at ``path``, opened at the first write."""
        self.path = path
        self._open: Journal | None = None
        self._size = -1

    def write(self, event: str, details: Mapping[str, Any] | None = None) -> str:
        """Append an entry and return the new latest hash."""
        with self._locked() as journal:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            head = journal.write(event, {"time": now, **(details or {})})
        log.info("%s", event, extra={"facts": dict(details or {})})
        return head

    @property
    def head(self) -> str:
        """The hash of the last entry."""
        with self._locked() as journal:
            return journal.head

    def close(self) -> None:
        """Close the file."""
        if self._open:
            self._open.close()
            self._open = None

    @contextmanager
    def _locked(self) -> Iterator[Journal]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        with open(lock, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if self._open is None or not self.path.exists() or self.path.stat().st_size != self._size:
                self.close()  # another process has written, or the file is new
                self._open = Journal(self.path)
            yield self._open
            self._size = self.path.stat().st_size


def sign(key: Any, data: bytes) -> str:
    """Return a signature of ``data`` by an RSA ``key``, in base 64."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return base64.b64encode(key.sign(data, padding.PKCS1v15(), hashes.SHA256())).decode()


def signed_by(certificate: Any, signature: str, data: bytes) -> bool:
    """Return whether the owner of ``certificate`` signed ``data``."""
    return signed_by_key(certificate.public_key(), signature, data)


def signed_by_key(public: Any, signature: str, data: bytes) -> bool:
    """Return whether ``signature`` over ``data`` verifies with the RSA key ``public``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    try:
        raw = base64.b64decode(signature, validate=True)
        public.verify(raw, data, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError):
        return False
    return True
