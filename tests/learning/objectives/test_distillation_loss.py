"""Divergences against numpy and scipy; two models that teach one another, one step by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from polyclinic.core.site import Site
from polyclinic.learning.networks.latent import head_width, pooled
from polyclinic.learning.networks.model_tree import cached_model, initial, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import Dual, divergence, either
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows


def normal(*shape: Any, key: Any = "a") -> Any:
    return torch.randn(*shape, generator=Site("s").rng(key))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 5, 5)])
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_kl_of_classes_is_scipys(shape: tuple[int, ...], T: float) -> None:
    z, t = normal(*shape), normal(*shape, key="b")
    p, q = softmax(t.double().numpy() / T, 1), softmax(z.double().numpy() / T, 1)
    kind = "classification" if len(shape) == 2 else "segmentation"
    assert float(divergence(kind, z, t, T)) == pytest.approx(T**2 * rel_entr(p, q).sum(1).mean(), rel=1e-4)


def test_kl_of_labels_is_scipys() -> None:
    z, t = normal(6, 4), normal(6, 4, key="b")
    p, q = expit(t.double().numpy() / 2), expit(z.double().numpy() / 2)
    wanted = 4 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
    assert float(divergence("multilabel", z, t, 2.0)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "kind", ["classification", "multilabel", "segmentation", "regression", "reconstruction", "survival"]
)
def test_it_is_zero_where_both_say_the_same_and_positive_elsewhere(kind: str) -> None:
    z, t = normal(5, 3), normal(5, 3, key="b")
    assert float(divergence(kind, z, z, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(kind, z, t, 2.0)) > 0.01


def test_a_kind_that_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match="poetry cannot be distilled"):
        divergence("poetry", normal(2, 2), normal(2, 2))


@pytest.mark.parametrize(
    ("task", "features"),
    [
        (Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))), 8),
        (Classification(Network("mlp", (7,), 2, (("width", 5),))), 5),
        (Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch")))), 2),
    ],
)
def test_width_is_what_enters_the_head(task: Classification, features: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert head_width(task.network) == features
    assert torch.equal(torch.get_rng_state(), before)
    assert pooled(torch.zeros(2, 3, 4, 4)).shape == (2, 3)


def test_one_step_of_dual_distillation_is_the_equations_in_numpy() -> None:
    """Linear models, whose representation is their input: FedKD's losses (Nature Communications 2022, Methods)."""
    task = Classification(Network("mlp", (5,), 3, (("depth", 0),)))
    dual, lr, n = Dual(task, task), 0.2, 9
    data = Rows(normal(n, 5), torch.arange(n) % 3)
    start = initial(dual.model, 4)
    site = Site("s", {"train": data})
    end = LocalTraining(steps=1, batch_size=100, lr=lr).fit(dual, start, site, 0)

    x, y = data.x.double().numpy(), np.eye(3)[data.y.numpy()]
    W = {name: leaf.double().numpy() for name, leaf in start.items()}
    p_t, p_s = (softmax(x @ W[f"{m}.head.weight"].T + W[f"{m}.head.bias"], 1) for m in ("teacher", "student"))
    L_t, L_s = (-np.log((p * y).sum(1)).mean() for p in (p_t, p_s))
    c = L_t + L_s
    # d CE / dz = (p − y) / n;  d KL(q ‖ p) / dz = (p − q) / n
    g_t, g_s = ((p_t - y) + (p_t - p_s) / c) / n, ((p_s - y) + (p_s - p_t) / c) / n
    gap = x @ W["projection.weight"].T - x  # W_h h_s − h_t
    g_w = 2 * gap.T @ x / gap.size / c
    wanted = {
        "teacher.head.weight": W["teacher.head.weight"] - lr * g_t.T @ x,
        "teacher.head.bias": W["teacher.head.bias"] - lr * g_t.sum(0),
        "student.head.weight": W["student.head.weight"] - lr * g_s.T @ x,
        "student.head.bias": W["student.head.bias"] - lr * g_s.sum(0),
        "projection.weight": W["projection.weight"] - lr * g_w,
    }
    assert wanted.keys() == end.keys()
    for name, leaf in wanted.items():
        assert np.allclose(end[name].numpy(), leaf, atol=1e-5), name


def test_representations_are_drawn_together() -> None:
    task = Classification(Network("mlp", (6,), 2, (("width", 4),)))
    dual = Dual(task, task, labels=(0, 0), decision=(0, 0), adaptive=False)
    site = Site("s", {"train": Rows(normal(32, 6), torch.arange(32) % 2)})
    start, batch = initial(dual.model, 0), site.data["train"][torch.arange(32)]
    end = LocalTraining(epochs=30, batch_size=32, lr=0.3).fit(dual, start, site, 0)
    losses = [dual.loss(cached_model(dual, params), batch).item() for params in (start, end)]
    assert losses[1] < 0.5 * losses[0]


def test_either_is_the_one_that_is_chosen() -> None:
    task = Classification(Network("mlp", (6,), 2, (("width", 4),)))
    other = Network("mlp", (6,), 2, (("width", 9), ("depth", 2)))
    both = either(task, other)
    model, x = both.model().eval(), normal(3, 6)
    assert torch.equal(model(x), model.get_submodule("first")(x))
    tree = {**params_of(model), "choice": torch.tensor(1.0)}
    chosen = cached_model(both, tree).eval()
    assert torch.equal(chosen(x), chosen.get_submodule("second")(x))
