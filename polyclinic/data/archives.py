"""Unpacking of archives within limits: no file is written outside the target folder, which is complete or absent."""

import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import size

MOST_BYTES = 64 * 2**30
MOST_FILES = 10**6
ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")


def unpack(archive: Path, home: Path) -> None:
    """Unpack a ``.zip`` or ``.tar`` file into the new folder ``home``.

    Raises:
        DataError: If the archive is damaged, too large, or contains paths outside the folder.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=home.parent) as work:
            inner = Path(work) / "content"
            inner.mkdir()
            if archive.name.lower().endswith(".zip"):
                with zipfile.ZipFile(archive) as packed:
                    _bounded(archive, [member.file_size for member in packed.infolist()])
                    packed.extractall(inner)  # the standard library keeps every member within `inner`
            else:
                with tarfile.open(archive) as tape:
                    members = tape.getmembers()
                    _bounded(archive, [member.size for member in members])
                    tape.extractall(inner, members, filter="data")  # no links outside, no devices, no absolute paths
            for hidden in (*inner.rglob("._*"), *inner.rglob("__MACOSX")):  # files added by macOS are no data
                shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink(missing_ok=True)
            os.replace(inner, home)
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        if not home.is_dir():  # another process may have unpacked it at the same moment
            raise DataError(f"{archive.name} cannot be unpacked ({type(error).__name__}): fetch it again") from None


def _bounded(archive: Path, sizes: list[int]) -> None:
    if len(sizes) > MOST_FILES or sum(sizes) > MOST_BYTES:
        raise DataError(f"{archive.name} unpacks to {len(sizes)} files of {size(sum(sizes))}: unpack it yourself")
