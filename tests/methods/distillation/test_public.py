"""Distillation on public images: FedDF, FedMD, FedAD; and learning from a teacher."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from polyclinic.core import tree
from polyclinic.core.aggregates import merge
from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import answers, look
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.distillation.fedad import FedAD
from polyclinic.methods.distillation.feddf import FedDF
from polyclinic.methods.distillation.fedmd import FedMD
from polyclinic.methods.distillation.teacher_student import TeacherStudent
from polyclinic.methods.optimization.fedavg import FedAvg
from tests.conftest import Rows, blobs, little_sites
from tests.support.few_labels import near, run, same
from tests.support.known import known

LINEAR = Classification(Network("mlp", (5,), 3, (("depth", 0),)))
LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.1)
STEP = LocalTraining(steps=1, batch_size=1000, lr=0.5)


def training(kind: Any, **given: Any) -> Any:
    """A subclass of the method ``kind`` whose training on public images is the given one."""
    return type(kind.__name__, (kind,), given)


def server_data(sites: Any) -> Any:
    return {"public": sites["site-0"].data["public"]}


def hidden_targets(sites: Any) -> Any:
    """The same sites, whose public images have other targets."""
    return {
        k: replace(s, data={r: Rows(d.x, 1 - d.y) if r == "public" else d for r, d in s.data.items()})
        for k, s in sites.items()
    }


@pytest.mark.parametrize("make", [FedDF, FedMD, lambda task, local: FedAD(task, 2, local)])
def test_targets_of_public_images_are_never_used(task: Classification, make: Any) -> None:
    sites, others = little_sites(), hidden_targets(little_sites())
    one, two = (run(make(task, LOCAL), s, task.first(0), server_data=server_data(s))[0].state for s in (sites, others))
    assert same(one.params, two.params)


@pytest.mark.parametrize(
    ("make", "who"), [(FedDF, "the server"), (FedMD, "site-1"), (lambda task, local: FedAD(task, 2, local), "site-1")]
)
def test_without_public_images_it_says_so(task: Classification, make: Any, who: str) -> None:
    sites = little_sites()
    method = make(task, LOCAL)
    bare = replace(sites["site-1"], data={"train": sites["site-1"].data["train"]})
    state = method.init(task.first(0))

    def a_round() -> None:
        reply, _ = method.site_update(method.request(state), {}, bare)
        method.server_update(state, reply, Site("server"))

    with pytest.raises(ValueError, match=f"{who} has none: provide identical data with the role 'public'"):
        a_round()


def test_feddf_without_distillation_is_fedavg(task: Classification) -> None:
    sites = little_sites()
    step, _ = run(
        training(FedDF, distil=LocalTraining(steps=0))(task, LOCAL),
        sites,
        task.first(0),
        server_data=server_data(sites),
    )
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert near(step.state.params, plain.state.params)


def test_feddf_one_step_is_the_equation_in_numpy() -> None:
    """One step down KL(σ(mean of logits) ‖ σ(student)) from the average model (equation 1), for linear models."""
    sites, params = little_sites((5,), classes=3), LINEAR.first(2)
    method = training(FedDF, distil=STEP)(LINEAR, LOCAL)
    state = method.init(params)
    reply = merge(method.site_update(method.request(state), {}, site)[0] for site in sites.values())
    server = replace(sites["site-0"], name="server", data=server_data(sites))
    found = method.server_update(state, reply, server).params
    sent = {k: tree.under("model", v) for k, v in reply.gather("model").items()}
    W, b = ([m[f"head.{p}"].double().numpy() for m in sent.values()] for p in ("weight", "bias"))
    share = np.array([12, 17, 22]) / 51
    w0, b0 = sum(s * w for s, w in zip(share, W, strict=True)), sum(s * c for s, c in zip(share, b, strict=True))
    x = sites["site-0"].data["public"].x.double().numpy()
    target = softmax(np.mean([x @ w.T + c for w, c in zip(W, b, strict=True)], axis=0), 1)
    g = (softmax(x @ w0.T + b0, 1) - target) / len(x)
    assert np.allclose(found["head.weight"].numpy(), w0 - 0.5 * g.T @ x, atol=1e-5)
    assert np.allclose(found["head.bias"].numpy(), b0 - 0.5 * g.sum(0), atol=1e-5)


def test_fedmd_sends_scores_alone_and_their_mean_is_digested(task: Classification) -> None:
    sites = little_sites()
    method = training(FedMD, digest=LOCAL)(task, LOCAL)
    step, engine = run(method, sites, task.first(0), 1)
    assert step.bytes_up == dict.fromkeys(sites, 12 * 2 * 4)
    images = sites["site-0"].data["public"]
    said = [answers(task, engine.memory[name]["params"], images)[0] for name in sites]
    assert torch.allclose(step.state.consensus["scores"], torch.stack(said).mean(0), atol=1e-5)
    request = method.request(step.state)
    gaps = []
    for digest in (LocalTraining(steps=0), LocalTraining(epochs=30, batch_size=12, lr=0.05)):
        own = training(FedMD, digest=digest)(task, LocalTraining(steps=0))
        _, memory = own.site_update(request, engine.memory["site-2"], sites["site-2"])
        scores, _ = answers(task, memory["params"], images)
        gaps.append(float((scores - step.state.consensus["scores"]).abs().mean()))
    assert gaps[1] < 0.7 * gaps[0]


def test_fedmd_without_digestion_is_every_site_alone_and_the_server_learns_for_newcomers(task: Classification) -> None:
    sites = little_sites()
    local = LocalTraining(epochs=5, batch_size=8, lr=0.1)
    method = Evaluated(training(FedMD, digest=LocalTraining(epochs=20, batch_size=4, lr=0.05))(task, local), task)
    step, engine = run(method, sites, task.first(0), 3, server_data=server_data(sites))
    request = method.evaluation_request(step.state)
    x = blobs(77, 40, (1, 8, 8), 0.25)
    scores = answers(task, method.site_model(request, {}), x)[0]
    assert (scores.argmax(1) == x.y).float().mean() > 0.8
    assert same(method.site_model(request, engine.memory["site-0"]), engine.memory["site-0"]["params"])


def test_look_says_what_the_model_says_and_where(task: Classification) -> None:
    model, x = task.model().eval(), torch.zeros(4, 1, 8, 8)
    x[:, :, 5:7, 1:3] = 20
    z, where = look(model, x)
    assert torch.allclose(z, model(x))
    assert where.shape == (4, 16)  # the last convolution sees 4 x 4 places
    assert torch.allclose(where.norm(dim=1), torch.ones(4), atol=1e-5)
    table = LINEAR.model()
    assert look(table, torch.randn(3, 5))[1].shape == (3, 0)


def test_fedad_weighs_classes_by_who_knows_them() -> None:
    """q_c ∝ Σ_k n_k,c p_k,c / Σ_k n_k,c, of probabilities rounded to hundredths, in numpy."""
    sites, params = little_sites((5,), classes=3), LINEAR.first(2)
    method = training(FedAD, distil=STEP)(LINEAR, 1, LOCAL)
    state = method.init(params)
    replies = {k: method.site_update(method.request(state), {}, site)[0] for k, site in sites.items()}
    merged = merge(replies.values()).leaf_mean("scores").value["p"].numpy()
    x, total, weight = sites["site-0"].data["public"].x, np.zeros(3), np.zeros(3)
    for name, site in sites.items():
        end = LOCAL.fit(LINEAR, params, site, 0)
        p = np.round(answers(LINEAR, end, Rows(x, x))[0].softmax(1).numpy() * 100) / 100
        n = np.bincount(site.data["train"].y.numpy(), minlength=3)
        assert np.allclose(replies[name].leaf_mean("scores").value["p"].numpy(), p, atol=1e-6)
        total, weight = total + n * p, weight + n
    assert np.allclose(merged, total / weight, atol=1e-5)


def test_fedad_is_one_exchange_without_weights_and_its_student_works(task: Classification) -> None:
    sites = little_sites()
    inner = FedAD(task, 10, LocalTraining(epochs=2, batch_size=6, lr=0.1), distil_epochs=80)
    method = Evaluated(inner, task)
    step, engine = run(method, sites, task.first(0), 10, server_data=server_data(sites))
    assert step.request.round == 0
    assert method.request(step.state) is None
    assert inner.whole.epochs == 20
    assert {leaf for part in step.reply.parts.values() for t in part.trees for leaf in t} == {"p", "where"}
    scores = evaluate(method, engine, step.state, engine.sites)
    assert sum(float(s["accuracy"]) for s in scores.values()) / 3 > 0.8


def test_fedads_noise_is_added_to_probabilities(task: Classification) -> None:
    site = little_sites()["site-1"]
    clean, noisy = (FedAD(task, 1, LOCAL, noise=s) for s in (0.0, 0.1))
    request = known(clean.request(clean.init(task.first(0))))
    p, q = (m.site_update(request, {}, site)[0].leaf_mean("scores").value["p"] for m in (clean, noisy))
    assert 0.03 < float((p - q).std()) < 0.2


def test_training_on_public_images_follows_the_options(task: Any) -> None:
    assert FedDF(task, LOCAL, distil_epochs=7, distil_lr=0.2, distil_batch=3).distil == LocalTraining(
        epochs=7, batch_size=3, optimizer="adam", lr=0.2
    )
    assert FedMD(task, LOCAL).digest == replace(LOCAL, epochs=1)
    assert FedMD(task, replace(LOCAL, steps=9), digest_epochs=3, digest_lr=0.4).digest == replace(
        LOCAL, epochs=3, lr=0.4
    )
    steps = replace(LOCAL, steps=3)
    assert FedAD(task, 5, steps).whole == replace(LOCAL, epochs=10, steps=15)
    assert FedAD(task, 5, steps).distil == replace(LOCAL, epochs=10)
    assert FedAD(task, 5, LOCAL, distil_epochs=4).distil == replace(LOCAL, epochs=4)


def test_a_teacher_that_counts_nothing_is_fedavg(task: Classification) -> None:
    sites = little_sites()
    step, _ = run(TeacherStudent(task, LOCAL, share=0.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert near(step.state.params, plain.state.params)


def test_one_step_with_a_teacher_is_the_equation_in_numpy() -> None:
    sites, params = little_sites((5,), classes=3), LINEAR.first(2)
    teacher = {k: v + 0.5 for k, v in params.items()}
    teacher["head.weight"] = teacher["head.weight"] * 2
    method = TeacherStudent(LINEAR, STEP, "first", share=0.3, temperature=2.0)
    state = method.init(teacher)._replace(params=params)
    reply, _ = method.site_update(method.request(state), {}, sites["site-1"])
    data = sites["site-1"].data["train"]
    x, y = data.x.double().numpy(), np.eye(3)[data.y.numpy()]
    W, b, Wt, bt = (p[k].double().numpy() for p in (params, teacher) for k in ("head.weight", "head.bias"))
    z, t = x @ W.T + b, x @ Wt.T + bt
    # d T² KL(σ(t/T) ‖ σ(z/T)) / dz = T (σ(z/T) − σ(t/T))
    g = (0.7 * (softmax(z, 1) - y) + 0.3 * 2.0 * (softmax(z / 2, 1) - softmax(t / 2, 1))) / len(x)
    assert np.allclose(reply.mean("update").value["head.weight"].numpy(), -0.5 * g.T @ x, atol=1e-5)


def test_only_two_teachers_are_known(task: Classification) -> None:
    assert TeacherStudent(task, LOCAL, teacher="first").teacher == "first"
    with pytest.raises(ValueError, match="no teacher is called 'plato'"):
        TeacherStudent(task, LOCAL, teacher="plato")  # type: ignore[arg-type]
