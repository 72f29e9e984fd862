"""Rows of numbers of a source's images before preprocessing, over which the federated statistics of cases sum.

A row holds neither pixels nor names (``polyclinic.learning.tasks.case_sums``). Images are read once, one at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.data.cache import cached
from polyclinic.data.examples import DataError
from polyclinic.data.fingerprint.dataset_fingerprint import pictures, plain
from polyclinic.data.source import Source, digest
from polyclinic.learning.tasks.case_sums import CHANNEL, HEAD, row_of

VERSION = 1


@dataclass(frozen=True, eq=False)
class CaseRows:
    """Rows of numbers, one per image, with the patients; indexed like examples.

    Attributes:
        rows: Shape [n, F], float32.
        patients: Patient of each image.
    """

    rows: Tensor
    patients: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows[index], torch.zeros(len(index), dtype=torch.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return tuple(self.rows.shape[1:])

    def case_rows(self) -> Iterator[Tensor]:
        """Yield all rows, in groups."""
        yield from self.rows.split(64)

    def subset(self, index: Tensor) -> "CaseRows":
        """Return the rows at the positions ``index``."""
        return CaseRows(self.rows[index], tuple(self.patients[i] for i in index.tolist()))


def case_rows(source: Source) -> CaseRows:
    """Return the row of every image of ``source`` without its preprocessing, in the order of its table. Cached.

    Raises:
        DataError: If images cannot be read, or have different numbers of channels or axes.
    """
    source = plain(source)
    table = source.table()

    def build() -> dict[str, Tensor]:
        rows = []
        for name, picture in zip(table.ids, pictures(source, table), strict=True):
            if picture is None:
                raise DataError(f"{name} cannot be read: `polyclinic data check` says why")
            rows.append(row_of(picture.pixels, picture.mask, picture.spacing_mm))
        if len({len(row) for row in rows}) > 1:
            raise DataError("images have different numbers of channels: a plan needs the same channels in all")
        if len({float(row[0]) for row in rows}) > 1:
            raise DataError("some images are 2-D and some are volumes: use two studies")
        return {"rows": torch.stack(rows)}

    stored = cached("cases-measured", digest("case rows", VERSION, HEAD, CHANNEL, source.fingerprint), build)
    return CaseRows(stored["rows"], table.patients)
