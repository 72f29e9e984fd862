"""What a table's inputs are and how they are filled and scaled: a value that is written down, read and edited.

A hospital that sees only its own rows cannot know the categories that others use, nor the means of all. So the names of
the inputs and their statistics are settled once, from sums over the sites, and written to a file that every hospital
reads: ``statistics = "declared"``.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import Unreadable, read_text

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Statistics:
    """For each input of a table, in order.

    Attributes:
        names: Its name: a column, ``"column = value"``, or ``"column is missing"``.
        center: What is subtracted. Shape [F].
        spread: What it is then divided by. Shape [F].
        fill: What stands for a missing value, before that. Shape [F].
    """

    names: tuple[str, ...]
    center: Array
    spread: Array
    fill: Array

    @classmethod
    def of(cls, names: Sequence[str], seen: Array, amounts: Array, fill: str, scale: bool) -> "Statistics":
        """From the rows ``seen`` [n, F], NaN where missing.

        Args:
            names: The names of the inputs.
            seen: Training rows.
            amounts: Which inputs are amounts, rather than 0 or 1. Shape [F].
            fill: ``"mean"``, ``"median"`` or ``"zero"``.
            scale: Whether amounts are scaled to mean 0 and deviation 1.
        """
        there = ~np.isnan(seen)
        count = np.maximum(there.sum(axis=0), 1)
        mean = np.where(there, seen, 0).sum(axis=0) / count  # Σx / n
        square = np.where(there, seen**2, 0).sum(axis=0) / count  # Σx² / n
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        standing = np.zeros_like(mean) if fill == "zero" else mean
        if fill == "median":
            standing = np.array([np.median(c[~np.isnan(c)]) if not np.isnan(c).all() else 0.0 for c in seen.T])
        varies = amounts & scale & (spread > 1e-8 * np.abs(mean) + 1e-12)
        return cls(
            tuple(names),
            np.where(amounts & scale, mean, 0),
            np.where(varies, spread, 1),
            np.where(amounts, standing, 0),
        )

    def __call__(self, values: Array) -> Array:
        """``values`` [n, F] filled and scaled."""
        filled: Array = np.where(np.isnan(values), self.fill, values)
        return (filled - self.center) / self.spread

    def text(self) -> str:
        """As a TOML file."""
        lines = ["# The inputs of a table, in order, and how they are filled and scaled: (value - center) / spread."]
        for i, name in enumerate(self.names):
            quoted = name.replace("\\", "\\\\").replace('"', '\\"')
            numbers = (float(self.center[i]), float(self.spread[i]), float(self.fill[i]))
            lines.append('"{}" = {{ center = {!r}, spread = {!r}, fill = {!r} }}'.format(quoted, *numbers))
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """From the file that ``text`` made, as a person may have edited it.

        Raises:
            DataError: Where it is not such a file, naming the input.
        """
        try:
            table = tomllib.loads(read_text(path))
            if "version" in table and isinstance(table.get("use"), dict):  # a plan
                table = table["use"].get("inputs", {})
        except (Unreadable, tomllib.TOMLDecodeError) as error:
            raise DataError(f"{path.name} cannot be read: {error}") from None
        return cls.of_table(table, path)

    @classmethod
    def of_table(cls, table: Mapping[str, Any], path: Path) -> "Statistics":
        """From the file's table, or a plan's ``[use.inputs]``.

        Raises:
            DataError: With every problem, naming the input.
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
