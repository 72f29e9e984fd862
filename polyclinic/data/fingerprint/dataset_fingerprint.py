"""Summary of each example in a few numbers before preprocessing, the rows over which the federated fingerprint sums.

For a table row: its values, with missing ones as NaN. For an image: the number of pixels and the spacing along each
axis, and for each channel the mean, the standard deviation, the median and the 0.5 and 99.5 % quantiles (with a mask,
also those of the foreground). Contains neither pixels nor names.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyclinic.data.cache import cached
from polyclinic.data.collection import FromFiles
from polyclinic.data.examples import DataError, Examples, in_memory
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.source import Info, Source, Table, digest
from polyclinic.data.sources.feature_tables import FeatureTable

VERSION = 1
AXES = ("z", "y", "x")
MOST = 2**20
"""Largest number of evenly spaced pixels from which the quantiles of an image are computed."""

PLAIN: dict[str, Any] = {
    "annotations": {},
    "accelerate": 0.0,
    "position": None,
    "video": None,
    "scanners": 0.0,
    "duplicates": "report",
    "near_duplicates": "ignore",
}
"""Settings that are removed from a federation whose examples are row numbers."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Rows of numbers with the examples' labels, indexed like examples.

    Attributes:
        names: Names of the columns.
        rows: float64 [n, F]; NaN if a number is not known.
        targets: As in ``Examples``, except for masks: the number of pixels of each label, float64 [n, labels].
        patients: Patient of each row.
    """

    names: tuple[str, ...]
    rows: Tensor
    targets: Tensor
    patients: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows[index], self.targets[index]

    def subset(self, index: Tensor) -> "Measured":
        """Return the rows at the positions ``index``."""
        patients = tuple(self.patients[i] for i in index.tolist())
        return Measured(self.names, self.rows[index], self.targets[index], patients)


@dataclass(frozen=True, eq=False)
class Numbered:
    """Source whose inputs are only the row numbers, so that a federation can be built before images have one size."""

    base: Source

    @property
    def info(self) -> Info:
        """The base's description; of files without reading them."""
        return self.base.collection.info if isinstance(self.base, FromFiles) else self.base.info

    @property
    def fingerprint(self) -> str:
        """The base's fingerprint."""
        return self.base.fingerprint

    def table(self) -> Table:
        """Return the base's table."""
        return self.base.table()

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return each example's row number, and its class or 0."""
        table = self.base.table()
        where = {name: i for i, name in enumerate(table.ids)}
        rows = [where[name] for name in ids]
        single = table.labels is not None and table.labels.ndim == 1
        targets = torch.from_numpy(table.labels[rows]) if single else torch.zeros(len(rows), dtype=torch.int64)  # type: ignore[index]
        return Examples(
            torch.tensor(rows, dtype=torch.float32)[:, None],
            targets,
            tuple(table.patients[i] for i in rows),
            tuple(ids),
        )


def plain(source: Source) -> Source:
    """Return the source without its steps, and for a table without statistics of its own."""
    if isinstance(source, FeatureTable):
        return replace(source, statistics="federation", declared="", fill="zero" if source.fill == "zero" else "mean")
    given = {"steps": (), "unreadable": "refuse", "patch": ()}
    known = {name: value for name, value in given.items() if hasattr(source, name)}
    return replace(source, **known) if known else source  # type: ignore[type-var]


def measured(source: Source) -> Measured:
    """Return every example of ``source`` in numbers, in the order of its table. Images are read once and cached.

    Raises:
        DataError: If the data cannot be read, or mix pictures and volumes.
    """
    source = plain(source)
    table = source.table()
    if isinstance(source, FeatureTable):
        values, names, _ = source.inputs
        return Measured(names, torch.from_numpy(values).double(), _targets(table), table.patients)
    stored = cached("measured", digest("measured", VERSION, source.fingerprint), lambda: _measure(source, table))
    targets = stored["labels"] if table.labels is None else _targets(table)
    return Measured(tuple(stored["names"]), stored["rows"], targets, table.patients)


