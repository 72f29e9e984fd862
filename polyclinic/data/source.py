"""Contract of a data source: its description, its table of examples, and access to selected examples.

A source is a frozen dataclass whose fields are its options. It reads data only on request: ``table`` lists the examples
(patient, site, label), ``examples`` reads the selected ones, and ``fingerprint`` identifies the content, so that the
same fingerprint means the same numbers on every machine.
"""

import ctypes
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from polyclinic.data.examples import DataError, Dataset
from polyclinic.data.texts import Positions, taken

HIDDEN = {"hidden": True}
"""Metadata of a source's field that a study file cannot set."""

Task = Literal["classification", "multilabel", "regression", "survival", "segmentation", "reconstruction"]


@dataclass(frozen=True)
class Info:
    """Description of a data set.

    Attributes:
        name: The catalog's name, or the folder's.
        title: One line.
        modality: Such as ``"CT"`` or ``"table"``.
        organ: Such as ``"lung"``.
        task: Type of prediction.
        classes: The names of the classes (of labels, or of mask values), in order; empty for regression and survival.
        license: As stated by the publisher of the data.
        citation: Publication to cite.
        url: Origin of the data.
        notes: Sentences for the reader of a report.
        simulated: Sentence that accompanies every result if the patients are simulated.
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
    """Metadata of a source: one row per example, in a fixed order, known without reading any image.

    Attributes:
        ids: Unique name of each example.
        patients: Patient of each example. If unknown, the example's own id, which the source states in its notes.
        labels: A class per row (int64 [n]), several (float32 [n, L]), a number (float32 [n, 1]), time and event
            (float32 [n, 2], with ``survival``), or None for masks.
        columns: Further columns, as text, such as hospital, scanner or the source's own split.
        sites: The names of the columns that can name a site, the natural one first.
        survival: Whether labels are a time and an event.
    """

    ids: Sequence[str]
    patients: Sequence[str]
    labels: "np.ndarray[Any, Any] | None"
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    survival: bool = False

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.patients), *(len(c) for c in self.columns.values())}
        if self.labels is not None:
            lengths.add(len(self.labels))
        if len(lengths) != 1:
            raise DataError(f"a table's columns have different lengths: {sorted(lengths)}")
        if self.labels is not None and (bad := _not_finite(self.labels)):
            some = ", ".join(self.ids[i] for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise DataError(
                f"{len(bad)} of {len(self)} labels are NaN or infinite ({some}): correct or leave out those rows"
            )
        if self.survival and self.labels is not None:
            _require_survival(self.labels, self.patients)
        if len(set(self.ids)) != len(self.ids):
            seen: set[str] = set()
            twice = sorted({name for name in self.ids if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
            raise DataError(f"{len(twice)} ids occur more than once ({', '.join(twice[:3])}): ids must be unique")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self.ids)

    def rows(self, ids: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Return the row numbers of ``ids``.

        Raises:
            KeyError: If one is not in the table.
        """
        return self._positions.of(ids)

    def take(self, rows: Sequence[int]) -> "Table":
        """Return the table of the given row numbers, in that order."""
        return Table(
            taken(self.ids, rows),
            taken(self.patients, rows),
            None if self.labels is None else self.labels[np.asarray(rows, dtype=np.int64)],
            {name: taken(column, rows) for name, column in self.columns.items()},
            self.sites,
            self.survival,
        )


def _require_survival(labels: "np.ndarray[Any, Any]", patients: Sequence[str]) -> None:
    """Require that labels are times above 0 and events of 0 or 1, equal for all rows of a patient.

    Raises:
        DataError: If they are not. The message says what to change.
    """
    if labels.ndim != 2 or labels.shape[1] != 2:
        raise DataError(
            f"the targets of survival are a time and an event for each example, not of shape {labels.shape}"
        )
    problems = []
    if bad := int((labels[:, 0] <= 0).sum()):
        problems.append(f"{bad} times are 0 or less: a time to an event is above 0; correct or leave out those rows")
    if bad := int((~np.isin(labels[:, 1], (0, 1))).sum()):
        problems.append(f"{bad} events are neither 1 nor 0 (censored)")
    first: dict[str, tuple[float, float]] = {}
    twice = {p for p, t in zip(patients, map(tuple, labels.tolist()), strict=True) if first.setdefault(p, t) != t}
    if twice:
        some = ", ".join(sorted(twice)[:3])
        problems.append(
            f"{len(twice)} patients have rows with different times or events ({some}): give one time and one event for "
            "each patient"
        )
    if problems:
        raise DataError(problems)


def _not_finite(labels: "np.ndarray[Any, Any]") -> list[int]:
    """Return the positions of labels that contain NaN or infinite values."""
    if labels.dtype.kind != "f" or not len(labels):
        return []
    finite: list[bool] = np.isfinite(labels).reshape(len(labels), -1).all(axis=1).tolist()
    return [i for i, good in enumerate(finite) if not good]


class Source(Protocol):
    """Source of examples."""

    @property
    def info(self) -> Info:
        """Description of the data set."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content and of the options that affect what is read: 32 hexadecimal digits."""

    def table(self) -> Table:
        """Return the table of examples.

        Raises:
            DataError: If it cannot be read, with every problem.
        """

    def examples(self, ids: Sequence[str]) -> Dataset:
        """Read the named examples, in that order.

        Raises:
            DataError: With one line per unreadable file.
        """


@runtime_checkable
class FittedSource(Protocol):
    """Source whose numbers depend on statistics over training rows, such as a table's means."""

    def fitted(self, rows: Mapping[str, Sequence[str]], external: Sequence[str] = ()) -> Mapping[str, Source]:
        """Return for each site the source that reads its examples.

        Args:
            rows: The ids of each site's training rows; for an external site, of its own rows.
            external: The sites that are excluded from statistics of the federation.
        """

    def texts(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        """Return the input and the target of each named row as text, independent of other rows."""


@runtime_checkable
class ReleasableSource(Protocol):
    """Source that keeps in memory what it has read, such as all images of an archive."""

    def release(self) -> None:
        """Free what was read. The description remains; what else is asked for is read from the file again.

        The fingerprint is computed again when it is asked for, which shows whether the file has changed since.
        """


def release(source: Source) -> None:
    """Free the memory of ``source``, if it keeps what it has read, and return free memory to the system (glibc)."""
    if isinstance(source, ReleasableSource):
        source.release()
    with suppress(OSError, AttributeError):  # decoders' threads keep what they have freed
        ctypes.CDLL(None).malloc_trim(0)


def digest(*parts: Any) -> str:
    """Return a hash of ``parts`` (bytes directly, everything else by its ``repr``) as 32 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes | bytearray | memoryview) else repr(part).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def slug(text: str) -> str:
    """Return ``text`` as a site's name, such as ``"slices-1-25-mm"``; 3 becomes ``"site-3"``.

    Raises:
        DataError: If ``text`` contains no letter or digit.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")
    if not name:
        raise DataError(f"{text!r} cannot name a site: use letters or digits")
    return f"site-{name}" if name.isdigit() else name
