"""The draws behind intervals: what a site with hardly any patients of one class does to a mean over sites."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from polyclinic.evaluation.bootstrap import sample
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.run_reader import read_run
from tests.support.synthetic_run import write_run

AUC = metrics_for("classification", 2)["auc"]
# Two of 24 patients are healthy, so one draw in eight leaves this site without a healthy one.
LOPSIDED = {f"site-{i}": ("training", 24, 22.5 / 24, 0.0, 0.0) for i in range(8)}


def drawn(folder, sites, seeds=(0,)):
    return sample(read_run(write_run(folder, sites=sites, methods=("fedavg", "fedprox"), seeds=seeds)), 2000, 0, 0.95)


def test_a_mean_over_many_lopsided_sites_has_an_interval(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", LOPSIDED)
    each = [data.draws("fedavg", [s], AUC)[0] for s in LOPSIDED]
    together = np.isfinite(each).all(axis=0).mean()
    assert together < 0.5 < min(np.isfinite(d).mean() for d in each)  # few draws are defined at all sites at once
    found = data.macro_estimate("fedavg", list(LOPSIDED), AUC)
    assert found.low < found.value < found.high
    assert np.isclose(found.value, np.mean([d[0] for d in each]))


def test_it_is_the_interval_of_the_draws_that_are_defined_everywhere(tmp_path: Path) -> None:
    """Sites are drawn independently, so leaving draws out site by site is leaving whole draws out, with more of them."""
    names = list(LOPSIDED)
    data = drawn(tmp_path / "r", LOPSIDED)
    whole = np.mean([data.draws("fedavg", [s], AUC)[0, 1:] for s in names], axis=0)
    filled = data.macro("fedavg", names, AUC)[0, 1:]
    kept = np.isfinite(whole)
    assert np.array_equal(filled[kept], whole[kept])
    for q in (0.025, 0.5, 0.975):
        assert abs(np.quantile(filled, q) - np.quantile(whole[kept], q)) < 0.01


def test_methods_stay_paired_and_seeds_too(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", LOPSIDED, seeds=(0, 1))
    cases = {(m, seed): data.cases["fedavg", seed] for m in ("fedavg", "fedprox") for seed in (0, 1)}
    twins = replace(data, cases=cases)
    assert not twins.paired("fedprox", "fedavg", list(LOPSIDED), AUC).any()


def test_where_most_draws_of_a_site_say_nothing_there_is_no_interval(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", LOPSIDED)
    here, case = ("site-0", 0), data.cases["fedavg", 0]["site-0"]
    mine = data.weights[here].copy()
    mine[1:1200, np.isin(data.patients[here], case.patient[case.target == 0])] = 0  # no healthy patient was drawn
    found = replace(data, weights={**data.weights, here: mine}).macro_estimate("fedavg", list(LOPSIDED), AUC)
    assert found.value is not None
    assert found.low is None
    assert "too few patients" in found.why