def _targets(table: Table) -> Tensor:
    return torch.zeros(len(table), dtype=torch.int64) if table.labels is None else torch.from_numpy(table.labels)


def _measure(source: Source, table: Table) -> dict[str, Any]:
    if not isinstance(source, FromFiles) and len(source.examples(table.ids[:1]).shape) == 1:
        rows = in_memory(source.examples(table.ids), "a table").inputs.double()
        names = [f"input {i + 1}" for i in range(rows.shape[1])]
        return {"names": names, "rows": rows, "labels": torch.zeros(len(rows), 1, dtype=torch.float64)}
    measured_rows = [None if picture is None else of(picture) for picture in pictures(source, table)]
    names = sorted({name for row in measured_rows if row for name in row if not isinstance(name, int)}, key=_order)
    if not names:
        raise DataError(f"{table.ids[0]} and all others cannot be read: there is nothing to measure")
    if any(row and AXES[0] in row["axes"] for row in measured_rows) and any(
        row and AXES[0] not in row["axes"] for row in measured_rows
    ):
        raise DataError("some images are 2-D and some are volumes: use two studies")
    labels = max((name for row in measured_rows if row for name in row if isinstance(name, int)), default=0)
    nan = float("nan")
    return {
        "names": [name for name in names if name != "axes"],
        "rows": torch.tensor(
            [[row.get(name, nan) if row else nan for name in names if name != "axes"] for row in measured_rows],
            dtype=torch.float64,
        ),
        "labels": torch.tensor(
            [[row.get(label, 0.0) if row else 0.0 for label in range(labels + 1)] for row in measured_rows],
            dtype=torch.float64,
        ),
    }


def pictures(source: Source, table: Table) -> Iterator[Picture | None]:
    """Yield every image of ``source`` in the order of its ``table``; None if it cannot be read."""
    if isinstance(source, FromFiles):
        yield from source.collection.pictures()
        return
    for name in table.ids:
        one = source.examples([name])
        x, y = one[torch.tensor([0])]
        yield Picture(x[0], y[0] if y.ndim > 2 else None)


def of(picture: Picture) -> dict[Any, Any]:
    """Return the numbers of one image by name, and under each label's number its pixel count in the mask."""
    axes = AXES[-len(picture.size) :]
    row: dict[Any, Any] = {"axes": axes}
    for i, axis in enumerate(axes):
        row[f"pixels along {axis}"] = float(picture.size[i])
        if picture.spacing_mm is not None:
            row[f"mm between pixels along {axis}"] = picture.spacing_mm[i]
            row[f"mm along {axis}"] = picture.spacing_mm[i] * picture.size[i]
    for number, channel in enumerate(picture.pixels):
        of_channel = f" of channel {number + 1}" if len(picture.pixels) > 1 else ""
        values = channel.double().flatten()
        row["mean" + of_channel], row["deviation" + of_channel] = float(values.mean()), float(values.std(correction=0))
        names = ("0.5 % quantile", "median", "99.5 % quantile")
        for name, value in zip(names, _quantiles(values), strict=True):
            row[name + of_channel] = value
        if picture.mask is not None and bool((picture.mask > 0).any()):
            inside = _quantiles(channel[picture.mask > 0].double())
            for name, value in zip(names, inside, strict=True):
                row[f"{name} of the foreground{of_channel}"] = value
    if picture.mask is not None:
        row |= {label: float(n) for label, n in enumerate(picture.mask.clamp(min=0).flatten().bincount().tolist()) if n}
    return row


def _quantiles(values: Tensor) -> Iterable[float]:
    few = values[:: max(1, len(values) // MOST)][: MOST * 2].sort().values
    return (float(few[round(share * (len(few) - 1))]) for share in (0.005, 0.5, 0.995))


def _order(name: str) -> tuple[int, str]:
    """Sort key: sizes first, then spacing, then values."""
    return (0 if name.startswith("pixels") else 1 if name.startswith("mm") else 2, name)
