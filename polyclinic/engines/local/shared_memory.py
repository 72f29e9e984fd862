"""Values in memory shared by two processes: one encodes them once, the other views them without a copy."""

import itertools
import mmap
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from weakref import finalize

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


class SharedFiles:
    """Files of values in a folder, each of which is written again when no one reads it.

    The kernel needs longer to provide the pages of a new file than to fill them.
    """

    def __init__(self, folder: Path, spare: int) -> None:
        """Create files in ``folder``, of which at most ``spare`` of each kind are kept while they are not used."""
        self._folder, self._most = folder, spare
        self._count = itertools.count()
        self._spare = defaultdict[str, list[Path]](list)

    def new(self, kind: str) -> Path:
        """Return the path of a file that no one uses, if possible of one that held a value of the same ``kind``."""
        return self._spare[kind].pop() if self._spare[kind] else self._folder / f"{kind}-{next(self._count)}"

    def release(self, path: Path, reusable: bool = True) -> None:
        """End the use of a file, which is removed unless it is ``reusable``: no process has a view of it."""
        spare = self._spare[path.name.partition("-")[0]]
        if reusable and len(spare) < self._most and path.exists():
            spare.append(path)
        else:
            path.unlink(missing_ok=True)

    def take(self, path: Path) -> Any:
        """Decode the value at ``path``; the file is released with the last of its tensors."""
        try:
            value, mapped = view(path)
        except BaseException:
            self.release(path)
            raise
        finalize(mapped, self.release, path).atexit = False
        return value


def put(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``. Pages of a file that is there are written again.

    Raises:
        OSError: If there is not enough space. No partial file remains.
    """
    head, tensors = serialization.header_of(value)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(head)
            for tensor in tensors:
                file.write(serialization.bytes_of(tensor))
            file.truncate()
    except OSError:
        path.unlink(missing_ok=True)
        raise


def view(path: Path) -> tuple[Any, mmap.mmap]:
    """Decode the value at ``path``, and return it with the mapped memory, which its tensors refer to.

    They are private views: writes to them do not affect other processes.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return serialization.decode(mapped, share=True), mapped


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
