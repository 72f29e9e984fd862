"""Values in memory shared by two processes: one encodes them once, the other views them without a copy."""

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from polyclinic.core import serialization

ENOUGH = 2**30


def new_folder() -> Path:
    """Create a private folder, in memory if there is enough space, after removing those of processes that ended."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > ENOUGH
    parent = shm if roomy else Path(tempfile.gettempdir())
    for old in parent.glob("polyclinic-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"polyclinic-{os.getpid()}-", dir=parent))


def put(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, its tensors directly into the shared pages.

    Raises:
        OSError: If there is not enough space. No partial file remains.
    """
    head, tensors = serialization.header_of(value)
    size = len(head) + sum(t.numel() * t.element_size() for t in tensors)
    try:
        with open(path, "w+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # fails before anything is written if space is insufficient
            else:
                file.truncate(size)
            serialization.write_into(mmap.mmap(file.fileno(), size), head, tensors)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def view(path: Path) -> Any:
    """Decode the value at ``path``. Its tensors are private views: writes to them do not affect other processes."""
    with open(path, "rb") as file:
        return serialization.decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), share=True)


def take(path: Path) -> Any:
    """Decode the value at ``path`` and delete the file. Its memory is freed with its tensors."""
    try:
        return view(path)
    finally:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
