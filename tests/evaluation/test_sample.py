"""Estimates and differences of a run against independent computations, and at sites with hardly any patients."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from polyclinic.evaluation.method_comparison import Against
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.predictions import Cases, Predictions, unit_of
from polyclinic.evaluation.records.run_reader import NotARun, read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.evaluation.sample import MOST, Sample, by_fold, sample
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import corrected_t
from tests.support.known import known
from tests.support.synthetic_run import write_run

TABLE = metrics_for("classification", 2)
AUC = TABLE["auc"]
LOPSIDED = {f"site-{i}": ("training", 24, 22.5 / 24, 0.0, 0.0) for i in range(8)}  # two of 24 patients are healthy
THREE = {name: ("training", n, 0.4, 0.1, 0.0) for name, n in (("ada", 30), ("bo", 24), ("cy", 40))}


def drawn(folder: Any, sites: Any, seeds: Any = (0,)) -> Any:
    return sample(read_run(write_run(folder, sites=sites, methods=("fedavg", "fedprox"), seeds=seeds)), 0.95)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_run(
        tmp_path_factory.mktemp("r") / "r", sites=THREE, methods=("local", "fedavg", "fedprox"), seeds=(0,)
    )
    run = read_run(path)
    return run, evaluate(run)


def arrays(run: Any, label: Any, site: Any) -> Any:
    p = run.arms[label, 0][site]
    return p.score[:, 1], p.target


def test_quantities_of_a_report_equal_scikit_learns(result: Any) -> None:
    run, found = result
    sites = found.of("fedavg").sites
    for site in THREE:
        p, y = arrays(run, "fedavg", site)
        ours = {k: e.value for k, e in sites[site].items()}
        assert ours["auc"] == pytest.approx(sk.roc_auc_score(y, p))
        assert ours["accuracy"] == pytest.approx(sk.accuracy_score(y, p > 0.5))
        assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, p > 0.5))
        assert ours["sensitivity"] == pytest.approx(sk.recall_score(y, p > 0.5))
        assert ours["specificity"] == pytest.approx(sk.recall_score(y, p > 0.5, pos_label=0))
        assert ours["f1"] == pytest.approx(sk.f1_score(y, p > 0.5))
        assert ours["average_precision"] == pytest.approx(sk.average_precision_score(y, p))
        assert ours["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    mean = np.mean([sk.roc_auc_score(*arrays(run, "fedavg", s)[::-1]) for s in THREE])
    assert found.of("fedavg").macro.value == pytest.approx(mean)
    briers = [sk.brier_score_loss(*arrays(run, "fedavg", s)[::-1]) for s in THREE]
    assert found.of("fedavg").means["brier"].value == pytest.approx(np.mean(briers))


def test_intervals_and_tests_of_a_report_equal_scipys(result: Any) -> None:
    run, found = result
    p, y = arrays(run, "fedavg", "ada")
    data = sample(run, 0.95)
    exact = stats.binomtest(int(((p > 0.5) == y).sum()), 30).proportion_ci(method="exact")
    accuracy = data.estimate("fedavg", ["ada"], TABLE["accuracy"], True)
    assert (accuracy.low, accuracy.high) == pytest.approx((exact.low, exact.high))
    # The Brier score is a mean of squared errors: its difference between methods is a paired t-test.
    errors = [(q - y) ** 2 for q in (p, arrays(run, "fedprox", "ada")[0])]
    gain = data.difference("fedprox", "fedavg", ["ada"], TABLE["brier"])
    theirs = stats.ttest_rel(errors[0], errors[1])
    assert gain.p == pytest.approx(theirs.pvalue)
    assert (gain.low, gain.high) == pytest.approx(tuple(theirs.confidence_interval()))
    # Holm's adjusted p-values, by their definition.
    p_values = sorted(d.p for d in found.comparisons.values())
    adjusted = sorted(d.adjusted for d in found.comparisons.values())
    assert adjusted[0] == pytest.approx(min(1, 2 * p_values[0]))
    assert adjusted[1] == pytest.approx(max(adjusted[0], p_values[1]))
    values = [[found.of(m).sites[s]["auc"].value for m in ("local", "fedavg", "fedprox")] for s in THREE]
    assert found.ranking.p == pytest.approx(stats.friedmanchisquare(*np.transpose(values)).pvalue)


def with_declared(path: Path, compare: list[dict[str, Any]]) -> Path:
    """Add declared comparisons to a run's description."""
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "compare": compare}))
    return path


