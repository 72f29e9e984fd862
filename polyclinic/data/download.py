"""Fetching a file with a known checksum: resumed where it stopped, checked before it is used, and clear when offline.

The standard library does all of it. (The package ``pooch``, the usual choice, begins anew after every interruption,
and a chest X-ray set of some gigabytes over a hospital's line is interrupted.) Proxies are taken from the environment.
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
    """The file at ``to``, fetched from ``url`` if it is not there yet.

    What has arrived is kept as ``<name>.part``, so that another call goes on from there. The file appears under its own
    name only when its checksum is right.

    Args:
        url: Where it is.
        to: Where it shall be.
        md5: The checksum that those who publish it state. It guards against damage, not against a forger.
        tries: How often to go on after an interruption in which nothing arrived.
        timeout: Seconds to wait for the next piece.

    Raises:
        DataError: Where it cannot be fetched, with how to bring it by hand; or where its content is wrong.
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
        raise DataError(f"cannot write to {to.parent} ({error.strerror}): point POLYCLINIC_CACHE elsewhere") from error
    part, failed = to.with_name(to.name + ".part"), 0
    reason = ""
    while failed < tries:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _go_on(url, part, before, timeout):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is left to send
                break
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500:
                raise DataError(_by_hand(url, to, md5, reason)) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failed = 0 if part.exists() and part.stat().st_size > before else failed + 1
    else:
        raise DataError(_by_hand(url, to, md5, reason))
    if (found := _md5(part)) != md5:
        part.unlink()
        raise DataError(
            f"what came from {url} is not the file that was published (MD5 {found}, not {md5}); it was deleted. Try "
            "again; if it stays so, the file has changed or something on the way changes it"
        )
    os.replace(part, to)
    return to


def _go_on(url: str, part: Path, have: int, timeout: float) -> bool:
    """Appends what is missing; whether everything that was announced has arrived."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if have and answer.status != 206:  # the server cannot go on: begin anew
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
        f"cannot fetch {url}: {reason}. If this machine has no way to the internet, fetch the file on another one "
        f"(its MD5 is {md5}) and put it at {to}. What has arrived so far is kept, and another try goes on from there"
    )
