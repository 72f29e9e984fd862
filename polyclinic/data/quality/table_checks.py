"""Checks of a table: missing values, constant columns, classes, patients in two splits, columns that name people."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from polyclinic.data.formats.column_roles import SPLITS, column_of
from polyclinic.data.formats.parsing import is_missing, is_number, plain
from polyclinic.data.formats.safe_reading import LIMITS, Limits
from polyclinic.data.quality.findings import FEW_PATIENTS, FEW_PER_CLASS, Finding, Level
from polyclinic.data.sources.tabular_files import read_columns

_PERSONAL = re.compile(
    r"(?i)(^|_)(first|last|family|given|sur|full|patient|middle)?_?name$|birth|(^|_)dob($|_)|address|street|phone|e-?mail"
    r"|(^|_)mrn($|_)|(^|_)ssn($|_)|social_security|passport|insurance|zip_?code|post_?code|(^|_)nhs"
)


def check_table(
    path: Path, limits: Limits = LIMITS, health: Level = "error", sheet: str = ""
) -> tuple[int, int | None, Counter[str], Counter[str], Counter[str], list[Finding]]:
    """Return rows, patients, classes, splits, sites and findings of a table.

    Raises:
        Unreadable: If it is not a valid table.
    """
    columns = read_columns(path, limits, sheet)
    rows = list(zip(*columns.values(), strict=True))
    patients, sites, splits = (
        columns.get(column_of(columns, role, "", []))
        for role in ("patient", "site", "split")  # type: ignore[arg-type]
    )
    named = column_of(columns, "label", "", []) or ("num" if "num" in columns else "")
    labels = columns.get(named)
    found: list[Finding] = []
    if personal := [name for name in columns if _PERSONAL.search(name)]:
        found.append(Finding(health, "health", f"columns that may name people: {', '.join(personal)}"))
    holes = {n: sum(map(is_missing, c)) / len(rows) for n, c in columns.items()}
    if gaps := {name: share for name, share in holes.items() if share > 0}:
        listed = ", ".join(f"{n} {s:.0%}" for n, s in sorted(gaps.items(), key=lambda g: -g[1])[:8])
        found.append(Finding("note", "missing", f"missing values in {len(gaps)} of {len(columns)} columns: {listed}"))
    if coded := [n for n, c in columns.items() if {"-9", "-99", "-999"} & set(c) and _is_number(c)]:
        text = f"-9, -99 or -999 may mean missing in: {', '.join(coded[:8])}"
        found.append(Finding("warning", "coded-missing", text))
    if constant := [n for n, c in columns.items() if len(set(c)) == 1 and len(rows) > 1]:
        found.append(Finding("note", "constant", f"columns with one value only: {', '.join(constant[:8])}"))
    if infinite := [n for n, c in columns.items() if any(v.lower() in ("inf", "-inf", "infinity") for v in c)]:
        found.append(Finding("error", "infinite", f"columns with infinite values: {', '.join(infinite[:8])}"))
    if (copies := len(rows) - len(set(rows))) > 0:
        found.append(Finding("warning", "duplicates", f"{copies} rows are exact copies of another row"))
    classes = Counter(plain(v) for v in labels or [] if not is_missing(v))
    if labels is not None and len(classes) == 1:
        found.append(Finding("error", "one-class", "all rows are of one class: nothing can be learned from it alone"))
    if 1 < len(classes) <= 20 and (few := [c for c, n in classes.items() if n < FEW_PER_CLASS]):
        found.append(
            Finding("warning", "few-examples", f"classes with fewer than {FEW_PER_CLASS} rows: {', '.join(few)}")
        )
    if patients is not None and splits is not None:
        where: dict[str, set[str]] = defaultdict(set)
        for who, split in zip(patients, splits, strict=True):
            where[who].add(SPLITS.get(split.lower(), split))
        if both := sum(len(parts) > 1 for parts in where.values()):
            found.append(Finding("error", "two-splits", f"{both} patients are in more than one split"))
    people = len(set(patients)) if patients is not None else None
    if (people if people is not None else len(rows)) < FEW_PATIENTS:
        found.append(Finding("warning", "few-patients", f"fewer than {FEW_PATIENTS} patients: usually left out"))
    return (
        len(rows),
        people,
        classes if len(classes) <= 20 else Counter(),
        Counter(splits or []),
        Counter(sites or []),
        found,
    )


def _is_number(column: Sequence[str]) -> bool:
    return all(is_number(v) for v in column if not is_missing(v))
