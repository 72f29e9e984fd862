"""Ordered grades: the loss is a sum over thresholds, and the metrics are those of scikit-learn."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.cli.run import run
from polyclinic.data.examples import DataError
from polyclinic.errors import ConfigError
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, ordered_loss
from polyclinic.statistics import agreement
from polyclinic.studies.config import study_config
from polyclinic.studies.run.resolved_study import _require_order, resolve

STUDY = """
name = "grades"
rounds = 2
[data]
kind = "table"
path = "PATH"
label = "grade"
patient = "id"
site = "hospital"
[task]
ordered = true
network = "mlp"
[training]
lr = 0.05
[[methods]]
name = "fedavg"
"""


def test_the_loss_is_the_cross_entropy_of_every_threshold() -> None:
    logits, target = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 5
    p = logits.softmax(1)
    each = [F.binary_cross_entropy(p[:, k + 1 :].sum(1), (target > k).double()) for k in range(4)]
    assert float(ordered_loss(p.log(), target)) == pytest.approx(float(sum(each)), abs=1e-12)
    two = logits[:, :2].log_softmax(1)
    assert float(ordered_loss(two, target % 2)) == pytest.approx(float(F.nll_loss(two, target % 2)), abs=1e-12)


def test_a_farther_grade_costs_more() -> None:
    """The cross-entropy of classes without an order is the same for all wrong grades."""
    sure = torch.full((4, 4), 0.01).fill_diagonal_(0.97).log()
    cost = [float(ordered_loss(sure[k : k + 1], torch.tensor([0]))) for k in range(4)]
    assert cost == sorted(cost)
    assert len(set(cost)) == 4


def test_a_very_sure_error_has_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = ordered_loss(logits.log_softmax(1), torch.tensor([2]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(600.0, rel=1e-3)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the second implementation")
    rng = np.random.default_rng(seed)
    score, target = rng.dirichlet(np.ones(5), 60), rng.integers(0, 5, 60)
    weight = rng.integers(0, 4, (2, 60)).astype(float)
    table, grades = metrics_for("classification", 5, ordered=True), score.argmax(1)
    for row, kappa, error in zip(
        weight,
        table["quadratic_kappa"].kernel(score, target, weight),
        table["grade_error"].kernel(score, target, weight),
        strict=True,
    ):
        assert kappa == pytest.approx(
            sk.cohen_kappa_score(target, grades, weights="quadratic", sample_weight=row), abs=1e-9
        )
        assert error == pytest.approx(sk.mean_absolute_error(target, grades, sample_weight=row), abs=1e-9)
    summary = Classification(Network("mlp", (2,), 5), ordered=True).summary(
        {"score": torch.from_numpy(score), "target": torch.from_numpy(target)}
    )
    assert summary["quadratic_kappa"] == pytest.approx(table["quadratic_kappa"].of(score, target), abs=1e-9)
    assert "quadratic_kappa" not in metrics_for("classification", 5)


def test_one_grade_has_no_kappa() -> None:
    same = np.ones(4, int)
    assert np.isnan(agreement.quadratic_kappa(same, same, np.ones((1, 4)))[0])
    task = Classification(Network("mlp", (2,), 3), ordered=True)
    summary = task.summary({"score": torch.eye(3)[[1, 1]], "target": torch.tensor([1, 1])})
    assert summary["grade_error"] == 0
    assert "quadratic_kappa" not in summary


def archive(root: Path, names: list[str]) -> Path:
    """Patients of two hospitals whose grade grows with the first of their two numbers; and a study of them."""
    rng = np.random.default_rng(0)
    grade = np.arange(120) % len(names)
    inputs = rng.normal(size=(120, 2))
    inputs[:, 0] += grade
    rows = [f"p{i},{'ab'[i // 2 % 2]},{names[grade[i]]},{x},{y}" for i, (x, y) in enumerate(inputs)]
    (root / "data.csv").write_text("\n".join(["id,hospital,grade,one,two", *rows]))
    file = root / "study.toml"
    file.write_text(STUDY.replace("PATH", str(root / "data.csv")))
    return file


def test_a_study_of_grades_is_judged_by_kappa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    file = archive(tmp_path, [str(k) for k in range(12)])
    run(file, out=tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    info = json.loads((folder / "run.json").read_text())
    assert info["classes"] == [str(k) for k in range(12)]  # 10 after 9
    assert (info["metric"], info["ordered"], info["task"]) == ("quadratic_kappa", True, "classification")
    page = (folder / "report" / "report.html").read_text()
    assert "Kappa (quadratic weights)" in page
    assert "Mean distance of grades" in page


def test_an_order_is_never_guessed_from_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    file = archive(tmp_path, ["mild", "absent", "severe"])
    study = study_config.read(file)
    with pytest.raises(DataError, match=r"classes = \[\.\.\.\] in \[data\]"):
        resolve(study, file.read_text())
    listed = study_config.read(file, {"data.classes": ["absent", "mild", "severe"]})
    assert resolve(listed, file.read_text()).task.ordered  # type: ignore[attr-defined]
    shuffled: Any = SimpleNamespace(info=SimpleNamespace(classes=("2", "1", "3"), name="numbers in another order"))
    with pytest.raises(DataError, match="the order of the classes 2, 1, 3"):
        _require_order(study, shuffled)
    file = archive(tmp_path, ["0", "1"])
    with pytest.raises(DataError, match="has 2 classes"):
        resolve(study_config.read(file), file.read_text())


def test_weights_of_classes_are_refused_for_grades() -> None:
    with pytest.raises(ConfigError, match="class_weights and label_smoothing"):
        Classification(Network("mlp", (2,), 3), class_weights=(1.0, 1.0, 1.0), ordered=True)
    text = STUDY.replace("PATH", "data.npz").replace("ordered = true", "ordered = true\nlabel_smoothing = 0.1")
    with pytest.raises(ConfigError, match="no meaning for ordered grades"):
        study_config.parse(text)
