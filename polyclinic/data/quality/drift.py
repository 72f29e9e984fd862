"""Data drift between a plan's training data and new data, computed from sums at the site that has the new data.

Each column of the plan is divided into groups of about equally many training values; the new values are counted in the
same groups. Both distributions are compared in two ways, and only if both indicate a change is it reported as drift:

* the population stability index ``Σ (q − p) ln(q / p)``, with its customary thresholds of 0.1 (look) and 0.25 (moved):
  Siddiqi, "Credit Risk Scorecards", Wiley 2006, chapter 6;
* Pearson's χ² test of two samples, with patients (not images) as the number of observations, and Holm's correction over
  all columns and the classes: Holm, Scandinavian Journal of Statistics 6:65 (1979).

It does not show whether the model's performance declined: that requires labels, and `polyclinic report` of a study on
the new data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.examples import DataError
from polyclinic.data.fingerprint.dataset_fingerprint import Measured
from polyclinic.data.fingerprint.preprocessing_plan import Column, DataPlan, Reference
from polyclinic.statistics.multiple_tests import holm

FEWEST = 10
LOOK, MOVED = 0.1, 0.25
LEVEL = 0.01


@dataclass(frozen=True)
class Moved:
    """Distance of one column (or the classes) from the plan's.

    Attributes:
        name: Name of the column.
        index: Population stability index.
        p: p-value of so large a difference without drift, corrected for the number of columns.
        before: Mean in the plan; for ``classes`` the share of the class that changed most.
        now: The same in the new data.
    """

    name: str
    index: float
    p: float
    before: float
    now: float

    @property
    def level(self) -> str:
        """``"moved"``, ``"look"`` or ``"as before"``."""
        if self.p >= LEVEL or self.index < LOOK:
            return "as before"
        return "moved" if self.index >= MOVED else "look"


@dataclass(frozen=True)
class SiteDrift:
    """Result at one site.

    Attributes:
        site: Name of the site.
        patients: Number of patients in the new data.
        against: Reference training data: the site's own, or all sites'.
        found: The columns and the classes, largest change first.
        uncompared: Columns that cannot be compared because all values were equal or too few.
    """

    site: str
    patients: int
    against: str
    found: tuple[Moved, ...]
    uncompared: tuple[str, ...] = ()

    @property
    def alarm(self) -> bool:
        """Whether anything moved."""
        return any(one.level == "moved" for one in self.found)


def drift(plan: DataPlan, site: str, new: Measured, classes: Sequence[str]) -> SiteDrift:
    """Compare a site's new data with its own training data if the plan has them, otherwise with all sites'.

    Args:
        plan: Summary of the training data.
        site: The site's name.
        new: Its new data; if labels are unknown, classes are not compared.
        classes: The names of the classes.

    Raises:
        DataError: If there are too few patients, or the data have other columns.
    """
    patients = len(set(new.patients))
    if patients < FEWEST:
        raise DataError(
            f"{site} has {patients} patients: at least {FEWEST} are needed, so that no individual can be identified"
        )
    reference = plan.sites.get(site, plan.everywhere)
    if lacking := [name for name in reference.columns if name not in new.names and not _sometimes(name)]:
        raise DataError(f"{site} has no {', '.join(lacking[:3])}, which the plan describes: give data of the same kind")
    where = {name: i for i, name in enumerate(new.names)}
    present = {name: new.rows[:, where[name]] for name in reference.columns if name in where}
    indicators = {f"{name} is missing" for name in present}  # missing values are compared with their column
    present = {name: values for name, values in present.items() if name not in indicators}
    compared = [
        n for n, values in present.items() if reference.columns[n].cuts or _missing(reference.columns[n], values)
    ]
    raw = [_column(reference, name, present[name], patients) for name in compared]
    if labels := _classes(reference, new, classes, patients):
        raw.append(labels)
    corrected = holm([one.p for one in raw])
    found = [Moved(one.name, one.index, p, one.before, one.now) for one, p in zip(raw, corrected, strict=True)]
    found.sort(key=lambda one: (one.level == "as before", -one.index, one.name))
    others = tuple(name for name in present if name not in compared)
    whose = "its own {} training patients" if site in plan.sites else "the {} training patients of all sites"
    return SiteDrift(site, patients, whose.format(reference.patients), tuple(found), others)


def _sometimes(name: str) -> bool:
    """Return whether a table has this column only if something is missing or some value occurs."""
    return " = " in name or name.endswith((" is missing", "of the foreground"))


def _missing(column: Column, values: Tensor) -> bool:
    return bool(column.missing) or not bool(values.isfinite().all())


def _column(reference: Reference, name: str, values: Tensor, patients: int) -> Moved:
    column, known = reference.columns[name], values[values.isfinite()].numpy()
    now = np.bincount(np.searchsorted(column.cuts, known), minlength=len(column.cuts) + 1) / max(len(values), 1)
    gone = 1 - len(known) / max(len(values), 1)
    before = np.array([share * (1 - column.missing) for share in column.shares or (1.0,)])
    index, p = _compare(np.append(before, column.missing), np.append(now, gone), reference.patients, patients)
    return Moved(name, index, p, column.mean, float(known.mean()) if len(known) else math.nan)


def _classes(reference: Reference, new: Measured, names: Sequence[str], patients: int) -> Moved | None:
    """Compare the classes, if known; not for masks, whose pixels are not independent observations."""
    total = sum(reference.classes.values())
    if not total or new.targets.ndim != 1 or bool((new.targets < 0).any()) or set(names) - set(reference.classes):
        return None
    counts = np.bincount(new.targets.numpy(), minlength=len(names))[: len(names)]
    before = np.array([reference.classes[name] / total for name in names])
    now = counts / max(counts.sum(), 1)
    index, p = _compare(before, now, reference.patients, patients)
    most = int(np.argmax(np.abs(now - before)))
    return Moved(f"share of {names[most]}", index, p, float(before[most]), float(now[most]))


def _compare(
    p: "np.ndarray[tuple[int], np.dtype[np.float64]]", q: "np.ndarray[tuple[int], np.dtype[np.float64]]", m: int, n: int
) -> tuple[float, float]:
    """Return the stability index and Pearson's p of shares ``p`` of ``m`` patients and ``q`` of ``n``."""
    kept = (p > 0) | (q > 0)
    p, q = p[kept], q[kept]
    if len(p) < 2:
        return 0.0, 1.0
    soft_p, soft_q = (p * m + 0.5) / (m + 0.5 * len(p)), (q * n + 0.5) / (n + 0.5 * len(q))
    index = float(((soft_q - soft_p) * np.log(soft_q / soft_p)).sum())
    pooled = (p * m + q * n) / (m + n)
    square = float((m * n / (m + n) * (p - q) ** 2 / pooled).sum())  # χ² of two samples
    half = torch.tensor([(len(p) - 1) / 2, square / 2], dtype=torch.float64)
    return index, float(torch.special.gammaincc(half[0], half[1]))


