"""The contract of a data source: what it is, whom it holds, and how to read some of it.

A source is a frozen dataclass whose fields are its options. It reads nothing until it is asked: ``table`` says what
there is (who, where, which label), ``examples`` reads the chosen part, and ``fingerprint`` names the content, so that
the same name means the same numbers on every machine.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from polyclinic.data.examples import DataError, Examples

HIDDEN = {"hidden": True}
"""Marks a field of a source that a study file cannot set."""

Task = Literal["classification", "multilabel", "regression", "segmentation", "reconstruction"]


@dataclass(frozen=True)
class Info:
    """What people should know of a data set before they believe a result on it.

    Attributes:
        name: The catalog's name, or the folder's.
        title: One line.
        modality: Such as ``"CT"`` or ``"table"``.
        organ: Such as ``"lung"``.
        task: What is predicted.
        classes: The names of the classes (of labels, or of mask values), in order; empty for regression.
        license: In the words of those who gave the data.
        citation: What to cite.
        url: Where it comes from.
        notes: What a reader of a report must be told, each a sentence.
        simulated: The sentence that goes with every result where the patients themselves are made up.
    """

    name: str
    title: str
    modality: str
    organ: str
    task: Task
    classes: tuple[str, ...] = ()
    license: str = "not stated"
    citation: str = ""
    url: str = ""
    notes: tuple[str, ...] = ()
    simulated: str | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """Who is in a source: one row per example, in a fixed order, known without reading any image.

    Attributes:
        ids: A unique name for each example.
        patients: Whose it is. Where a source does not know, the example's own id, and the source says so.
        labels: A class per row (int64 [n]), several (float32 [n, L]), a number (float32 [n, 1]), or None for masks.
        columns: Further columns, as text, such as hospital, scanner or the source's own split.
        sites: The names of the columns that could name a site, the natural one first.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: "np.ndarray[Any, Any] | None"
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.patients), *(len(c) for c in self.columns.values())}
        if self.labels is not None:
            lengths.add(len(self.labels))
        if len(lengths) != 1:
            raise DataError(f"a table's columns have different lengths: {sorted(lengths)}")
        if len(set(self.ids)) != len(self.ids):
            seen: set[str] = set()
            twice = sorted({name for name in self.ids if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
            raise DataError(f"{len(twice)} ids occur more than once ({', '.join(twice[:3])}): ids must be unique")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "Table":
        """The table of the given row numbers, in that order."""
        return Table(
            tuple(self.ids[i] for i in rows),
            tuple(self.patients[i] for i in rows),
            None if self.labels is None else self.labels[np.asarray(rows, dtype=np.int64)],
            {name: tuple(column[i] for i in rows) for name, column in self.columns.items()},
            self.sites,
        )


class Source(Protocol):
    """Where examples come from."""

    @property
    def info(self) -> Info:
        """What it is."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content and of the options that change what is read: 32 hexadecimal digits."""

    def table(self) -> Table:
        """Who is in it. Raises ``DataError`` where it cannot be read, with every problem."""

    def examples(self, ids: Sequence[str]) -> Examples:
        """Reads the named examples, in that order. Raises ``DataError`` with one line per unreadable file."""


@runtime_checkable
class FittedSource(Protocol):
    """A source whose numbers depend on statistics over training rows, such as a table's means."""

    def fitted(self, rows: Mapping[str, Sequence[str]], external: Sequence[str] = ()) -> Mapping[str, Source]:
        """For each site the source that reads its examples.

        Args:
            rows: The ids of each site's training rows; for an external site, of the rows that it has.
            external: The sites that have no part in statistics of the federation.
        """


def digest(*parts: Any) -> str:
    """A hash of ``parts``: bytes as they are, everything else by its ``repr``. 32 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes | bytearray | memoryview) else repr(part).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def slug(text: str) -> str:
    """``text`` as a site's name: small letters, digits and hyphens, as ``"slices-1-25-mm"``; 3 becomes ``"site-3"``.

    Raises:
        DataError: Where nothing of ``text`` is left.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")
    if not name:
        raise DataError(f"{text!r} cannot name a site: use letters or digits")
    return f"site-{name}" if name.isdigit() else name