def test_declared_comparisons_are_corrected_among_themselves(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=THREE, methods=("local", "fedavg", "fedprox"), seeds=(0,))
    wide: dict[str, Any] = {"method": "fedprox", "reference": "fedavg", "kind": "equivalence", "margin": 0.2}
    tight: dict[str, Any] = {"method": "fedprox", "reference": "fedavg", "kind": "non-inferiority", "margin": 0.02}
    plain = {"method": "local", "reference": "fedavg", "kind": "difference"}
    gone = {"method": "lost", "reference": "fedavg", "kind": "difference"}
    run = read_run(with_declared(path, [wide, tight, plain, gone]))
    result = evaluate(run)
    ours = result.declared
    data = sample(run, 0.95)
    for c, spec in zip(ours[:2], (wide, tight), strict=True):
        alone = data.difference("fedprox", "fedavg", list(THREE), AUC, spec["kind"], spec["margin"])
        assert c.difference.p == alone.p
    p = [known(c.difference.p) for c in ours[:3]]
    adjusted = holm([min(1.0, one) for one in (2 * p[0], 2 * p[1], p[2])])
    after = [known(c.difference.adjusted) for c in ours[:3]]
    found = [2 * after[0], 2 * after[1], after[2]]
    assert found == pytest.approx(adjusted)
    assert ours[0].difference.verdict() == "equivalent"
    assert ours[1].difference.verdict() == "non-inferiority not shown"
    assert ours[3].difference.verdict() == "not tested: no seed or no site in common"
    assert result.comparisons["fedprox"].margin is None


@pytest.mark.parametrize("margin", [None, -0.1, 0.0])
def test_a_record_of_a_comparison_without_its_margin_is_refused(tmp_path: Path, margin: float | None) -> None:
    path = write_run(tmp_path / "r", sites=THREE, methods=("fedavg", "fedprox"), seeds=(0,))
    with_declared(path, [{"method": "fedprox", "reference": "fedavg", "kind": "equivalence", "margin": margin}])
    with pytest.raises(NotARun, match="margin"):
        read_run(path)


def test_a_mean_over_many_lopsided_sites_has_an_interval(tmp_path: Path) -> None:
    found = drawn(tmp_path / "r", LOPSIDED).macro_estimate("fedavg", list(LOPSIDED), AUC)
    assert found.low < found.value < found.high


