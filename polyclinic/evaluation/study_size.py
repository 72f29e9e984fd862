"""The size of a study that would show a difference, non-inferiority or equivalence: variances from a pilot run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.run_reader import read_run, training_sites
from polyclinic.evaluation.sample import sample
from polyclinic.statistics.jackknife import Spread
from polyclinic.statistics.paired_tests import Question
from polyclinic.statistics.power import Design, by_patient, patients_for, power_of, upper_sd
from polyclinic.statistics.undefined import Undefined

FEWEST_PATIENTS = 20
"""Test patients that a pilot needs at least."""


@dataclass(frozen=True)
class Pilot:
    """The variation of the difference between two methods in a pilot run.

    Attributes:
        metric: The primary metric.
        sites: Number of sites.
        patients: Number of test patients.
        seeds: Number of seeds.
        sd: Standard deviation of one patient's difference (of its pseudo-value), over sites.
        planned_sd: Its upper 80 % confidence limit, with which the study is planned.
        seed_sd: Standard deviation of the difference between seeds; None with one seed.
        planned_seed_sd: Its upper 80 % confidence limit; 0 with one seed.
    """

    metric: str
    sites: int
    patients: int
    seeds: int
    sd: float
    planned_sd: float
    seed_sd: float | None
    planned_seed_sd: float


def pilot(run_folder: Path, method: str = "", reference: str = "") -> Pilot:
    """Return the variation of the difference between two methods of a run.

    Args:
        run_folder: The run.
        method: The label of the method; by default the first that is not the reference.
        reference: The label of the other method; by default FedAvg or the first method.

    Raises:
        NotARun: If the folder is not a run.
        ConfigError: If the run lacks these methods, or has too few patients.
    """
    run = read_run(run_folder)
    metric = metrics_of(run.info)[run.info.metric]
    data = sample(run, 0.95)
    labels = [m.label for m in run.info.methods if data.seeds(m.label)]
    reference = reference or next((k for k in ("fedavg", *labels) if k in labels), "")
    method = method or next((k for k in labels if k != reference), "")
    listed = ", ".join(labels) or "none"
    wanted = dict.fromkeys((method, reference))
    problems = [f'{run_folder}: no tested method "{k}". There are: {listed}' for k in wanted if k not in labels]
    if not problems and method == reference:
        problems.append(f"{run_folder}: --method and --reference are both {method}; give two methods")
    if problems:
        raise ConfigError("\n".join(problems))
    sites = [s for s in training_sites(run) if data.has(method, [s]) and data.has(reference, [s])]
    try:
        spreads = data.difference_spreads(method, reference, sites, metric)
    except Undefined as reason:
        says = f"the pilot does not determine the variation of {metric.label}: {reason}"
        raise ConfigError(f"{run_folder}: {says}") from None
    counts = {s: data.count(s)[0] for s in spreads}
    if sum(counts.values()) < FEWEST_PATIENTS:
        raise ConfigError(
            f"{run_folder}: {sum(counts.values())} test patients are too few for a pilot; {FEWEST_PATIENTS} are needed"
        )
    # The variance of one patient's difference, so that a site with n patients has 1/n of it; weighted by patients.
    sd = float(np.sqrt(sum(counts[s] ** 2 * v.variance for s, v in spreads.items()) / sum(counts.values())))
    df = sum(v.df for v in spreads.values())
    values = np.array(data.by_split(method, reference, list(spreads), metric))
    between = float(values.std(ddof=1)) if len(values) > 1 else None
    return Pilot(
        metric.name,
        len(spreads),
        sum(counts.values()),
        len(values),
        sd,
        upper_sd(sd, df),
        between,
        upper_sd(between, len(values) - 1.0) if between else 0.0,
    )


@dataclass(frozen=True)
class Size:
    """A design that has the wanted power.

    Attributes:
        sites: Number of sites.
        patients_per_site: Test patients at each site; None if no number suffices.
        patients: Test patients in all.
        power: The power with this number.
        why: Reason why no number suffices.
    """

    sites: int
    patients_per_site: int | None
    patients: int | None = None
    power: float | None = None
    why: str = ""


def sizes(
    variance: Callable[[int], Spread],
    question: Question,
    difference: float,
    margin: float | None,
    sites: Sequence[int],
    seeds: int,
    seed_sd: float,
    power: float,
) -> tuple[Size, ...]:
    """Return the number of test patients for each number of sites."""
    design, found = Design(question, difference, margin, 1, seeds, seed_sd), []
    for k in sites:
        one = replace(design, sites=k)
        try:
            n = patients_for(one, variance, power)
        except Undefined as reason:
            found.append(Size(k, None, why=str(reason)))
            continue
        found.append(Size(k, n, k * n, power_of(one, variance(n))))
    return tuple(found)


def of_pilot(found: Pilot) -> Callable[[int], Spread]:
    """Return the variance of the difference at a site with n patients, as planned from a pilot."""
    return by_patient(found.planned_sd)
