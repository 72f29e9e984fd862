"""The level of verdicts and the coverage of intervals, by simulation; and that what is simulated is the product."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.predictions import Cases
from polyclinic.evaluation.sample import Sample

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import coverage as sim

TASKS = {"auc": "classification", "accuracy": "classification", "dice": "segmentation", "mae": "regression"}


def as_sample(trial: sim.Trial) -> Sample:
    """Return the first repetition as a run's cases."""
    _, sites, seeds, n = trial.scores[0].shape
    ids, cases = np.arange(n), dict[tuple[str, int], dict[str, Cases]]()
    target = (ids < trial.positives).astype(np.int64)
    for method, x in zip("ab", trial.scores, strict=True):
        for seed in range(seeds):
            cases[method, seed] = {}
            for site in range(sites):
                one = x[0, site, seed]
                if trial.metric == "dice":
                    case = Cases(ids, np.zeros((n, 1)), ids * 0, {"dice": one[:, None]}, n)
                elif trial.metric == "mae":
                    case = Cases(ids, one[:, None], np.zeros((n, 1)), {}, n)
                else:
                    p = 1 / (1 + np.exp(-one))
                    case = Cases(ids, np.stack([1 - p, p], 1), target, {}, n)
                cases[method, seed][f"s{site}"] = case
    tested = {(f"s{site}", seed): ids for site in range(sites) for seed in range(seeds)}
    return Sample(cases, tested, True, 0.95, {f"s{site}": (n, n) for site in range(sites)})


def same(found: float | None, p: float) -> bool:
    """Return whether p is equal, or no test was made in both."""
    return found == pytest.approx(p, rel=1e-4) if np.isfinite(p) else found in (None, 1.0)


@pytest.mark.parametrize("metric", list(TASKS))
@pytest.mark.parametrize(("n", "seeds"), [(5, 1), (12, 3), (30, 2)])
def test_the_simulated_formulas_are_the_products(metric: str, n: int, seeds: int) -> None:
    trial = sim.simulate(metric, n, seeds, 3, 1, np.random.default_rng(n))
    data, m = as_sample(trial), metrics_for(TASKS[metric])[metric]
    names = ["s0", "s1", "s2"]
    mean, low, high = (float(x[0]) for x in sim.mean_limits(trial))
    ours = data.macro_estimate("a", names, m)
    assert (ours.value, ours.low, ours.high) == pytest.approx((mean, low, high), rel=1e-5)
    for k, site in enumerate(names):
        value, low, high = (float(x[0, k]) for x in sim.site_limits(trial))
        e = data.estimate("a", [site], m, True)
        assert (e.value, e.low, e.high) == pytest.approx((value, low, high), rel=1e-5)
        p = float(sim.p_values(trial, slice(k, k + 1))[0])
        assert same(data.difference("a", "b", [site], m).p, p)
    assert same(data.difference("a", "b", names, m).p, float(sim.p_values(trial, slice(None))[0]))


@pytest.mark.parametrize("metric", list(TASKS))
@pytest.mark.parametrize(("n", "seeds", "sites"), [(5, 1, 8), (10, 1, 3), (20, 3, 3)])
def test_verdicts_keep_their_level_and_intervals_cover(metric: str, n: int, seeds: int, sites: int) -> None:
    """Within three standard errors of 6 % and of 93 %, at 800 repetitions."""
    over, here, mean, site = sim.cell(metric, n, seeds, sites, 800, seed=1)
    assert over < 0.06 + 3 * (0.06 * 0.94 / 800) ** 0.5
    assert here < 0.06 + 3 * (0.06 * 0.94 / 800) ** 0.5
    assert mean > 0.93 - 3 * (0.93 * 0.07 / 800) ** 0.5
    assert site > 0.93 - 3 * (0.93 * 0.07 / 800) ** 0.5


def test_intervals_of_a_skewed_error_cover_with_five_patients() -> None:
    """Without the degree of freedom that the log scale deducts, the coverage is 0.925."""
    assert sim.cell("mae", 5, 5, 3, 8000)[3] > 0.935


@pytest.mark.parametrize(("sites", "tau"), [(3, 0.3), (6, 0.3)])
def test_the_mean_of_sites_and_the_prediction_for_a_new_one_cover(sites: int, tau: float) -> None:
    mean, new, worst = sim.random_effects(sites, tau, 100)
    assert mean > 0.87
    assert new > 0.85
    assert worst > 0.87


@pytest.mark.parametrize("metric", list(TASKS))
@pytest.mark.parametrize(("n", "seeds", "sites"), [(10, 1, 3), (50, 3, 3)])
def test_non_inferiority_keeps_its_level_at_the_margin(metric: str, n: int, seeds: int, sites: int) -> None:
    assert sim.non_inferior(metric, n, seeds, sites, 800) < 0.04 + 3 * (0.04 * 0.96 / 800) ** 0.5


def test_simulated_non_inferiority_is_the_products() -> None:
    trial = sim.at_the_margin(sim.simulate("auc", 30, 2, 3, 1, np.random.default_rng(3)))
    value, se, free, _ = (x[0] for x in sim.tested(trial, slice(None)))
    data, auc = as_sample(trial), metrics_for("classification")["auc"]
    found = data.difference("a", "b", ["s0", "s1", "s2"], auc, "non-inferiority", 0.05)
    assert found.p == pytest.approx(stats.t.sf((value + 0.05) / se, free), rel=1e-6)
