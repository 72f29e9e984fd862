"""The constant baseline, and faults of methods that it shows.

The constant predicts the same for every patient of a site: the class frequencies of the site's training data (of all
training sites together for an external site), the median true value or the survival curve (Kaplan and Meier) of its
validation patients, or an empty mask. A
method that scores below it has learned nothing of use. Nothing of the constant depends on test data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import Sample
from polyclinic.evaluation.survival_metrics import times_of
from polyclinic.statistics.survival import survival_curve
from polyclinic.statistics.undefined import Array

CONSTANT = "constant"
SAME = 1e-4
"""Range of a method's scores below which it is constant."""


@dataclass(frozen=True)
class Fault:
    """A fault of a method: the method's label, how severe it is, and the statement."""

    method: str
    weight: int
    text: str


def with_constant(run: Run) -> Run:
    """Return the run with the constant's predictions as a further method, if the records determine them."""
    if any(m.label == CONSTANT for m in run.info.methods):
        return run
    arms = {}
    for seed in dict.fromkeys(seed for _, seed in run.arms):
        tested: dict[str, Predictions] = {}
        for (_, s), sites in run.arms.items():
            if s == seed:
                tested = {**sites, **tested}
        found = {site: _constant(run, seed, site, p) for site, p in tested.items()}
        known = {site: p for site, p in found.items() if p is not None}
        if len(known) < len(found) or not known:
            return run
        arms[CONSTANT, seed] = known
    return replace(run, arms={**run.arms, **arms})


def _constant(run: Run, seed: int, site: str, p: Predictions) -> Predictions | None:
    """Return the constant's predictions for the examples of ``p``; None if the records do not determine them."""
    if run.info.task == "segmentation":
        return _empty(p)
    if p.score is None or p.target is None:
        return None
    if run.info.task == "regression":
        guess = _middle(run, seed, site)
    elif run.info.task == "survival":
        guess = _survival(run, seed, site, p.score.shape[1])
    else:
        guess = _frequencies(run, site, p.score.shape[1])
    if guess is None:
        return None
    return Predictions(p.patient, np.tile(guess, (len(p), 1)), p.target)


def _empty(p: Predictions) -> Predictions | None:
    """Return the empty masks for the images of ``p``: Dice 0, and nothing to compare if the truth is empty too."""
    if "dice" not in p.cases:
        return None
    cases = {"dice": np.zeros_like(p.cases["dice"])}
    if "blank" in p.cases:
        blank = p.cases["blank"].astype(bool)
        cases |= {"dice": blank.astype(float), "absent": blank.astype(float)}
    if "sliced" in p.cases:
        none = np.zeros_like(p.cases["reference"])
        cases |= {"sliced": p.cases["sliced"], "reference": p.cases["reference"], "predicted": none, "overlap": none}
    return Predictions(p.patient, cases=cases)


def _frequencies(run: Run, site: str, classes: int) -> Array | None:
    own = [s for s in run.info.sites if s.name == site and s.role == "training"]
    sites = own or [s for s in run.info.sites if s.role == "training"]
    counts = np.array([s.classes.get("train", ()) for s in sites if len(s.classes.get("train", ())) == classes], float)
    if len(counts) < len(sites):
        return None
    if run.info.task == "multilabel":
        total = float(sum(s.examples.get("train", 0) for s in sites))
        return np.clip(counts.sum(0) / total, 0, 1) if total else None
    return counts.sum(0) / counts.sum() if counts.sum() else None


def _validation_targets(run: Run, seed: int, site: str) -> Array | None:
    """Return the targets of a site's validation examples, of all sites' for an external site; None without any."""
    for (_, s), sites in run.validation.items():
        mine = [p for name, p in sites.items() if name == site] or list(sites.values())
        if s == seed and mine:
            return np.concatenate([np.asarray(p.target, float) for p in mine])
    return None


def _middle(run: Run, seed: int, site: str) -> Array | None:
    targets = _validation_targets(run, seed, site)
    return None if targets is None else np.asarray(np.median(targets, axis=0))