def lines(found: SiteDrift) -> list[str]:
    """Return the report, most important lines first. Numbers are of the whole site, not of individual patients."""
    head = f"{found.site}: {found.patients} patients, against {found.against}"
    changed = [one for one in found.found if one.level != "as before"]
    calm = "as before" if found.found else "nothing could be compared"
    says = "ALARM: the data have drifted" if found.alarm else "inspect this" if changed else calm
    body = [
        f"  {'x' if one.level == 'moved' else '!'} {one.name:<40} {_number(one.before):>10} -> {_number(one.now):<10} "
        f"index {one.index:.2f}, p {'< 0.0001' if one.p < 1e-4 else f'{one.p:.4f}'}"
        for one in changed
    ]
    rest = f"  - {len(found.found) - len(changed)} more compared and as before"
    rest += f"; {len(found.uncompared)} not compared (no spread, or too few)" if found.uncompared else ""
    return [f"{head}: {says}", *body, rest]


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4g}"


def as_json(found: SiteDrift) -> Mapping[str, object]:
    """Return the result for other programs."""
    columns = [
        {**vars(one), "now": None if math.isnan(one.now) else one.now, "level": one.level} for one in found.found
    ]
    return {
        "site": found.site,
        "patients": found.patients,
        "against": found.against,
        "alarm": found.alarm,
        "found": columns,
        "uncompared": list(found.uncompared),
    }
