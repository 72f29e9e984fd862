"""FedNI: graphs and their convolution in numpy, a generator that learns neighbors, and what each phase moves."""

from typing import Any

import numpy as np
import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.synthesis.fedni import FedNI, in_generator
from polyclinic.methods.synthesis.population_graph import Inpainting, neighbors, normalized, populated
from tests.conftest import Rows
from tests.support.few_labels import run, same, with_other_targets

TABLE = Classification(Network("mlp", (6,), 2, (("depth", 0),)))
LOCAL = LocalTraining(epochs=3, batch_size=16, lr=0.1)


def normal(*shape: Any, key: Any = "x") -> Any:
    return torch.randn(*shape, generator=Site("s").rng(key))


def test_neighbors_are_the_most_alike_both_ways() -> None:
    h = normal(9, 4)
    x = h.double().numpy() - h.double().numpy().mean(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    wanted = np.zeros((9, 9))
    for i in range(9):
        wanted[i, np.argsort(-cosine[i])[:3]] = 1
    assert np.array_equal(neighbors(h, 3).numpy(), np.maximum(wanted, wanted.T))
    assert neighbors(h[:1], 3).tolist() == [[0]]


def test_a_graph_convolution_is_kipfs() -> None:
    edges = neighbors(normal(7, 4), 2)
    A = edges.double().numpy() + np.eye(7)
    D = np.diag(A.sum(1) ** -0.5)
    assert np.allclose(normalized(edges).numpy(), D @ A @ D, atol=1e-6)


def test_the_whole_forward_pass_is_its_equation_in_numpy() -> None:
    model, x = populated(TABLE, 2).model().eval(), normal(8, 6)
    P = {k: v.detach().double().numpy() for k, v in model.named_parameters()}
    h, edges = x.double().numpy(), neighbors(x, 2).double().numpy()

    def hat(a: Any) -> Any:
        a = a + np.eye(len(a))
        d = a.sum(1) ** -0.5
        return d[:, None] * a * d

    def linear(v: Any, name: Any) -> Any:
        return v @ P[f"{name}.weight"].T + P[f"{name}.bias"]

    imagined = linear(np.maximum(linear(hat(edges) @ h, "generator.0"), 0), "generator.2")
    whole = np.block([[edges, np.eye(8)], [np.eye(8), np.zeros((8, 8))]])
    mixed = hat(whole) @ np.maximum(hat(whole) @ linear(np.r_[h, imagined], "mix"), 0)
    assert np.allclose(model(x).detach().numpy(), linear(h + mixed[:8], "base.head"), atol=1e-4)


def test_the_generator_learns_what_neighbors_are_like() -> None:
    task = populated(TABLE, 4)
    centers = normal(4, 6, key="c") * 3
    x = centers[torch.arange(64) % 4] + 0.3 * normal(64, 6)
    site, learner = Site("s", {"train": Rows(x, torch.zeros(64))}), Inpainting(task)
    start = FedNI(TABLE, neighbors=4).init(TABLE.first(0)).params
    end = LocalTraining(epochs=60, batch_size=32, lr=0.02, optimizer="adam").fit(
        learner, start, site, 0, trainable=in_generator
    )
    losses = []
    for params in (start, end):
        torch.manual_seed(0)
        losses.append(learner.loss(cached_model(learner, params), (x, x)).item())
    assert losses[1] < 0.4 * losses[0]


def tables(count: Any = 3) -> Any:
    found = {}
    for k in range(count):
        roles = {}
        for role, n in (("train", 40), ("val", 20), ("unlabeled", 20)):
            y = torch.arange(n) % 2
            roles[role] = Rows(normal(n, 6, key=f"{k}{role}") + 1.5 * y[:, None], y)
        found[f"site-{k}"] = Site(f"site-{k}", roles)
    return found


def test_each_phase_moves_its_own_part_and_the_first_reads_no_target() -> None:
    sites = tables()
    method = FedNI(TABLE, LOCAL, rounds=2, pretrain=0.5, neighbors=4)
    start = method.init(TABLE.first(0)).params
    assert all(torch.equal(start[f"base.{k}"], v) for k, v in TABLE.first(0).items())
    first, _ = run(method, sites, TABLE.first(0), 1)
    for name, leaf in first.state.params.items():
        assert torch.equal(leaf, start[name]) != in_generator(name)
    both, _ = run(method, sites, TABLE.first(0), 2)
    for name, leaf in both.state.params.items():
        assert torch.equal(leaf, first.state.params[name]) == in_generator(name)
    other, _ = run(method, with_other_targets(sites), TABLE.first(0), 2)
    assert same(both.state.params, other.state.params)


def test_it_predicts_with_the_graph() -> None:
    sites = tables()
    method = Evaluated(FedNI(TABLE, LOCAL, rounds=5), TABLE)
    step, engine = run(method, sites, TABLE.first(0), 5)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert all(float(s["accuracy"]) > 0.85 for s in scores.values())
