"""Gated attention by its equation in numpy; bags have no order, and padding counts for nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from polyclinic.core.site import Site
from polyclinic.learning.networks.attention_mil import AttentionMIL, attention_mil
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows


def bags(n: Any, instances: Any = 6, features: Any = 5, key: Any = "x") -> Any:
    return torch.randn(n, instances, features, generator=Site("s").rng(key))


def test_attention_is_the_papers_equation_in_numpy() -> None:
    model, x = attention_mil((6, 5), 3, 8, 4).eval(), bags(7)
    assert isinstance(model, AttentionMIL)
    P = {k: v.detach().double().numpy() for k, v in model.named_parameters()}
    for bag, a, y in zip(x.double().numpy(), model.attention(x), model(x), strict=True):
        h = np.maximum(bag @ P["encoder.0.weight"].T + P["encoder.0.bias"], 0)
        V, U = (h @ P[f"{k}.weight"].T + P[f"{k}.bias"] for k in ("content", "gate"))
        wanted = softmax(((np.tanh(V) * expit(U)) @ P["score.weight"].T + P["score.bias"])[:, 0])
        assert np.allclose(a.detach().numpy(), wanted, atol=1e-5)
        assert np.allclose(y.detach().numpy(), wanted @ h @ P["head.weight"].T + P["head.bias"], atol=1e-5)


def test_order_and_padding_change_nothing() -> None:
    model, x = attention_mil((6, 5), 3).eval(), bags(4)
    assert isinstance(model, AttentionMIL)
    said = model(x)
    assert torch.allclose(model(x[:, torch.randperm(6)]), said, atol=1e-5)
    padded = torch.cat([x, torch.zeros(4, 3, 5)], 1)
    assert torch.allclose(model(padded), said, atol=1e-5)
    assert torch.equal(model.attention(padded)[:, 6:], torch.zeros(4, 3))
    assert model(torch.zeros(2, 6, 5)).isfinite().all()  # bags of nothing


def test_it_finds_the_instance_that_matters() -> None:
    """A bag is positive where one of its instances is bright; attention must point at it."""
    x, y = bags(120, 8, 4), torch.arange(120) % 2
    place = torch.randint(8, (120,), generator=Site("s").rng("p"))
    x[torch.arange(120), place] += 4.0 * y[:, None]
    task = Classification(Network("attention-mil", (8, 4), 2, (("attention", 8), ("width", 16))))
    site = Site("s", {"train": Rows(x[:80], y[:80])})
    end = LocalTraining(epochs=30, batch_size=16, lr=0.01, optimizer="adam").fit(task, task.first(0), site, 0)
    model = cached_model(task, end).eval()
    assert isinstance(model, AttentionMIL)
    right = (model(x[80:]).argmax(1) == y[80:]).float().mean()
    assert right > 0.85
    positive = torch.arange(80, 120)[y[80:] == 1]
    found = (model.attention(x[positive]).argmax(1) == place[positive]).float().mean()
    assert found > 0.8
    h, z = represent(task.network, model, x[:3])
    assert torch.allclose(model.head(h), z)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="bags of \\(instances, features\\)"):
        attention_mil((2, 8, 8), 2)
