"""File transfer between FLARE job processes: offered by one, fetched in blocks by the other, hashed in transit.

FLARE's download service transfers the blocks. A file is named by an unguessable reference that only its receiver gets.
Small files travel inside the message. At most one block is in memory. On a slow connection a block delays all other
messages, heartbeats included; both ends therefore report each block through the callback ``moved``. Smaller blocks
would cause shorter delays, but FLARE keeps a thread for a minute for each of them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.download_service import Consumer, download_object
from nvflare.fuel.f3.streaming.file_downloader import FileDownloadable
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from polyclinic.engines.flare.protocol.messages import BadMessage

INLINE = 2**18
BLOCK = 2**22
PATIENCE = 60.0
KEEP = 3600.0


def offer(cell: Any, path: Path, receivers: int, moved: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return the fields that accompany a message so that its ``receivers`` can fetch the file at ``path``.

    ``moved`` is called at every block with the name of the requesting process.
    """
    if path.stat().st_size <= INLINE:
        return {"body": path.read_bytes()}
    downloader = ObjectDownloader(cell, timeout=KEEP, num_receivers=receivers)
    return {"ref": downloader.add_object(_Watched(path, moved)), "at": cell.get_fqcn()}


class _Watched(FileDownloadable):  # type: ignore[misc]
    """Offered file that reports each requested block."""

    def __init__(self, path: Path, moved: Callable[[str], None] | None) -> None:
        super().__init__(str(path), chunk_size=BLOCK)
        self._moved = moved

    def produce(self, state: dict[str, Any], requester: str) -> tuple[str, Any, dict[str, Any]]:
        """Return the next block."""
        if self._moved:
            self._moved(requester)
        block: tuple[str, Any, dict[str, Any]] = super().produce(state, requester)
        return block


def fetch(
    cell: Any,
    attachment: Any,
    sender: str,
    path: Path,
    limit: int,
    stopped: Any = None,
    moved: Callable[[str], None] | None = None,
    resume: bool = False,
) -> tuple[int, str]:
    """Write the file that accompanies a message from the process ``sender`` to ``path``; return its length and SHA-256.

    ``moved`` is called at every block with ``sender``. With ``resume`` a part that came before is continued after its
    last byte, if the first block is the same, and is kept on failure.

    Raises:
        OSError: If the file cannot be fetched or is longer than ``limit`` bytes.
        BadMessage: If ``attachment`` names no file, or a file at another process than the sender.
    """
    body, ref, at = attachment.get("body"), attachment.get("ref"), attachment.get("at")
    if isinstance(body, bytes):
        if len(body) > min(limit, INLINE):
            raise OSError(f"{len(body)} bytes came inside the message; at most {min(limit, INLINE)} may")
        path.write_bytes(body)
        return len(body), hashlib.sha256(body).hexdigest()
    if not (isinstance(ref, str) and isinstance(at, str)) or at != sender:
        raise BadMessage(f"no file of {sender} accompanies its message")
    consumer = _ToFile(path, limit, lambda: moved(sender) if moved else None, resume)
    try:
        with consumer:
            download_object(
                from_fqcn=at,
                ref_id=ref,
                per_request_timeout=PATIENCE,
                cell=cell,
                consumer=consumer,
                abort_signal=stopped,
            )
    except BaseException:
        if not resume:
            path.unlink(missing_ok=True)
        raise
    if consumer.problem:
        if not resume:
            path.unlink(missing_ok=True)
        raise OSError(consumer.problem)
    return consumer.size, consumer.hasher.hexdigest()


class _ToFile(Consumer):  # type: ignore[misc]
    """Consumer that writes blocks to a file as they arrive."""

    def __init__(self, path: Path, limit: int, moved: Callable[[], None], resume: bool) -> None:
        super().__init__()
        self.path, self.limit, self.moved = path, limit, moved
        self.size, self.hasher, self.problem = 0, hashlib.sha256(), "it did not arrive"
        self._earlier = path.stat().st_size if resume and path.exists() else 0

    def __enter__(self) -> "_ToFile":
        self.file = open(self.path, "r+b" if self._earlier else "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """Write a block, and return where the next one begins."""
        self.moved()
        if self._earlier:
            earlier, self._earlier = self._earlier, 0
            if isinstance(data, bytes) and len(data) <= earlier <= self.limit and self.file.read(len(data)) == data:
                self._continue()
                return {"received_bytes": self.size}
            self.file.seek(0)
            self.file.truncate()
        if not isinstance(data, bytes) or self.size + len(data) > self.limit:
            raise OSError(f"more than the {self.limit} bytes that were announced came")
        self.file.write(data)
        self.hasher.update(data)
        self.size += len(data)
        return {"received_bytes": self.size}

    def _continue(self) -> None:
        """Keep the part that came before, and continue after it."""
        self.file.seek(0)
        while block := self.file.read(BLOCK):
            self.hasher.update(block)
            self.size += len(block)

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Record that FLARE gave up."""
        self.problem = f"it did not arrive: {reason}"

    def download_completed(self, ref_id: str) -> None:
        """Record that the file is complete."""
        self.problem = ""
