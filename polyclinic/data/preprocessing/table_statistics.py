"""Statistics with which a table's inputs are filled and scaled, in a file that people can read and edit.

A hospital that sees only its own rows knows neither the categories that others use nor the overall means. The names of
the inputs and their statistics are therefore computed once, from sums over the sites, and written to a file that every
hospital reads: ``statistics = "declared"``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import read_toml

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of each input of a table, in order.

    Attributes:
        names: Name: a column, ``"column = value"``, or ``"column is missing"``.
        center: Subtracted value. Shape [F].
        spread: Subsequent divisor. Shape [F].
        fill: Replacement of a missing value, applied first. Shape [F].
    """

    names: tuple[str, ...]
    center: Array
    spread: Array
    fill: Array

    @classmethod
    def of(cls, names: Sequence[str], seen: Array, amounts: Array, fill: str, scale: bool) -> "Statistics":
        """Compute from the rows ``seen`` [n, F], NaN if missing.

        Args:
            names: The names of the inputs.
            seen: Training rows.
            amounts: Whether an input is a quantity rather than 0 or 1. Shape [F].
            fill: ``"mean"``, ``"median"`` or ``"zero"``.
            scale: Whether quantities are scaled to mean 0 and deviation 1.
        """
        present = ~np.isnan(seen)
        count = np.maximum(present.sum(axis=0), 1)
        mean = np.where(present, seen, 0).sum(axis=0) / count  # Σx / n
        square = np.where(present, seen**2, 0).sum(axis=0) / count  # Σx² / n
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        replacement = np.zeros_like(mean) if fill == "zero" else mean
        if fill == "median":
            replacement = np.array([np.median(c[~np.isnan(c)]) if not np.isnan(c).all() else 0.0 for c in seen.T])
        varies = amounts & scale & (spread > 1e-8 * np.abs(mean) + 1e-12)
        return cls(
            tuple(names),
            np.where(amounts & scale, mean, 0),
            np.where(varies, spread, 1),
            np.where(amounts, replacement, 0),
        )

    def __call__(self, values: Array) -> Array:
        """Return ``values`` [n, F] filled and scaled."""
        filled: Array = np.where(np.isnan(values), self.fill, values)
        return (filled - self.center) / self.spread

    def text(self) -> str:
        """Return the contents of a TOML file."""
        lines = ["# The inputs of a table, in order, and how they are filled and scaled: (value - center) / spread."]
        for i, name in enumerate(self.names):
            quoted = name.replace("\\", "\\\\").replace('"', '\\"')
            numbers = (float(self.center[i]), float(self.spread[i]), float(self.fill[i]))
            lines.append('"{}" = {{ center = {!r}, spread = {!r}, fill = {!r} }}'.format(quoted, *numbers))
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Read the file that ``text`` produced, which a person may have edited.

        Raises:
            DataError: If it is not such a file; the message names the input.
        """
        table = read_toml(path)
        if "version" in table and isinstance(table.get("use"), dict):  # a plan
            table = table["use"].get("inputs", {})
        return cls.of_table(table, path)

    @classmethod
    def of_table(cls, table: Mapping[str, Any], path: Path) -> "Statistics":
        """Build from the file's table, or a plan's ``[use.inputs]``.

        Raises:
            DataError: With every problem; each names the input.
        """
        problems = [
            f'{path.name}: "{name}" needs center, spread (above 0) and fill, as numbers'
            for name, row in table.items()
            if not isinstance(row, dict)
            or set(row) != {"center", "spread", "fill"}
            or any(type(n) not in (int, float) or not np.isfinite(n) for n in row.values())
            or not row["spread"] > 0
        ]
        if problems or not table:
            raise DataError(problems or f"{path.name} lists no inputs")
        columns = (np.array([float(row[key]) for row in table.values()]) for key in ("center", "spread", "fill"))
        return cls(tuple(table), *columns)
