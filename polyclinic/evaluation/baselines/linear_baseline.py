"""The linear baselines, and methods that are not above them.

A network, and federating it, must be better than what a hospital has without either: a regularized linear model of its
own patients. The second baseline is the same model of all sites' patients in one place. They are fitted by simulated
runs of tables (``studies.run.linear_baselines``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from polyclinic.evaluation.baselines.constant_baseline import Fault
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.method_runs import LINEAR_LOCAL, LINEAR_POOLED
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import Sample
from polyclinic.statistics.paired_tests import WORSE

_WHERE = {LINEAR_LOCAL: "fitted at each site alone", LINEAR_POOLED: "fitted to all sites' data in one place"}
SAME = 1e-9
"""Difference up to which two results are equal."""


def with_linear(run: Run) -> Run:
    """Return the run with the predictions of its linear baselines as further methods."""
    taken = {m.label for m in run.info.methods}
    known = {key: sites for key, sites in run.linear.items() if sites and key[0] not in taken}
    return replace(run, arms={**run.arms, **known})


def linear_labels(run: Run) -> tuple[str, ...]:
    """Return the labels of the linear baselines that the run has predictions of."""
    return tuple(dict.fromkeys(label for (label, _), sites in run.linear.items() if sites))


def below_linear(run: Run, data: Sample, labels: Sequence[str], metric: Metric) -> Iterator[Fault]:
    """Yield the methods with a worse mean of ``metric`` over training sites than a linear baseline.

    Local training is compared with the baseline of each site alone, other methods with both. A difference that is shown
    weighs as much as one from the constant.
    """
    for label in labels:
        baseline = next((m.baseline and m.name == "local" for m in run.info.methods if m.label == label), False)
        found, shown = list[str](), False
        for linear in linear_labels(run):
            if baseline and linear == LINEAR_POOLED:
                continue
            both = [
                s
                for s in training_sites(run)
                if all(data.has(m, [s]) and data.defined(m, data.seeds(m), [s], metric) for m in (label, linear))
            ]
            if not both:
                continue
            ours, theirs = (float(data.by_seed(m, both, metric).mean()) for m in (label, linear))
            if metric.sign * (ours - theirs) < -SAME:
                verdict = data.difference(label, linear, both, metric).verdict()
                shown = shown or verdict == WORSE
                found.append(f"{ours:.3f} against {theirs:.3f} of one {_WHERE[linear]} ({verdict})")
        if found:
            text = f"has a worse {metric.label} than a regularized linear model, mean over sites: {'; '.join(found)}"
            yield Fault(label, 4 if shown else 2, text)
