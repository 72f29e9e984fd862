"""Files between FLARE's job processes: offered at one end, fetched in blocks by the other, hashed on the way.

FLARE's own download service moves the blocks. A file is named by an unguessable reference that only its receiver is
told. Small files travel inside the message. Nothing is held in memory but a block. Over a slow line nothing else gets
past a block; so whoever wants to know that the other end lives is told of each. Smaller blocks would get out of the way
sooner, but FLARE keeps a thread for a minute for every one of them.
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
    """What to put beside a message so that its ``receivers`` can have the file at ``path``.

    ``moved`` is told which process asked, at every block.
    """
    if path.stat().st_size <= INLINE:
        return {"body": path.read_bytes()}
    downloader = ObjectDownloader(cell, timeout=KEEP, num_receivers=receivers)
    return {"ref": downloader.add_object(_Watched(path, moved)), "at": cell.get_fqcn()}


class _Watched(FileDownloadable):  # type: ignore[misc]
    """A file that is offered, and somebody who hears of each block."""

    def __init__(self, path: Path, moved: Callable[[str], None] | None) -> None:
        super().__init__(str(path), chunk_size=BLOCK)
        self._moved = moved

    def produce(self, state: dict[str, Any], requester: str) -> tuple[str, Any, dict[str, Any]]:
        """The next block."""
        if self._moved:
            self._moved(requester)
        made: tuple[str, Any, dict[str, Any]] = super().produce(state, requester)
        return made


def fetch(
    cell: Any,
    beside: Any,
    sender: str,
    path: Path,
    limit: int,
    stopped: Any = None,
    moved: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Writes the file that stands ``beside`` a message from the process ``sender`` to ``path``; its length and SHA-256.

    ``moved`` is told the sender at every block.

    Raises:
        OSError: Where it cannot be had, or is longer than ``limit`` bytes.
        BadMessage: Where what stands there is not a file, or lies elsewhere than at the sender.
    """
    body, ref, at = beside.get("body"), beside.get("ref"), beside.get("at")
    if isinstance(body, bytes):
        if len(body) > min(limit, INLINE):
            raise OSError(f"{len(body)} bytes came inside the message, and {min(limit, INLINE)} may")
        path.write_bytes(body)
        return len(body), hashlib.sha256(body).hexdigest()
    if not (isinstance(ref, str) and isinstance(at, str)) or at != sender:
        raise BadMessage(f"no file of {sender} stands beside its message")
    consumer = _ToFile(path, limit, lambda: moved(sender) if moved else None)
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
        path.unlink(missing_ok=True)
        raise
    if consumer.problem:
        path.unlink(missing_ok=True)
        raise OSError(consumer.problem)
    return consumer.size, consumer.hasher.hexdigest()


class _ToFile(Consumer):  # type: ignore[misc]
    """Takes blocks as they come."""

    def __init__(self, path: Path, limit: int, moved: Callable[[], None]) -> None:
        super().__init__()
        self.path, self.limit, self.moved = path, limit, moved
        self.size, self.hasher, self.problem = 0, hashlib.sha256(), "it did not come"

    def __enter__(self) -> "_ToFile":
        self.file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """A block."""
        self.moved()
        if not isinstance(data, bytes) or self.size + len(data) > self.limit:
            raise OSError(f"more than the {self.limit} bytes that were announced came")
        self.file.write(data)
        self.hasher.update(data)
        self.size += len(data)
        return {"received_bytes": self.size}

    def download_failed(self, ref_id: str, reason: str) -> None:
        """FLARE gave up."""
        self.problem = f"it did not come: {reason}"

    def download_completed(self, ref_id: str) -> None:
        """All of it is there."""
        self.problem = ""
