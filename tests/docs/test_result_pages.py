"""Pages of docs/results: their text is that of their scripts, and their tables use the units that they name."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of benchmarks/ by its name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return __import__


@pytest.mark.parametrize(
    ("name", "texts", "page"),
    [
        ("domain_shift_page", ("HEAD", "UNSEEN"), "domain-shift"),
        ("unequal", ("HEAD", "TAIL"), "unequal-machines"),
        ("few_labels", ("HEAD", "PLAN"), "few-labels"),
        ("leakage", ("HEAD", "MIDDLE", "END"), "leakage"),
    ],
)
def test_text_of_a_page_is_that_of_its_script(script: Any, name: str, texts: tuple[str, ...], page: str) -> None:
    written = (RESULTS / f"{page}.md").read_text(encoding="utf-8")
    for text in texts:
        assert getattr(script(name), text).strip() in written, text
    assert "still to be measured" not in written


def runs(*splits: float) -> list[list[dict[str, Any]]]:
    """Records of an unseen site, one score for each split, with a site that trained."""
    return [
        [{"site": "new", "seen": False, "n": 9, "score": s}, {"site": "old", "seen": True, "n": 9, "score": 0.0}]
        for s in splits
    ]


def test_the_unit_of_unseen_cameras_is_the_camera(script: Any) -> None:
    """Splits are averaged first, so that three cameras have two degrees of freedom, with many splits or one."""
    page = script("domain_shift_page")
    base, other = (0.5, 0.6, 0.55), (0.62, 0.67, 0.69)
    found = {
        f"Retina, {c} never seen": {
            "fedavg": runs(b, b + 0.1, b - 0.1),
            "fedavg-recomputed": runs(o + 0.05, o, o - 0.05),
        }
        for c, b, o in zip("abc", base, other, strict=True)
    }
    text = "\n".join(page.left_out(found, ["fedavg", "fedavg-recomputed"], "Dice, %"))
    test = ttest_1samp(100 * (np.array(other) - np.array(base)), 0.0)
    low, high = test.confidence_interval(0.95)
    assert test.pvalue < 0.05
    assert f"**{9 + 10 / 3 - 10 / 3 + 2:+.1f} ({low:+.1f} to {high:+.1f})**" in text
    assert "| fedavg-recomputed | 3 |" in text
    assert "3 of 3" in text


def test_holm_is_over_all_differences_of_unseen_cameras(script: Any) -> None:
    page = script("domain_shift_page")
    rng = np.random.default_rng(0)
    gaps = {(m, "fedavg"): rng.normal(1.0, 1.0, 3) for m in "abcd"}
    tests = page.over_sites(gaps)
    least = min(tests.values(), key=lambda d: d.p)
    assert least.adjusted == pytest.approx(4 * least.p)


def test_sections_without_records_stay(script: Any) -> None:
    page = script("domain_shift_page")
    written = (RESULTS / "domain-shift.md").read_text(encoding="utf-8")
    assert page.page({}, {}, [], written).strip() == written.strip()
    title = "Heart disease, 4 hospitals"
    rows = {"fedavg": [[{"site": "x", "seen": True, "n": 9, "score": 0.123}]] * 2}
    new = page.page({title: rows}, {title: "auc"}, ["fedavg"], written)
    assert "12.3" in page.sections_of(new)[title]
    others = set(page.sections_of(written)) - {title}
    assert all(page.sections_of(new)[o].strip() == page.sections_of(written)[o].strip() for o in others)


def test_assignments_are_averaged_within_a_split(script: Any) -> None:
    """The intervals depend on the splits' means alone; the slowest hospital is another one in each assignment."""
    unequal = script("unequal")
    setting = unequal.Setting(10, 0.0, unequal.LATIN)
    found: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for seed in range(5):
        for assignment in setting.assignments:
            for way in unequal.WAYS:
                scores = dict(zip("abcd", rng.uniform(size=4).tolist(), strict=True))
                slowest = "abcd"[assignment.index(20.0)]
                one = {"auc": scores, "accuracy": scores, "slowest": slowest, "exchanges": 1}
                found[unequal.key(setting, seed, assignment, way)] = one
    assert unequal.splits_of(setting, found) == 5
    way = unequal.WAYS[1]
    values = [
        [
            np.mean([unequal.outcomes(found[unequal.key(setting, s, a, w)]) for a in setting.assignments], 0)[2]
            for s in range(5)
        ]
        for w in (way, unequal.FIRST)
    ]
    d = np.array(values[0]) - np.array(values[1])
    half = 2.7764451 * np.sqrt((1 / 5 + 0.25 / 0.6) * d.var(ddof=1))  # t(4)
    row = [line for line in unequal.tables(setting, found) if line.startswith(f"| {way} |")][1]
    assert f"{d.mean():+.1f} ({d.mean() - half:+.1f} to {d.mean() + half:+.1f})" in row
    del found[unequal.key(setting, 3, unequal.LATIN[0], way)]
    assert unequal.splits_of(setting, found) == 3


def test_pilots_choose_and_are_not_tested(script: Any, tmp_path: Path) -> None:
    labels = script("few_labels")
    found: dict[str, dict[str, float]] = {}
    for arm in labels.ARMS:
        for trial in range(3):
            for k in range(labels.CANDIDATES["Chest X-rays"].federations):
                pilot = k < labels.PILOTS
                found[f"Chest X-rays|{arm}|{trial}|{k}"] = {
                    "validation": 50.0 + (trial == 1) if pilot else 99.0,
                    "test": 0.0 if pilot else 60.0 + trial,
                }
    study = labels.Study("Chest X-rays", found, tmp_path / "none.json")
    assert study.chosen("fedsemi") == 1
    assert all((values == 61.0).all() for values in study.tested(99).values())
    assert len(study.tested(9)["fedavg"]) == 9 - labels.PILOTS


def test_members_are_patients(script: Any) -> None:
    """A patient's outlines are one case: five of one member and one of each of two others."""
    leakage = script("leakage")
    patients = ["a"] * 5 + ["b", "c", "d"]
    inside = torch.tensor([True] * 5 + [False, False, True])
    one = leakage.separated(torch.tensor([9.0, 0, 0, 0, 0, 1.0, 3.0, 2.0]), inside, patients)
    assert (one.members, one.others) == (2, 2)
    assert one.auc == pytest.approx(0.5)  # a: 1.8, d: 2; b: 1, c: 3


def test_a_message_is_the_model_after_local_training(
    script: Any, task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """The average of the sites' messages, by their numbers of examples, is the global model of the round."""
    method = script("leakage").Watched(task, local)
    engine, state = InProcess(method, sites, seed=0), method.init(task.first(0))
    for step in train(method, engine, state, rounds=2):
        state = step.state
    counts = {name: len(site.data["train"]) for name, site in sites.items()}
    assert len(method.seen) == 2
    for name, leaf in state.params.items():
        mean = sum(counts[s] * method.seen[1][s][name] for s in sites) / sum(counts.values())
        assert torch.allclose(leaf, mean, atol=1e-6)