def _survival(run: Run, seed: int, site: str, outputs: int) -> Array | None:
    """Return Kaplan and Meier's curve, constant after the last observation; 0 if the score is only an order."""
    targets = _validation_targets(run, seed, site)
    if targets is None:
        return None
    if outputs == 1:
        return np.zeros(1)
    curve = survival_curve(targets[:, 0], targets[:, 1], np.ones((1, len(targets))), times_of(targets))[0]
    return np.minimum.accumulate(np.nan_to_num(curve, nan=1.0))


def faults(
    run: Run, data: Sample, labels: Sequence[str], table: Mapping[str, Metric], primary: Metric
) -> tuple[Fault, ...]:
    """Return the faults of methods on the test patients of the training sites, in the order of methods."""
    found = list[Fault]()
    for label in labels:
        sites = [s for s in training_sites(run) if data.has(label, [s])]
        if sites:
            found += _missing(run, label, sites, primary)
            found += _outputs(run, label, sites)
            found += _below(data, label, sites, table, primary)
    return tuple(found)


def _missing(run: Run, label: str, sites: Sequence[str], primary: Metric) -> Iterator[Fault]:
    """Return whether per-case values of the primary metric are not numbers, although a class is present."""
    missing, total = dict[str, int](), 0
    for key in [key for key in run.arms if key[0] == label]:
        for site, p in ((s, run.arms[key][s]) for s in sites if s in run.arms[key]):
            if primary.name in p.cases:
                absent = np.asarray(p.cases.get("absent", np.zeros(1))).astype(bool)
                bad = (np.isnan(p.cases[primary.name]) & ~absent).any(1)
                missing[site] = missing.get(site, 0) + int(bad.sum())
                total += len(p)
    if sum(missing.values()):
        where = ", ".join(f"{site} {n}" for site, n in missing.items() if n)
        text = (
            f"has no {primary.label} for {sum(missing.values())} of {total} test images ({where}), which are left out"
        )
        yield Fault(label, 6, text)


def _outputs(run: Run, label: str, sites: Sequence[str]) -> Iterator[Fault]:
    """Return whether a method's outputs are constant, or omit a class."""
    arms = [run.arms[key][s] for key in run.arms if key[0] == label for s in sites if s in run.arms[key]]
    scores = [p.score for p in arms if p.score is not None and len(p)]
    if not scores:
        return
    if all(len(s) > 1 and float(np.ptp(s, axis=0).max()) < SAME for s in scores):
        yield Fault(label, 5, "predicts the same for every patient of a site")
        return
    if run.info.task != "classification":
        return
    every = np.concatenate(scores)
    truth = np.concatenate([np.asarray(p.target) for p in arms if p.score is not None and len(p)])
    missing = sorted(set(np.unique(truth).tolist()) - set(np.argmax(every, axis=1).tolist()))
    if missing:
        names = [run.info.classes[k] if k < len(run.info.classes) else str(k) for k in missing]
        yield Fault(label, 4, f"never predicts {' or '.join(names)}")


def compared(table: Mapping[str, Metric], primary: Metric) -> dict[str, Metric]:
    """Return the metrics of a task by which methods are compared with the constant, the primary one first."""
    return {name: table[name] for name in dict.fromkeys([primary.name, "brier", "ibs", "accuracy"]) if name in table}


def _below(
    data: Sample, label: str, sites: Sequence[str], table: Mapping[str, Metric], primary: Metric
) -> Iterator[Fault]:
    """Return the metrics by which a method is below the constant, the primary one first."""
    if not data.has(CONSTANT, sites):
        return
    for metric in compared(table, primary).values():
        both = [s for s in sites if all(data.defined(m, data.seeds(m), [s], metric) for m in (label, CONSTANT))]
        if not both:
            continue
        ours, theirs = (float(data.by_seed(m, both, metric).mean()) for m in (label, CONSTANT))
        if metric.sign * (ours - theirs) < -1e-9:
            verdict = data.difference(label, CONSTANT, both, metric).verdict()
            kind = {"brier": "the base rate", "ibs": "the Kaplan-Meier curve"}.get(metric.name, "a constant prediction")
            text = (
                f"has a worse {metric.label} than {kind}: {ours:.3f} against {theirs:.3f}, mean over sites ({verdict})"
            )
            yield Fault(label, 4 if metric is primary or metric.name in ("brier", "ibs") else 3, text)
