"""Atomic writing of files, the only implementation of it.

Content goes to a temporary file in the folder of the target, which is forced to disk and then renamed to the target.
Then the folder is forced to disk. At any moment, also after a crash or a power failure, the target therefore holds its
previous content or the new content, complete. After an exception the temporary file is removed. A process that is
killed leaves it behind; ``remove_leftovers`` deletes such files.

A symbolic link at the target is replaced by the file. The file to which it points is not changed, so a link cannot
redirect a write to another file.

Files that are only appended to, such as the journal and the records, are not written by this module.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PREFIX, SUFFIX = ".polyclinic-", ".part"
# A file system may not support forcing a folder to disk, or reading the folder; databases ignore the same errors.
_UNSUPPORTED = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP}


@contextmanager
def writing(path: Path, *, private: bool = False, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that becomes ``path`` at the end of the block.

    Args:
        path: The target. Its folder exists.
        private: Whether only this user may read the file (mode 0600). Otherwise the umask decides.
        durable: Whether the content is forced to disk. Without it, a power failure can lose or damage the file.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full. ``path`` is then unchanged, unless
            only forcing its folder to disk failed.
    """
    part = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write(path: Path, content: str | bytes, *, private: bool = False, durable: bool = True) -> None:
    """Write text in UTF-8, or bytes, to ``path``. The arguments and errors are those of ``writing``."""
    with writing(path, private=private, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_private(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file that only this user can read."""
    write(path, content, private=True, durable=durable)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write ``value`` as indented JSON that ends with a newline.

    Raises:
        TypeError: If ``value`` is not a JSON value. ``path`` is unchanged.
    """
    write(path, json.dumps(value, indent=1) + "\n", private=private)


def write_all(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write several files under ``folder``: all of them are written completely before the first one takes its place.

    Args:
        folder: The folder, which is created if it does not exist.
        contents: The content of each file by its path relative to ``folder``.

    Raises:
        OSError: If a file cannot be written, for example because the disk is full. No file is then changed, and no
            folder is left that did not exist. If only a renaming at the end fails, earlier files may be replaced.
    """
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    parts = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
    try:
        for name, content in contents.items():
            (parts / name).parent.mkdir(parents=True, exist_ok=True)
            write(parts / name, content)
        for name in contents:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(parts / name, folder / name)
    except BaseException:
        shutil.rmtree(parts, ignore_errors=True)
        for place in created:
            with suppress(OSError):
                place.rmdir()
        raise
    shutil.rmtree(parts, ignore_errors=True)
    for place in sorted({(folder / name).parent for name in contents}):
        sync_folder(place)


def sync_folder(folder: Path) -> None:
    """Force the entries of ``folder``, new names and removed names, to disk if its file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes in ``folder``, in which no other process may be writing."""
    for part in folder.glob(f"{PREFIX}*{SUFFIX}"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
