"""Splits into training, validation and test data by patient, never by image."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyclinic.data.examples import DataError
from polyclinic.data.formats.column_roles import SPLITS
from polyclinic.data.source import Table

ROLES = ("train", "val", "test")
BINS = 5
"""Number of equally large groups into which numeric labels are divided for stratification."""


def rng_for(*key: int | str) -> np.random.Generator:
    """Return a random generator that depends only on ``key``."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little"))


def strata(table: Table) -> dict[str, int]:
    """Return the stratum of each patient.

    Classes: the most frequent one among the patient's examples (the rarer one of a tie). Several labels: the set of
    labels in any example. Numbers: which of ``BINS`` quantiles the mean falls into. Survival: whether the event
    happened. Masks: one stratum.
    """
    by_patient: dict[str, list[int]] = defaultdict(list)
    for row, patient in enumerate(table.patients):
        by_patient[patient].append(row)
    labels = table.labels
    if labels is None:
        return dict.fromkeys(by_patient, 0)
    if labels.ndim == 1:
        overall = Counter(labels.tolist())
        most_frequent = {}
        for patient, rows in by_patient.items():
            counts = Counter(labels[rows].tolist())
            most_frequent[patient] = min(counts, key=lambda c, n=counts: (-n[c], overall[c], c))  # type: ignore[misc]
        return most_frequent
    if table.survival:
        return {p: int(labels[rows, 1].max()) for p, rows in by_patient.items()}
    if labels.shape[1] > 1:
        patterns = {p: tuple(np.nan_to_num(labels[rows]).max(axis=0).tolist()) for p, rows in by_patient.items()}
        number = {pattern: i for i, pattern in enumerate(sorted(set(patterns.values())))}
        return {p: number[pattern] for p, pattern in patterns.items()}
    means = {p: float(labels[rows].mean()) for p, rows in by_patient.items()}
    cuts = np.quantile(list(means.values()), np.arange(1, BINS) / BINS)
    return {p: int(np.searchsorted(cuts, mean)) for p, mean in means.items()}


def split_patients(groups: Mapping[str, int], shares: Sequence[float], rng: np.random.Generator) -> dict[str, str]:
    """Return a role for each patient, in the given shares, as evenly within each stratum as possible.

    Patients are drawn in random order, stratum by stratum; each gets the role that lags most behind its share, in the
    stratum and overall. A role with a positive share gets at least one patient, if there are enough patients.

    Args:
        groups: The stratum of each patient.
        shares: Of training, validation and test; they sum to 1.
        rng: Generator of the random order.
    """
    order = sorted(groups)
    order = [order[i] for i in rng.permutation(len(order))]
    order.sort(key=lambda patient: groups[patient])  # stable: random within a group
    wanted = {role: share for role, share in zip(ROLES, shares, strict=True) if share > 0}
    overall: Counter[str] = Counter()
    within: dict[int, Counter[str]] = defaultdict(Counter)
    roles = {}
    for seen, patient in enumerate(order, start=1):
        own = within[groups[patient]]
        lag = {r: s * (seen + own.total() + 1) - overall[r] - own[r] for r, s in wanted.items()}
        role = max(wanted, key=lambda r, lag=lag: (round(lag[r], 9), wanted[r]))  # type: ignore[misc]
        roles[patient] = role
        overall[role] += 1
        own[role] += 1
    for empty in [r for r in wanted if not overall[r] and len(order) >= len(wanted)]:
        rich = overall.most_common(1)[0][0]
        moved = next(p for p in reversed(order) if roles[p] == rich)
        roles[moved] = empty
        overall[rich] -= 1
        overall[empty] += 1
    return roles


@dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation, number ``index`` of ``count``.

    With ``by = "patients"`` the patients of every site are divided into ``count`` groups, one of which this fold tests.
    With ``by = "sites"`` this fold tests one site, which does not train (leave one site out).
    """

    index: int
    count: int
    by: Literal["patients", "sites"] = "patients"


def fold_patients(
    groups: Mapping[str, int], fold: Fold, shares: Sequence[float], rng: np.random.Generator
) -> dict[str, str]:
    """Return a role for each patient: one group of ``fold.count`` tests, the others train and validate in their shares.

    Over the folds, with equal ``rng``, every patient is a test patient exactly once. Groups are as even within each
    stratum as possible.

    Raises:
        DataError: If there are fewer patients than folds.
    """
    if len(groups) < fold.count:
        raise DataError(
            f"{len(groups)} patients are too few for {fold.count} folds: ask for fewer folds, or leave "
            f"small sites out with min_patients = {fold.count}"
        )
    order = sorted(groups)
    order = [order[i] for i in rng.permutation(len(order))]
    order.sort(key=lambda patient: groups[patient])  # stable: random within a group
    tests = {patient for i, patient in enumerate(order) if i % fold.count == fold.index}
    rest = {patient: group for patient, group in groups.items() if patient not in tests}
    return dict.fromkeys(tests, "test") | split_patients(rest, without_test(shares), rng)


def without_test(shares: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of training and validation if test patients are separated by other means."""
    train, val, _ = shares
    return train / (train + val), val / (train + val), 0.0


def official(table: Table) -> dict[str, str]:
    """Return the role that the source's own column ``split`` gives to each patient.

    Raises:
        DataError: If there is no such column, a value is unknown, or a patient is in two of its splits.
    """
    if "split" not in table.columns:
        raise DataError(
            'split = "official", but this data has no official split: give shares instead, '
            "such as split = [0.6, 0.15, 0.25]"
        )
    problems, roles = [], dict[str, str]()
    values = table.columns["split"]
    if unknown := sorted({v for v in values if v.lower() not in SPLITS}):
        problems.append(
            f"the column split contains {', '.join(map(repr, unknown[:3]))}: allowed are train, val and test"
        )
    else:
        twice = set()
        for patient, value in zip(table.patients, values, strict=True):
            if roles.setdefault(patient, SPLITS[value.lower()]) != SPLITS[value.lower()]:
                twice.add(patient)
        if twice:
            problems.append(
                f"{len(twice)} patients are in two of the official splits ({', '.join(sorted(twice)[:3])}): that leaks "
                "test patients into training. Correct the column, or give shares to split anew by patient"
            )
    if problems:
        raise DataError(problems)
    return roles
