"""Power and numbers of patients, against statsmodels and by simulation of the product's test."""

import numpy as np
import pytest
from scipy import stats

from polyclinic.statistics import power as pw
from polyclinic.statistics.jackknife import Jackknife, Spread, added
from polyclinic.statistics.paired_tests import Question, paired
from polyclinic.statistics.undefined import Array, Undefined


def verdicts(design: pw.Design, sd: float, n: int, repetitions: int = 600) -> Array:
    """Return the verdicts of simulated studies with normal differences."""
    rng, found = np.random.default_rng(n), []
    for _ in range(repetitions):
        sites = [design.difference + sd * rng.normal(size=n) for _ in range(design.sites)]
        parts = [Spread(float(d.var(ddof=1)) / n, n - 1.0) for d in sites]
        spread = added(parts, [1 / design.sites] * design.sites)
        mean = np.mean([d.mean() for d in sites])
        values = mean + (design.seed_sd * rng.normal(size=design.seeds) if design.seeds > 1 else 0)
        values = np.atleast_1d(values)
        d = paired(values, spread, n * design.sites, n * design.sites, 0.95, "", design.question, design.margin)
        found.append(d.verdict())
    return np.array(found)


def test_one_site_is_statsmodels_power_of_a_paired_t_test() -> None:
    """TTestPower().solve_power(0.2, power=0.8, alpha=0.05) is 198.15, and 50 pairs have a one-sided power of 0.283184 (0.15)."""
    design = pw.Design("difference", 0.2, None, 1)
    assert pw.patients_for(design, pw.by_patient(1.0), 0.8) == 199
    assert pw.power_of(design, pw.by_patient(1.0)(50)) == pytest.approx(0.283184, abs=1e-6)


@pytest.mark.parametrize(
    ("question", "difference", "margin", "wanted"),
    [
        ("difference", 0.03, None, "better"),
        ("difference", -0.03, None, "worse"),
        ("non-inferiority", 0.0, 0.03, "non-inferior"),
        ("non-inferiority", -0.01, 0.04, "non-inferior"),
        ("equivalence", 0.0, 0.03, "equivalent"),
    ],
)
@pytest.mark.parametrize(("sites", "seeds"), [(1, 1), (4, 1), (4, 5)])
def test_planned_studies_have_the_power_that_was_planned(
    question: Question, difference: float, margin: float | None, wanted: str, sites: int, seeds: int
) -> None:
    design = pw.Design(question, difference, margin, sites, seeds, 0.008 if seeds > 1 else 0.0)
    n = pw.patients_for(design, pw.by_patient(0.1), 0.8)
    assert np.mean(verdicts(design, 0.1, n) == wanted) == pytest.approx(0.8, abs=0.055)
    assert pw.power_of(design, pw.by_patient(0.1)(n - 1)) < 0.8 <= pw.power_of(design, pw.by_patient(0.1)(n))


def test_a_planned_study_of_two_aucs_has_its_power() -> None:
    """Two methods with AUC 0.90 and 0.85 and correlated scores."""
    rng, skills = np.random.default_rng(0), [2**0.5 * stats.norm.ppf(a) for a in (0.90, 0.85)]

    def values(n: int, repetitions: int) -> tuple[Array, Array, Array]:
        """Return both AUCs and the pseudo-values of their difference, for n patients, half of them positive."""
        common, m = rng.normal(size=(repetitions, n)), n // 2
        aucs, pseudo = [], []
        for skill in skills:
            x = 0.7**0.5 * common + 0.3**0.5 * rng.normal(size=(repetitions, n)) + skill * (np.arange(n) < m)
            wins = (x[:, :m, None] > x[:, None, m:]).astype(np.float32)
            auc = wins.mean((1, 2))
            without = np.concatenate(
                [
                    (wins.sum((1, 2))[:, None] - wins.sum(2)) / ((m - 1) * (n - m)),
                    (wins.sum((1, 2))[:, None] - wins.sum(1)) / (m * (n - m - 1)),
                ],
                1,
            )
            aucs.append(auc)
            pseudo.append(n * auc[:, None] - (n - 1) * without)
        return aucs[0], aucs[1], pseudo[0] - pseudo[1]

    a, b, _ = values(100, 1000)
    variance = pw.of_auc(0.875, float(np.corrcoef(a, b)[0, 1]), 0.5)
    n = pw.patients_for(pw.Design("difference", 0.05, None, 2), variance, 0.8)
    hits = 0
    (a1, b1, d1), (a2, b2, d2) = values(n, 300), values(n, 300)
    for i in range(300):
        parts = [
            Jackknife(float(d[i].mean()), (d[i].sum() - d[i]) / (n - 1), (np.arange(n) < n // 2).astype(np.int64))
            for d in (d1, d2)
        ]
        value = (a1[i] - b1[i] + a2[i] - b2[i]) / 2
        hits += paired(np.array([value]), added([p.spread() for p in parts], [0.5, 0.5]), n, n).verdict() == "better"
    assert hits / 300 == pytest.approx(0.8, abs=0.08)


def test_accuracy_is_connors_variance() -> None:
    assert pw.of_accuracy(0.2, 0.05)(100).variance == pytest.approx((0.2 - 0.0025) / 100)
    with pytest.raises(Undefined, match=r"more than 0\.05 of patients"):
        pw.of_accuracy(0.05, 0.1)


def test_a_variation_between_seeds_that_no_patients_can_outweigh_is_named() -> None:
    design = pw.Design("difference", 0.01, None, 3, 2, 0.02)
    with pytest.raises(Undefined, match="more seeds"):
        pw.patients_for(design, pw.by_patient(0.1), 0.8)
    with pytest.raises(Undefined, match="beyond the margin"):
        pw.patients_for(pw.Design("non-inferiority", -0.05, 0.02, 3), pw.by_patient(0.1), 0.8)


def test_a_pilot_is_planned_with_an_upper_limit_of_its_standard_deviation() -> None:
    rng = np.random.default_rng(0)
    limits = [pw.upper_sd(float(rng.normal(size=12).std(ddof=1)), 11) for _ in range(2000)]
    assert np.mean(np.array(limits) > 1) == pytest.approx(0.8, abs=0.03)
