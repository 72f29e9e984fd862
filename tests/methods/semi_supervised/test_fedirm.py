"""FedIRM: without unlabeled images it is training on two views; unlabeled sites wait, then learn; no target leaks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.latent import head_name, represent
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.augmentation import STILL
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.fedirm import FedIRM, drops
from polyclinic.testing import close
from tests.conftest import little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, place, ready
from tests.support.few_labels import half_labeled, near, only_labels, run, same, with_other_targets

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.1)


def test_in_the_warm_up_only_labeled_sites_count(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    step, _ = run(FedIRM(task, 10, LOCAL, warmup=0.3), sites, task.first(0))
    alone, _ = run(FedIRM(task, 10, LOCAL, warmup=0.3), {k: sites[k] for k in ("site-0", "site-1")}, task.first(0))
    later, _ = run(FedIRM(task, 10, LOCAL, warmup=0.1), sites, task.first(0))
    assert same(step.state.params, alone.state.params)
    assert not same(step.state.params, later.state.params)


def test_with_labels_alone_and_views_that_show_the_same_it_is_uniform_fedavg(
    task: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.methods.semi_supervised.fedirm.WEAK", STILL)
    sites = {name: only_labels(site) for name, site in little_sites().items()}
    step, _ = run(FedIRM(task, 10, LOCAL, warmup=0.1), sites, task.first(0), 1)
    plain, _ = run(FedAvg(task, LOCAL, uniform=True), sites, task.first(0), 1)
    one, two = ({k: v for k, v in s.state.params.items() if "running" not in k} for s in (step, plain))
    assert near(one, two, 1e-4)  # running statistics moved twice, once for each view


def test_targets_of_unlabeled_images_are_never_used(task: Classification) -> None:
    sites = half_labeled()
    method = FedIRM(task, 10, LOCAL, warmup=0.1)
    one, two = (run(method, s, task.first(0), 3)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)


def test_it_learns_and_its_matrix_knows_the_classes(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    method = Evaluated(FedIRM(task, 10, LOCAL, warmup=0.3, growth=0.4, consistency=1.0), task)
    step, engine = run(method, sites, task.first(0), 8)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert sum(float(s["accuracy"]) for s in scores.values()) / 3 > 0.75
    matrix = step.state.relation["matrix"]
    assert matrix[0, 0] > 0.5 < matrix[1, 1]
    assert "teacher" in engine.memory["site-2"]
    assert "teacher" not in engine.memory["site-0"]


@pytest.mark.parametrize("name", KINDS)
def test_the_passes_differ_and_leave_running_statistics_as_they_are(name: str) -> None:
    task = Classification(NETWORKS[name][0])
    method = FedIRM(task, 10, LocalTraining(), passes=6)
    model, x = load(task.model(), task.first()).train(), torch.randn(4, *task.network.inputs)
    with torch.no_grad():
        found = method._passes(model, x)
        plain = model(x)
    assert found.shape == (6, 4, 2)
    assert len({z.numpy().tobytes() for z in found}) == 6
    torch.testing.assert_close(load(task.model(), task.first()).train()(x), plain)
    counted = params_of(model)
    model = load(task.model(), task.first()).train()
    with torch.no_grad():
        model(x)
    assert close(counted, params_of(model))  # one pass, and not seven


def test_a_networks_own_dropout_is_used_alone(task: Classification) -> None:
    own = task.with_network(replace(task.network, options=(*task.network.options, ("dropout", 0.5))))
    assert drops(own)
    assert not drops(task)
    share, x = [], torch.randn(3, 1, 8, 8)
    for each in (own, task):
        model = load(each.model(), task.first()).train()
        with torch.no_grad():
            passes = FedIRM(each, 10, LocalTraining(), passes=200, dropout=0.9)._passes(model, x)
            share.append(
                float((passes == model.get_parameter("head.bias")).all(2).float().mean())
            )  # all eight features dropped
    assert share[0] < 0.05
    assert share[1] > 0.3
    assert FedIRM(own, 10, LocalTraining(), dropout=0.0).dropout == 0
    with pytest.raises(ConfigError, match="set dropout above 0"):
        FedIRM(task, 10, LocalTraining(), dropout=0.0)
    with pytest.raises(ConfigError, match="probability"):
        FedIRM(task, 10, LocalTraining(), dropout=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_unlabeled_images_is_the_published_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 2 to 6 in NumPy, from the logits of one pass, of the teacher, and of ten passes with dropout."""
    monkeypatch.setattr("polyclinic.methods.semi_supervised.fedirm.WEAK", STILL)
    task, sites = place(kind, 3)
    x = sites["site-0"].data["unlabeled"].x
    shared = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    model, teacher = ready(task, task.first(0)), ready(task, task.first(1))
    head = model.get_submodule(head_name(task.network, model))
    with torch.no_grad():
        z, q = model(x).double().numpy(), softmax(teacher(x).double().numpy(), 1)
        h = represent(task.network, model, x)[0]
        torch.manual_seed(3)
        passes = np.mean([head(F.dropout(h, 0.2)).double().numpy() for _ in range(10)], 0)
    p, mean = softmax(z, 1), softmax(passes, 1)
    unsure = -(mean * np.log(mean)).sum(1)
    limit, least = np.sort(unsure)[-3:-1].mean(), np.sort(p.max(1))[1:3].mean()  # two images are too uncertain, each
    sure = (p.max(1) >= least) & (unsure < limit)
    assert len(x) - 4 <= sure.sum() <= len(x) - 2

    method = FedIRM(task, 10, LOCAL, confidence=float(least), entropy=float(limit / np.log(3)))
    model, teacher = ready(task, task.first(0)), ready(task, task.first(1))
    torch.manual_seed(3)
    found = float(method.alone(model, teacher, x, shared, torch.Generator()).detach())
    kl = []
    for c in range(3):
        mine = sure & (p.argmax(1) == c)
        if mine.any():
            row, other = softmax(z[mine].mean(0) / 2.0), shared[c].double().numpy()
            kl.append((row * np.log(row / other) + other * np.log(other / row)).sum() / 2)
    assert found == pytest.approx(((p - q) ** 2).sum(1).mean() + np.mean(kl), rel=1e-4)
