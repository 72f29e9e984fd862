"""Dual distillation: its limits, what travels, and who predicts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.objectives.distillation_loss import Dual
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.distillation.fedmic import DualDistillation, fedmic, mutual
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.registry import Setting, build
from tests.conftest import little_sites
from tests.support.agreement import KINDS, agree, entering, mean, minibatches, place, ready, sizes


def run(method: Any, sites: Any, params: Any, rounds: Any = 2) -> Any:
    engine = InProcess(method, sites)
    for step in train(method, engine, method.init(params), rounds=rounds):
        assert not step.lost
    return step, engine


def test_without_distillation_the_student_is_fedavgs(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    alone = DualDistillation(Dual(task, task, (1, 1), (0, 0), 0, False), local)
    step, _ = run(alone, sites, task.first(0))
    plain, _ = run(FedAvg(task, local), sites, task.first(0))
    found, wanted = step.state.params, plain.state.params
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_a_teacher_may_come_from_a_study_file(task: Classification, local: LocalTraining) -> None:
    options: tuple[Any, ...] = ([["width", 6]], (("width", 6),))
    lists, tuples = (fedmic(task, local, teacher="cnn", teacher_options=o) for o in options)
    assert lists == tuples
    assert hash(lists.dual) == hash(tuples.dual)


def test_only_the_student_travels_and_a_larger_teacher_costs_no_byte(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    params = task.first(0)
    small, _ = run(fedmic(task, local), sites, params)
    large, engine = run(
        fedmic(task, local, teacher="cnn", teacher_options=(("width", 12), ("depth", 2))), sites, params
    )
    assert small.bytes_up == large.bytes_up
    assert large.reply.mean("update").total.keys() == params.keys()
    kept = engine.memory["site-0"]["private"]
    assert kept["teacher.encoder.0.weight"].shape[0] == 12
    assert not any(name.startswith("student") for name in kept)


@pytest.mark.parametrize("teacher", ["", "cnn"])
def test_the_teacher_predicts_and_the_student_where_there_is_none(
    task: Classification, local: LocalTraining, sites: dict[str, Site], teacher: str
) -> None:
    options = (("width", 6), ("depth", 2)) if teacher else ()
    inner = fedmic(task, local, teacher=teacher, teacher_options=options)
    method = Evaluated(inner, task)
    step, engine = run(method, sites, task.first(0))
    request, predicts = method.evaluation_request(step.state), method.prediction_task or task
    x = sites["site-0"].data["test"].x

    def say(of: Any, params: Any) -> Any:
        with torch.no_grad():
            return cached_model(of, params).eval()(x)

    teacher_task = inner.dual.teacher
    own = tree.under("teacher", engine.memory["site-0"]["private"])
    assert torch.equal(say(predicts, method.site_model(request, engine.memory["site-0"])), say(teacher_task, own))
    assert torch.equal(say(predicts, method.site_model(request, {})), say(task, step.state.params))
    assert len(evaluate(method, engine, step.state, engine.sites)) == 3


def test_the_teacher_fits_its_site_better_than_the_student_elsewhere(task: Classification) -> None:
    sites = little_sites(count=3)
    method = Evaluated(fedmic(task, LocalTraining(epochs=4, batch_size=8, lr=0.1)), task)
    step, engine = run(method, sites, task.first(0), 4)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert sum(float(s["accuracy"]) for s in scores.values()) / 3 > 0.8


def test_mutual_learning_with_labels_alone_is_fedavg_beside_single(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    step, engine = run(mutual(task, local, alpha=1.0, beta=1.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, local), sites, task.first(0))
    wanted = plain.state.params
    assert all(torch.allclose(step.state.params[name], wanted[name], atol=1e-5) for name in wanted)
    assert "teacher.head.weight" in engine.memory["site-1"]["private"]


def test_fedkd_takes_over_the_mean_change_in_low_rank(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """Against NumPy: of each matrix the least rank with 95.03 % of the energy, if its factors are smaller."""
    params = task.first(0)
    built = Setting(task, local, tuple(sites), 2)
    found, plain = (run(build(name, built), sites, params, rounds=1)[0].state.params for name in ("fedkd", "fedmic"))
    shortened = 0
    for name, start in params.items():
        change = (plain[name] - start).double().numpy()
        if change.ndim > 1:
            matrix = change.reshape(len(change), -1)
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            share = np.cumsum(s**2) / np.sum(s**2)
            rank = int(np.argmax(share >= 0.95 + 0.03 / 100)) + 1
            if rank * sum(matrix.shape) < matrix.size:
                change = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(change.shape)
                shortened += 1
        np.testing.assert_allclose((found[name] - start).numpy(), change, atol=1e-5)
    assert shortened


def low_rank(change: Any, energy: float) -> Any:
    """A change as factors of the least rank with a share of the energy, if these are smaller."""
    matrix = change.reshape(len(change), -1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.argmax(np.cumsum(s**2) / np.sum(s**2) >= energy)) + 1 if s.any() else 0
    small = rank and rank * sum(matrix.shape) < matrix.size
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(change.shape) if small else change


def kl(p: Any, q: Any) -> Any:
    """``KL(softmax p ‖ softmax q)``, averaged over examples, of constant p."""
    p = p.detach()
    return F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")


OPTIONS: dict[str, dict[str, float]] = {
    "fedmic": {"representation": 0.8, "decision": 1.5},
    "fedkd": {},  # its weights are constants of the paper
    "mutual": {"alpha": 0.3, "beta": 0.6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_rounds_are_the_published_ones(name: str, kind: str) -> None:
    """FedKD's equations for both networks with PyTorch's SGD, and its broadcast in NumPy; mutual learning by its own."""
    task, sites = place(kind)
    local, o = LocalTraining(epochs=1, batch_size=8, lr=0.05), OPTIONS[name]
    weights = {"representation": 1.0, "decision": 1.0, **o}
    method = build(name, Setting(task, local, tuple(sites), 2), o)
    assert isinstance(method, DualDistillation)
    step, engine = run(method, sites, task.first())

    student, models = task.first(), {}
    for name_, site in sites.items():
        projection = method._private(student, site)["projection.weight"]
        models[name_] = (ready(task, student), torch.nn.Parameter(projection.clone()))
    for round in range(2):
        ends = []
        for name_, site in sites.items():
            teacher, projection = models[name_]
            shared = ready(task, student)
            optimizer = torch.optim.SGD([*teacher.parameters(), *shared.parameters(), projection], 0.05)
            for x, y in minibatches(local, site, round):
                (h_t, z_t), (h_s, z_s) = entering(teacher, x), entering(shared, x)
                own, other = F.cross_entropy(z_t, y), F.cross_entropy(z_s, y)
                if name == "mutual":
                    loss = o["alpha"] * own + (1 - o["alpha"]) * kl(z_s, z_t)
                    loss = loss + o["beta"] * other + (1 - o["beta"]) * kl(z_t, z_s)
                else:
                    c = float(own + other)
                    hidden = (h_t - h_s @ projection.T).square().mean()
                    loss = own + other + weights["decision"] * (kl(z_s, z_t) + kl(z_t, z_s)) / c
                    loss = loss + weights["representation"] * hidden / c
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends.append(params_of(shared))
        moved = mean(ends, sizes(sites))
        if name == "fedkd":
            energy = 0.95 + 0.03 * (round + 1) / 100
            for leaf, start in student.items():
                found = (moved[leaf] - start).double().numpy()
                moved[leaf] = start + torch.from_numpy(low_rank(found, energy) if found.ndim > 1 else found).float()
        student = moved
    agree(step.state.params, student)
    for name_ in sites:
        private = engine.memory[name_]["private"]
        agree(tree.under("teacher", private), params_of(models[name_][0]))
        agree({"w": private["projection.weight"]}, {"w": models[name_][1].detach()})
