"""How a run read the rows of a table, and new rows that are read the same way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.errors import ConfigError
from polyclinic.studies.inference.reading import Case


@dataclass(frozen=True, eq=False)
class TableReading:
    """How a run read the rows of a table.

    Attributes:
        source: The table that the run was trained on. Only its options are used, not the file.
        statistics: The file that lists the inputs; None if each site has its own.
    """

    source: FeatureTable
    statistics: Path | None

    @property
    def table(self) -> dict[str, Any]:
        """The reading as plain values."""
        keys = ("categories", "missing", "zero_is_missing", "patient")
        return {"inputs": list(self._names), **{key: getattr(self.source, key) for key in keys}}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return () if self.statistics is None else Statistics.read(self.statistics).names

    def cases(self, place: Path) -> tuple[Case, ...]:
        """Return the rows of the table at ``place``.

        Raises:
            ConfigError: If each site scales rows with its own statistics, and none was chosen, or there is no table.
            DataError: If the table cannot be read, or lacks columns.
        """
        if self.statistics is None:
            raise ConfigError("each site scales its rows with its own statistics: choose those of one with --site")
        if not place.is_file():
            raise ConfigError(f"{place}: the model takes rows of a table: name a CSV or Parquet file")
        rows = self.source.unlabeled_rows(place, self._names)
        return tuple(Case(name, (place,), i) for i, (name, _) in enumerate(rows))

    def rows(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Picture | str]]:
        """Yield each row with its inputs, neither filled nor scaled, as the pixels of a picture; or why it has none."""
        if not cases:
            return
        rows = self.source.unlabeled_rows(cases[0].files[0], self._names)
        for case in cases:
            values = rows[case.row or 0][1]
            yield case, values if isinstance(values, str) else Picture(torch.from_numpy(values), None, None, None)
