"""Contrastive losses in numpy, representations of every kind of network, and Gaussians that are what they describe."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import spearmanr

from polyclinic.core.site import Site
from polyclinic.learning.networks.latent import encoded
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.contrastive import (
    Contrast,
    drawn,
    extended,
    gaussian,
    momentum_nce,
    nce,
    similarity,
)
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from tests.conftest import Rows


def normal(*shape: Any, key: Any = "a") -> Any:
    return torch.randn(*shape, generator=Site("s").rng(key))


def unit(*shape: Any, key: Any = "a") -> Any:
    return torch.nn.functional.normalize(normal(*shape, key=key), dim=1)


def test_mocos_loss_is_its_equation_in_numpy() -> None:
    q, k, negatives, t = unit(6, 8), unit(6, 8, key="b"), unit(20, 8, key="c"), 0.2
    Q, K, N = (x.double().numpy() for x in (q, k, negatives))
    wanted = np.mean([-(Q[i] @ K[i] / t) + logsumexp(np.r_[Q[i] @ K[i], N @ Q[i]] / t) for i in range(6)])
    assert float(momentum_nce(q, k, negatives, t)) == pytest.approx(wanted, rel=1e-4)
    assert float(momentum_nce(q, k, negatives[:0], t)) == pytest.approx(0, abs=1e-6)


def test_nce_with_several_positives_and_rows_without_any() -> None:
    logits, positive = normal(3, 5), torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    z = logits.double().numpy()
    log_p = z - logsumexp(z, axis=1, keepdims=True)
    wanted = (-(log_p[0, 0] + log_p[0, 2]) / 2 - log_p[2, 4]) / 2
    assert float(nce(logits, positive)) == pytest.approx(wanted, rel=1e-4)


def test_nt_xent_pairs_each_view_with_its_other(task: Classification) -> None:
    contrast = Contrast(task, width=6, temperature=0.5)
    model, x = contrast.model().eval(), normal(8, 1, 8, 8)
    z = contrast.embed(model, x).detach().double().numpy()
    logits = z @ z.T / 0.5
    wanted = np.mean([-logits[i, (i + 4) % 8] + logsumexp(np.delete(logits[i], i)) for i in range(8)])
    assert contrast.loss(model, (x, torch.zeros(8))).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "features"),
    [
        (Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))), 8),
        (Classification(Network("cnn", (1, 6, 8, 8), 2, (("width", 4), ("depth", 2)))), 8),
        (Classification(Network("mlp", (7,), 2, (("width", 5),))), 5),
        (Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch")))), 16),
        (Segmentation(Network("segresnet", (1, 16, 16), 2)), 64),
        (Segmentation(Network("dynunet", (1, 16, 16), 2)), 256),
    ],
)
def test_every_network_has_a_representation(task: Classification, features: int) -> None:
    model = task.model().eval()
    h = encoded(task.network, model, normal(2, *task.network.inputs))
    assert h.shape == (2, features)
    h.sum().backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert touched
    assert not any(task.network.in_head(name) for name in touched)


def test_the_extended_model_begins_with_the_studys(task: Classification) -> None:
    contrast = Contrast(task, width=6)
    params = task.first(5)
    whole = extended(contrast, params)
    assert all(torch.equal(whole[f"backbone.{name}"], leaf) for name, leaf in params.items())
    data = Rows(normal(10, 1, 8, 8), torch.zeros(10))
    keys = contrast.keys(whole, data, size=4)
    model = cached_model(contrast, whole).eval()
    assert torch.allclose(keys, contrast.embed(model, data.x).detach(), atol=1e-5)
    assert torch.allclose(keys.norm(dim=1), torch.ones(10), atol=1e-5)


def test_a_gaussian_is_drawn_as_it_was_measured() -> None:
    keys = normal(500, 4) * torch.tensor([0.1, 0.2, 0.05, 0.01]) + torch.tensor([1.0, 0, 0, 0])
    found = gaussian(keys)
    assert np.allclose(found["covariance"].numpy(), np.cov(keys.numpy().T), atol=1e-5)
    again = drawn(found, 4000, Site("s").rng("d"))
    assert torch.allclose(again.norm(dim=1), torch.ones(4000), atol=1e-4)
    wanted = torch.nn.functional.normalize(keys, dim=1)
    assert torch.allclose(again.mean(0), wanted.mean(0), atol=0.02)
    assert torch.allclose(again.T.cov(), wanted.T.cov(), atol=0.005)
    assert gaussian(keys[:0]) == {}
    assert drawn(gaussian(keys[:1]), 3, Site("s").rng("d")).shape == (3, 4)


def test_similarity_is_scipys_rank_correlation_of_dissimilarities() -> None:
    one, two = unit(12, 5), unit(12, 5, key="b")
    i, j = np.triu_indices(12, 1)
    rdm = [1 - (k.numpy() @ k.numpy().T)[i, j] for k in (one, two)]
    assert similarity(one, two) == pytest.approx(spearmanr(*rdm).statistic, abs=1e-3)
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one[:2], two[:2]) == 0.0
