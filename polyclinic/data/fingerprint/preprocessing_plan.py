"""A plan: what the federated fingerprint found of a study's data, and the preprocessing that follows from it.

It is a TOML file that people read and edit, after the plans of nnU-Net (Isensee et al., Nature Methods 18:203, 2021,
https://doi.org/10.1038/s41592-020-01008-z). A study uses it with ``plan = "..."`` in ``[data]``, and a hospital
compares new data with it (``polyclinic.data.quality.drift``). It holds sums over patients, and no row of anybody's.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import Unreadable, read_text
from polyclinic.data.preprocessing.table_statistics import Statistics

VERSION = 1
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Column:
    """One column of numbers, summed up.

    Attributes:
        mean: Of the values that are there.
        deviation: Theirs.
        missing: The share of values that are not there.
        quantiles: At ``SHARES``.
        cuts: Where its values are cut into groups of many patients, ascending.
        shares: The share of values up to the first cut, between each and the next, and above the last.
    """

    mean: float
    deviation: float
    missing: float
    quantiles: tuple[float, ...]
    cuts: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What some data are like.

    Attributes:
        examples: How many.
        patients: How many.
        classes: For each class how many examples have it; of masks: pixels. Empty where numbers are predicted.
        columns: By name.
    """

    examples: int
    patients: int
    classes: Mapping[str, float]
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class DataPlan:
    """What was found, and what follows.

    Attributes:
        study: Which study it was made for.
        data: The hash of the data it was made from.
        seed: Under which seed's split; only training rows of training sites count.
        everywhere: All sites' data together.
        sites: The same by site, where that was asked for.
        steps: For images: the steps, as tables of a study file.
        inputs: For tables: how inputs are filled and scaled.
        why: A reason for each step, as comments of the file.
    """

    study: str
    data: str
    seed: int
    everywhere: Reference
    sites: Mapping[str, Reference] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    inputs: Statistics | None = None
    why: tuple[str, ...] = ()

    def text(self) -> str:
        """As a file."""
        lines = [
            f"# The plan of {self.study}: what the federated fingerprint found, and the preprocessing that follows.",
            '# A study uses it with plan = "this file" in [data]. Edit [use] as you see fit; the rest is for reading,',
            "# and for `polyclinic data drift`, which compares new data with it.",
            f"version = {VERSION}",
            f"study = {json.dumps(self.study)}",
            f"data = {json.dumps(self.data)}",
            f"seed = {self.seed}          # training rows of training sites, as this seed splits them",
            "",
            "[use]",
            *(f"# {reason}" for reason in self.why),
        ]
        if self.inputs is not None:
            lines += ["[use.inputs]", *self.inputs.text().splitlines()]
        else:
            lines += ["steps = [", *(f"    {_inline(step)}," for step in self.steps), "]"]
        lines += _described(self.everywhere, "everywhere")
        for name, reference in self.sites.items():
            lines += _described(reference, f"sites.{json.dumps(name)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: Path) -> "DataPlan":
        """From its file, as a person may have edited it.

        Raises:
            DataError: Where it is no such file, with what is wrong.
        """
        try:
            table = tomllib.loads(read_text(path))
        except (Unreadable, tomllib.TOMLDecodeError) as error:
            raise DataError(f"{path.name} cannot be read: {error}") from None
        if table.get("version") != VERSION or not isinstance(table.get("use"), dict):
            raise DataError(f"{path.name} is no plan of this version: write one with `polyclinic data plan STUDY`")
        use = table["use"]
        if set(use) - {"steps", "inputs"} or len(use) != 1:
            raise DataError(f"{path.name}: [use] holds either steps (images) or inputs (tables), and nothing else")
        try:
            return cls(
                str(table["study"]),
                str(table["data"]),
                int(table["seed"]),
                _reference(table["everywhere"]),
                {name: _reference(found) for name, found in table.get("sites", {}).items()},
                tuple(use.get("steps", ())),
                Statistics.of_table(use["inputs"], path) if "inputs" in use else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path.name} is damaged below [everywhere] or [sites] ({error}): write it anew with "
                "`polyclinic data plan STUDY`, and edit [use] only"
            ) from None

    @classmethod
    def options(cls, path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        """A source's options ``own`` with the preprocessing of the plan at ``path``."""
        plan = cls.read(path)
        if plan.inputs is not None:
            return {**own, "statistics": "declared", "declared": str(path)}
        return {**own, "steps": [dict(step) for step in plan.steps]}


def _described(found: Reference, where: str) -> list[str]:
    lines = ["", f"[{where}]", f"examples = {found.examples}", f"patients = {found.patients}"]
    lines += [f"classes = {_inline(found.classes)}"] if found.classes else []
    lines += ["", f"[{where}.columns]"]
    return lines + [f"{json.dumps(name, ensure_ascii=False)} = {_inline(vars(c))}" for name, c in found.columns.items()]


def _inline(table: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{_key(name)} = {_value(value)}" for name, value in table.items()) + " }"


def _key(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else json.dumps(name, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) or not float(value).is_integer() else str(int(value))


def _reference(table: Mapping[str, Any]) -> Reference:
    columns = {name: _column(name, found) for name, found in table["columns"].items()}
    classes = {str(name): float(count) for name, count in table.get("classes", {}).items()}
    return Reference(int(table["examples"]), int(table["patients"]), classes, columns)


def _column(name: str, table: Mapping[str, Any]) -> Column:
    lists = {key: tuple(float(n) for n in table.get(key, ())) for key in ("quantiles", "cuts", "shares")}
    column = Column(float(table["mean"]), float(table["deviation"]), float(table["missing"]), **lists)
    numbers = (column.mean, column.deviation, column.missing, *column.quantiles, *column.cuts, *column.shares)
    if not all(math.isfinite(n) for n in numbers) or len(column.shares) != len(column.cuts) + bool(column.cuts):
        raise DataError(f"the plan's column {name!r} is damaged: write the plan anew with `polyclinic data plan STUDY`")
    return column
