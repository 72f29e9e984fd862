"""Faults of the split: a patient or an input in two roles, and validation results that test results contradict.

The identity of a run's data, ``data.safetensors``, holds for each example of the first split a hash of its input and
the number of its patient, by site and role. A run folder of another program may lack it; then the numbers of
validation and test patients are compared, unless every file numbers its patients from 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.undefined import Ints

IDENTITY = "data.safetensors"
_INPUT, _PATIENT = 1, 3  # columns


@dataclass(frozen=True)
class Leak:
    """Test examples that are not independent of training.

    Attributes:
        patients: Number of patients in test data and in training or validation data.
        inputs: Number of test examples whose input also occurs in training or validation data, byte for byte.
        examples: Number of test examples.
        sites: The sites of these test examples.
        nearly_equal: Number of test examples that nearly equal one of training or validation data, if the study
            searched for them.
    """

    patients: int
    inputs: int
    examples: int
    sites: tuple[str, ...]
    nearly_equal: int = 0


def leak(run: Run) -> Leak | None:
    """Return what test data share with training or validation data; None if nothing is known to be shared."""
    found = _by_identity(run.path / IDENTITY) or _by_numbers(run)
    near = run.info.data.near_duplicates
    tested = sum(s.examples.get("test", 0) for s in run.info.sites)
    found = found or Leak(0, 0, tested, ())
    sites = tuple(sorted({*found.sites, *near}))
    found = replace(found, nearly_equal=sum(near.values()), examples=found.examples or tested, sites=sites)
    return found if found.patients or found.inputs or found.nearly_equal else None


def _by_identity(file: Path) -> Leak | None:
    if not file.is_file():
        return None
    try:
        rows = {key.rpartition("/"): value for key, value in load_file(file).items()}
    except (SafetensorError, OSError, ValueError):
        return None
    tested = {site: value for (site, _, role), value in rows.items() if role == "test" and value.ndim == 2}
    seen = [value for (_, _, role), value in rows.items() if role not in ("test", "public") and value.ndim == 2]
    if not tested or not seen:
        return None
    known, asked = np.concatenate(seen), np.concatenate(list(tested.values()))
    ends = np.cumsum([len(value) for value in tested.values()])[:-1]  # all sites at once: each search sorts ``known``
    same = [np.split(np.isin(asked[:, c], known[:, c]), ends) for c in (_PATIENT, _INPUT)]
    shared = dict(zip(tested, zip(*same, strict=True), strict=True))
    patients = {int(i) for site, (again, _) in shared.items() for i in tested[site][again, _PATIENT]}
    return Leak(
        len(patients),
        sum(int(inputs.sum()) for _, inputs in shared.values()),
        sum(map(len, tested.values())),
        tuple(sorted(site for site, found in shared.items() if any(again.any() for again in found))),
    )


def _by_numbers(run: Run) -> Leak | None:
    """Compare the numbers of validation and test patients of the same seed at the same site."""
    patients, sites, examples = set[tuple[str, int]](), set[str](), 0
    for key, of_site in run.validation.items():
        for site, validation in of_site.items():
            tested = run.arms.get(key, {}).get(site)
            if tested is None or (_from_zero(validation.patient) and _from_zero(tested.patient)):
                continue
            both = np.intersect1d(validation.patient, tested.patient)
            patients |= {(site, int(i)) for i in both}
            examples = max(examples, len(tested))
            sites |= {site} if len(both) else set()
    return Leak(len(patients), 0, examples, tuple(sorted(sites)))


def _from_zero(numbers: Ints) -> bool:
    distinct = np.unique(numbers)
    return bool(np.array_equal(distinct, np.arange(len(distinct))))


@dataclass(frozen=True)
class Disagreement:
    """A validation result that the test result contradicts; ``low`` and ``high`` are limits of the difference."""

    validation: Estimate
    test: Estimate
    low: float
    high: float


def disagreement(run: Run, label: str, test: Estimate, metric: Metric, level: float, unit: str) -> Disagreement | None:
    """Compare the mean over training sites on validation patients with that on test patients.

    The patients are different, so the limits of the difference combine those of both (Zou and Donner, Statistics in
    Medicine 2008). If seeds have splits of their own, some validation patients are test patients of another seed, which
    makes the two means more alike than this assumes; the comparison is then conservative.

    Returns:
        The results if the interval of their difference excludes 0; otherwise, or without validation predictions, None.
    """
    arms = {key: sites for key, sites in run.validation.items() if key[0] == label and sites}
    if not arms or test.value is None or test.low is None or test.high is None:
        return None
    data = sample(replace(run, arms=arms, splits={}), level, unit)
    sites = [s for s in training_sites(run) if data.has(label, [s])]
    validation = data.macro_estimate(label, sites, metric) if sites else Estimate(None)
    if validation.value is None or validation.low is None or validation.high is None:
        return None
    gap = validation.value - test.value
    low = gap - float(np.hypot(validation.value - validation.low, test.high - test.value))
    high = gap + float(np.hypot(validation.high - validation.value, test.value - test.low))
    return Disagreement(validation, test, low, high) if low > 0 or high < 0 else None


def uneven_classes(run: Run, data: Sample, label: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the training sites whose test patients lack a class, with the names of these classes."""
    if run.info.task != "classification" or len(run.info.classes) < 3:
        return
    for site in training_sites(run):
        seeds = [s for s in data.seeds(label) if site in data.cases[label, s]]
        present = {int(k) for s in seeds for k in np.unique(data.cases[label, s][site].target)}
        missing = tuple(name for k, name in enumerate(run.info.classes) if k not in present)
        if seeds and missing:
            yield site, missing
