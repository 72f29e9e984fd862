"""Preprocessing plan: the federated fingerprint of a study's data, and the preprocessing derived from it.

A TOML file that people can read and edit, modeled on the plans of nnU-Net (Isensee et al., Nature Methods 18:203, 2021,
https://doi.org/10.1038/s41592-020-01008-z). A study uses it with ``plan = "..."`` in ``[data]``, and a hospital
compares new data with it (``polyclinic.data.quality.drift``). It contains sums over patients and no individual rows.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import read_toml
from polyclinic.data.preprocessing.table_statistics import Statistics

VERSION = 1
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Column:
    """Summary of one numeric column.

    Attributes:
        mean: Mean of the non-missing values.
        deviation: Their standard deviation.
        missing: Share of missing values.
        quantiles: Quantiles at ``SHARES``.
        cuts: Boundaries of groups of many patients, ascending.
        shares: Share of values up to the first cut, between adjacent cuts, and above the last.
    """

    mean: float
    deviation: float
    missing: float
    quantiles: tuple[float, ...]
    cuts: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Summary of a set of data.

    Attributes:
        examples: Number of examples.
        patients: Number of patients.
        classes: Number of examples per class; for masks, of pixels. Empty for numeric targets.
        columns: Columns by name.
    """

    examples: int
    patients: int
    classes: Mapping[str, float]
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class DataPlan:
    """Fingerprint and derived preprocessing.

    Attributes:
        study: The study it was made for.
        data: Hash of the data it was made from.
        seed: Seed of the split; only training rows of training sites are used.
        everywhere: Summary of all sites' data.
        sites: Summaries by site, if requested.
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
        """Return the contents of the file."""
        lines = [
            f"# The plan of {self.study}: the federated fingerprint of its data, and the derived preprocessing.",
            '# A study uses it with plan = "this file" in [data]. Edit [use] as needed; the rest is information,',
            "# also used by `polyclinic data drift`, which compares new data with it.",
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
        """Read a plan from its file, which a person may have edited.

        Raises:
            DataError: If it is not a valid plan, with the reason.
        """
        table = read_toml(path)
        if table.get("version") != VERSION or not isinstance(table.get("use"), dict):
            raise DataError(f"{path.name} is not a plan of this version: create one with `polyclinic data plan STUDY`")
        use = table["use"]
        if set(use) - {"steps", "inputs"} or len(use) != 1:
            raise DataError(
                f"{path.name}: [use] must contain either steps (images) or inputs (tables), and nothing else"
            )
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
                f"{path.name} is damaged below [everywhere] or [sites] ({error}): recreate it with "
                "`polyclinic data plan STUDY`, and edit [use] only"
            ) from None

    @classmethod
    def options(cls, path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a source's options ``own`` with the preprocessing of the plan at ``path``."""
        plan = cls.read(path)
        if plan.inputs is not None:
            return {**own, "statistics": "declared", "declared": str(path)}
        return {**own, "steps": [dict(step) for step in plan.steps]}


def _described(summary: Reference, section: str) -> list[str]:
    lines = ["", f"[{section}]", f"examples = {summary.examples}", f"patients = {summary.patients}"]
    lines += [f"classes = {_inline(summary.classes)}"] if summary.classes else []
    lines += ["", f"[{section}.columns]"]
    return lines + [
        f"{json.dumps(name, ensure_ascii=False)} = {_inline(vars(c))}" for name, c in summary.columns.items()
    ]


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
        raise DataError(f"the plan's column {name!r} is damaged: recreate the plan with `polyclinic data plan STUDY`")
    return column
