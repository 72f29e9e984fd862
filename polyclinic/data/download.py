"""Download of a file with a known checksum: resumed after interruptions and verified before use.

Uses the standard library only. (The package ``pooch`` restarts a download after every interruption, which is
impractical for data sets of several gigabytes.) Proxies are taken from the environment.
"""

import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from polyclinic.data.examples import DataError

TRIES = 5
PIECE = 2**18
SECONDS = 30


def fetch(url: str, to: Path, md5: str, tries: int = TRIES, timeout: float = SECONDS) -> Path:
    """Return the file at ``to``, downloaded from ``url`` if it does not exist.

    A partial download is kept as ``<name>.part`` and resumed by the next call. The file gets its final name only after
    its checksum was verified.

    Args:
        url: Address of the file.
        to: Target path.
        md5: Published checksum. It protects against damage, not against forgery.
        tries: Number of consecutive attempts without any progress before giving up.
        timeout: Seconds to wait for the next piece.

    Raises:
        DataError: If it cannot be downloaded, with instructions for a manual download, or if its content is wrong.
    """
    if to.is_file():
        if _md5(to) == md5:
            return to
        raise DataError(
            f"{to} is not the file that was published (its MD5 differs from {md5}): delete it and try again"
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {to.parent} ({error.strerror}): set POLYCLINIC_CACHE to another folder"
        ) from error
    part, failed = to.with_name(to.name + ".part"), 0
    reason = ""
    while failed < tries:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _go_on(url, part, before, timeout):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing remains to be sent
                break
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500:
                raise DataError(_by_hand(url, to, md5, reason)) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failed = 0 if part.exists() and part.stat().st_size > before else failed + 1
    else:
        raise DataError(_by_hand(url, to, md5, reason))
    if (actual := _md5(part)) != md5:
        part.unlink()
        raise DataError(
            f"what came from {url} is not the file that was published (MD5 {actual}, not {md5}); it was deleted. Try "
            "again; if the error persists, the file was changed at its source or in transit"
        )
    os.replace(part, to)
    return to


def _go_on(url: str, part: Path, have: int, timeout: float) -> bool:
    """Append the missing part, and return whether everything announced has arrived."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if have and answer.status != 206:  # the server cannot resume: start again
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            return _copy(answer, file, have, total, part.name.removesuffix(".part"))


def _copy(answer: BinaryIO, file: BinaryIO, have: int, total: int | None, name: str) -> bool:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(name, total=total, completed=have)
        while piece := answer.read(PIECE):
            file.write(piece)
            have += len(piece)
            progress.update(bar, completed=have)
    return total is None or have == total


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _by_hand(url: str, to: Path, md5: str, reason: str) -> str:
    return (
        f"cannot fetch {url}: {reason}. If this machine has no access to the internet, fetch the file on another one "
        f"(its MD5 is {md5}) and put it at {to}. The partial download is kept, and another attempt resumes it"
    )
