"""Building of the case files of a data set: once, in parallel, resumable, with bounded memory."""

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from polyclinic.data.cache import CHECKED, folder, writing_in
from polyclinic.data.cases import case_file
from polyclinic.data.cases.case_file import CaseFile, Prepared
from polyclinic.data.formats.safe_reading import size
from polyclinic.errors import DataError

Refused = TypeVar("Refused")
COPIES = 12
"""Bytes in memory, per byte of a float32 image, while a case is read, prepared and stored."""
SHARE = 4
"""The part of the machine's memory, as a divisor, that the building of cases may take."""


def stored(
    name: str,
    keys: Sequence[str],
    ids: Sequence[str],
    bytes_on_disk: Sequence[int],
    prepare: Callable[[int], "Prepared | Refused"],
) -> "list[CaseFile | Refused]":
    """Return the stored case of each example, after building those that are not in the cache yet.

    Every case is one file, written atomically under its key, so that an interrupted building continues where it
    stopped, and several processes can build the same data set. The largest file is read first and alone; its size
    limits how many cases are built at the same time, and whether the disk has enough space is checked with it.

    Args:
        name: The data set, for the progress bar.
        keys: Hash of everything on which each stored case depends.
        ids: Name of each example.
        bytes_on_disk: Size of each example's files.
        prepare: Reads and preprocesses one example, by its position.

    Returns:
        For each example its case, or what ``prepare`` returned instead of a ``Prepared``.

    Raises:
        DataError: If the cache cannot be written.
    """
    place = folder() / "cases"
    paths = [place / key[:2] / f"{key}.safetensors" for key in keys]
    cases: dict[int, CaseFile | Refused] = {}
    found = {i: case for i, path in enumerate(paths) if (case := case_file.opened(path, ids[i])) is not None}
    if sum(path.stat().st_size for path in {case.path for case in found.values()}) <= CHECKED:
        found = {i: case for i, case in found.items() if case.verify()}
    cases |= found
    first = {key: i for i, key in reversed(list(enumerate(keys)))}  # equal examples share a file
    missing = sorted({first[keys[i]] for i in range(len(keys)) if i not in cases}, key=lambda i: -bytes_on_disk[i])

    def build(i: int) -> "tuple[int, CaseFile | Refused, int]":
        prepared = prepare(i)
        if not isinstance(prepared, Prepared):
            return i, prepared, 0
        pixels = prepared.picture.pixels
        try:
            with writing_in(paths[i].parent):
                case_file.write(paths[i], prepared)
        finally:
            del prepared
        case = case_file.opened(paths[i], ids[i])
        if case is None:
            raise DataError(f"{paths[i]} was damaged while it was written: check the disk of the cache {place}")
        return i, case, pixels.numel() * 4

    if missing:
        _run(name, missing, build, cases, paths, bytes_on_disk)
    for i, key in enumerate(keys):
        if i not in cases:
            twin = cases[first[key]]
            cases[i] = _named(twin, ids[i]) if isinstance(twin, CaseFile) else twin
    return [cases[i] for i in range(len(keys))]


def _run(
    name: str,
    missing: Sequence[int],
    build: "Callable[[int], tuple[int, CaseFile | Refused, int]]",
    cases: "dict[int, CaseFile | Refused]",
    paths: Sequence[Path],
    bytes_on_disk: Sequence[int],
) -> None:
    """Build the ``missing`` cases, the largest first, and enter them in ``cases``."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(f"Reading {name} (once)", total=len(missing))
        rest = iter(missing)
        for i in rest:  # until one can be read: its size is the estimate for the others
            _, cases[i], decoded = build(i)
            progress.advance(bar)
            if decoded:
                left = [j for j in missing if j not in cases]
                _require_space(paths[i], [bytes_on_disk[j] / max(bytes_on_disk[i], 1) for j in left])
                with ThreadPoolExecutor(_at_once(decoded)) as pool:
                    try:
                        for j, case, _ in pool.map(build, rest):
                            cases[j] = case
                            progress.advance(bar)
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise


def _named(case: CaseFile, name: str) -> CaseFile:
    """Return the case under the name of another example with the same content."""
    return replace(case, values=replace(case.values, id=name))


def _at_once(decoded: int) -> int:
    """Return how many cases may be built at the same time, given the bytes of the largest one as float32."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 2**33
    return max(1, min(os.cpu_count() or 1, memory // SHARE // (COPIES * decoded)))


def _require_space(path: Path, shares: Sequence[float]) -> None:
    """Require space for the cases that are still to be written, of ``shares`` of the size of the one at ``path``.

    Raises:
        DataError: If the disk has less than half of what these need.
    """
    needed, free = sum(shares) * path.stat().st_size, shutil.disk_usage(path.parent).free
    if needed / 2 > free:
        raise DataError(
            f"the cache {path.parent.parent} needs about {size(needed)} more for this data, and its disk has "
            f"{size(free)}: free some space, or point POLYCLINIC_CACHE at a larger disk"
        )