def test_methods_stay_paired_and_seeds_too(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", LOPSIDED, seeds=(0, 1))
    cases = {(m, seed): data.cases["fedavg", seed] for m in ("fedavg", "fedprox") for seed in (0, 1)}
    same = replace(data, cases=cases).difference("fedprox", "fedavg", list(LOPSIDED), AUC)
    assert (same.value, same.p, same.low) == (0, 1.0, None)


def test_sites_without_a_value_are_named_and_their_patients_not_counted(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", {**THREE, "dee": ("training", 20, 0.0, 0.0, 0.0)})  # one class, so no AUC
    sites, exact = [*THREE, "dee"], replace(AUC, has_interval=False)
    for found in (
        data.macro_estimate("fedavg", sites, AUC),
        data.macro_estimate("fedavg", sites, AUC, interval=False),
        data.macro_estimate("fedavg", sites, exact),
        data.macro_estimate("fedavg", sites, TABLE["average_precision"]),
    ):
        assert found.value is not None
        assert (found.n, found.without) == (30 + 24 + 40, ("dee",))
    alone = data.macro_estimate("fedavg", ["dee"], AUC)
    assert (alone.value, alone.n, alone.without) == (None, 0, ("dee",))
    assert data.difference("fedprox", "fedavg", sites, AUC).n == 30 + 24 + 40


def test_splits_of_the_seeds_are_compared_by_the_corrected_t_test(tmp_path: Path) -> None:
    """If each seed tests other patients; the numbers of patients are those of the training sites, which are compared."""
    sites = {**THREE, "cy": ("external", 40, 0.4, 0.1, 0.0)}
    run = read_run(write_run(tmp_path / "r", sites=sites, methods=("fedavg", "fedprox"), seeds=(0, 1, 2, 3)))
    apart = {
        (label, seed): {site: replace(p, patient=p.patient + 1000 * seed) for site, p in of_site.items()}
        for (label, seed), of_site in run.arms.items()
    }
    run = replace(run, arms=apart)
    against = Against(run, sample(run, 0.95), ("fedprox",), "fedavg")
    each = against.data.by_split("fedprox", "fedavg", ["ada", "bo"], AUC)
    expected = corrected_t(each, test=30 + 24, train=3 * (30 + 24), level=0.95)
    assert len(each) == 4
    assert against.over_splits(AUC) == {"fedprox": expected}
    same = replace(run, arms={key: run.arms[key[0], 0] for key in run.arms})
    assert Against(same, sample(same, 0.95), ("fedprox",), "fedavg").over_splits(AUC) == {}


@pytest.mark.parametrize(("by", "train"), [("patients", 3 * 94), ("sites", 3 * 94 - 94 // 3)])
def test_folds_are_compared_by_the_corrected_t_test(tmp_path: Path, by: str, train: int) -> None:
    """A fold tests a third of the patients; of a site that is left out, they are missing from training."""
    run = read_run(write_run(tmp_path / "r", sites=THREE, methods=("fedavg", "fedprox"), seeds=(0,)))

    def third(p: Predictions, fold: int) -> Predictions:
        rows = np.arange(len(p)) % 3 == fold
        return Predictions(p.patient[rows], known(p.score)[rows], known(p.target)[rows])

    splits = {
        (label, seed, fold): {site: third(p, fold) for site, p in of_site.items()}
        for (label, seed), of_site in run.arms.items()
        for fold in range(3)
    }
    run = replace(run, info=run.info.model_copy(update={"folds": 3, "folds_by": by}), splits=splits)
    against = Against(run, sample(run, 0.95), ("fedprox",), "fedavg")
    each = by_fold(run, 0.95).by_split("fedprox", "fedavg", list(THREE), AUC)
    assert len(each) == 3
    assert against.over_splits(AUC) == {"fedprox": corrected_t(each, test=94 // 3, train=train, level=0.95)}
    two = replace(run, splits={key: sites for key, sites in splits.items() if key[2] < 2})
    assert Against(two, sample(two, 0.95), ("fedprox",), "fedavg").over_splits(AUC) == {}


def test_a_site_with_one_patient_of_a_class_has_no_interval_and_no_test(tmp_path: Path) -> None:
    few = {"ada": ("training", 12, 1 / 12, 0.0, 0.0)}
    data = drawn(tmp_path / "r", few)
    found = data.estimate("fedavg", ["ada"], AUC, True)
    assert found.value is not None
    assert found.low is None
    assert "fewer than two patients in a class" in found.why
    verdict = data.difference("fedavg", "fedprox", ["ada"], AUC).verdict()
    assert verdict == "not tested: fewer than two patients in a class"


def test_four_patients_give_no_verdict(tmp_path: Path) -> None:
    data = drawn(tmp_path / "r", {"ada": ("training", 4, 0.5, 0.0, 0.0)})
    found = data.difference("fedavg", "fedprox", ["ada"], TABLE["brier"])
    assert found.p is None
    assert found.verdict() == "not tested: 4 patients, fewer than 6"


def test_groups_of_patients_at_a_large_site_give_the_same_variance() -> None:
    n = 3 * MOST
    rng = np.random.default_rng(0)
    ids, error = np.arange(n), rng.normal(size=(n, 1))
    cases = {("a", 0): {"ada": Cases(ids, error, np.zeros((n, 1)), {}, n)}}
    data = Sample(cases, {("ada", 0): ids}, True, 0.95, {"ada": (n, n)})
    mae = metrics_for("regression")["mae"]
    found = data.estimate("a", ["ada"], mae, True)
    half = 1.96 * stats.sem(np.abs(error[:, 0])) / known(found.value)
    assert np.log(known(found.high) / known(found.value)) == pytest.approx(half, rel=0.06)


def test_a_patient_is_positive_if_any_image_is(tmp_path: Path) -> None:
    p = Predictions(np.array([0, 0, 1]), np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]), np.array([0, 1, 0]))
    run = read_run(write_run(tmp_path / "r", sites={"ada": THREE["ada"]}, seeds=(0,), methods=("fedavg",)))
    (case,) = sample(replace(run, arms={("fedavg", 0): {"ada": p}}), 0.95).cases.values()
    assert case["ada"].target.tolist() == [1, 0]
    np.testing.assert_allclose(case["ada"].score[:, 1], [0.4, 0.1])


def test_without_a_rule_for_the_patient_every_image_is_a_case() -> None:
    score = np.full((3, 3), 1 / 3)
    mixed = Predictions(np.array([0, 0, 1]), score, np.array([0, 2, 1]))
    equal = replace(mixed, target=np.array([2, 2, 1]))
    assert unit_of([equal, mixed], "classification", "patient") == "image"
    assert unit_of([equal], "classification", "patient") == "patient"
    assert unit_of([mixed], "multilabel", "patient") == "patient"
