"""Comparison of the methods of one run with a reference method, by the tests that apply."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import Sample, by_fold
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference, Ranking, corrected_t, rank_methods, signed_ranks
from polyclinic.statistics.undefined import Undefined


@dataclass(frozen=True)
class Declared:
    """The result of a comparison that the study declared before the run.

    Attributes:
        method: The label of the method.
        reference: The label of the method that it is compared with.
        difference: Method minus reference, mean over training sites, corrected for the number of declared comparisons.
        without: Training sites at which one of them was not tested.
    """

    method: str
    reference: str
    difference: Difference
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Against:
    """Methods compared with a reference, on the training sites at which both were tested.

    Attributes:
        run: The run.
        data: Its test cases.
        methods: The labels of the other methods.
        reference: The label of the reference; empty for none.
    """

    run: Run
    data: Sample
    methods: Sequence[str]
    reference: str

    def _sites(self) -> Iterator[tuple[str, list[str]]]:
        if not self.reference:
            return
        for label in self.methods:
            both = [s for s in training_sites(self.run) if self.data.has(label, [s])]
            yield label, [s for s in both if self.data.has(self.reference, [s])]

    def _seeds(self, label: str) -> set[int]:
        return set(self.data.seeds(label)) & set(self.data.seeds(self.reference))

    def holm_corrected(self, metric: Metric) -> dict[str, Difference]:
        """Return the paired differences of all methods, which are one family for Holm's correction."""
        found = {m: self.data.difference(m, self.reference, sites, metric) for m, sites in self._sites()}
        asked = [k for k, d in found.items() if d.p is not None]
        for k, p in zip(asked, holm([found[k].p or 0.0 for k in asked]), strict=True):
            found[k] = replace(found[k], adjusted=p)
        return found

    def declared(self, metric: Metric) -> tuple[Declared, ...]:
        """Return the comparisons that the study declared, which are a family of their own for Holm's correction."""
        found = []
        for c in self.run.info.compare:
            sites = [s for s in training_sites(self.run) if all(self.data.has(m, [s]) for m in (c.method, c.reference))]
            d = self.data.difference(c.method, c.reference, sites, metric, c.kind, c.margin)
            left = tuple(s for s in training_sites(self.run) if s not in sites)
            found.append(Declared(c.method, c.reference, d, left))
        asked = [i for i, one in enumerate(found) if one.difference.p is not None]
        # A one-sided p is compared with half of the level of a two-sided one.
        scale = {i: 2.0 if found[i].difference.margin is not None else 1.0 for i in asked}
        adjusted = holm([min(1.0, scale[i] * (found[i].difference.p or 0.0)) for i in asked])
        for i, p in zip(asked, adjusted, strict=True):
            found[i] = replace(found[i], difference=replace(found[i].difference, adjusted=p / scale[i]))
        return tuple(found)

    def over_splits(self, metric: Metric) -> dict[str, Difference]:
        """Return the corrected t-tests over at least three splits: folds, or seeds with different splits."""
        found: dict[str, Difference] = {}
        if not self.run.splits and self.data.one_split:
            return found
        by_split = by_fold(self.run, self.data.level) if self.run.splits else self.data
        for label, sites in self._sites():
            here = [s for s in self.run.info.sites if s.name in sites]
            test, train = (sum(s.patients.get(r, 0) for s in here) for r in ("test", "train"))
            if self.run.splits:  # a fold tests 1/folds of the patients, or of the sites
                test = test // self.run.info.folds
                train = train - test if self.run.info.folds_by == "sites" else train
            each = by_split.by_split(label, self.reference, sites, metric)
            if test and train > 0 and len(each) >= 3:
                found[label] = corrected_t(each, test, train, self.data.level)
        return found

    def over_sites(self, metric: Metric) -> dict[str, Difference]:
        """Return signed-rank tests over sites, if at least six sites differ."""
        found: dict[str, Difference] = {}
        for label, sites in self._sites():
            if self._seeds(label):
                each = [
                    float(np.mean(self.data.by_split(label, self.reference, [s], metric) or [np.nan])) for s in sites
                ]
                with suppress(Undefined):
                    found[label] = signed_ranks([d for d in each if np.isfinite(d)])
        return found


def ranked(methods: Sequence[str], by_site: Sequence[Sequence[float | None]], metric: Metric) -> Ranking | None:
    """Return mean ranks over the sites at which every method has a value; None if too few sites or methods remain."""
    rows = [row for row in by_site if all(v is not None for v in row)]
    try:
        values = np.array(rows, float).reshape(len(rows), len(methods))
        return rank_methods(methods, values, metric.higher_is_better is not False)
    except Undefined:
        return None
