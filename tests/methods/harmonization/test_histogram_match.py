"""Histogram matching: numpy's interpolation, pooled quantiles, and scanners that bend the scale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.histogram_match import histogram_match
from polyclinic.methods.harmonization.monotone_front import MonotoneMap
from tests.conftest import Rows


def matched(method: Any, sites: Any, params: Any) -> Any:
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=1):
        assert not step.lost
        state = step.state
    found = {}
    for name, site in sites.items():
        model = cached_model(
            method.prediction_task, method.site_model(method.evaluation_request(state), federation.memory[name])
        )
        found[name] = model.get_submodule("front")(site.data["train"].x)
    return found


def test_the_map_is_numpys_interpolation() -> None:
    rng = np.random.default_rng(0)
    front, x = MonotoneMap(2, 6)(), rng.normal(size=(3, 2, 4, 5)).astype("float32") * 3
    here, there = np.sort(rng.normal(size=(2, 2, 6)).astype("float32"), 2)
    front.get_buffer("here").copy_(torch.from_numpy(here))
    front.get_buffer("there").copy_(torch.from_numpy(there))
    found = front(torch.from_numpy(x)).numpy()
    for c in range(2):
        expected = np.interp(x[:, c], here[c], there[c])
        expected += np.minimum(x[:, c] - here[c, 0], 0) + np.maximum(x[:, c] - here[c, -1], 0)
        np.testing.assert_allclose(found[:, c], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (1, 3, 4, 5)])
def test_the_map_begins_as_the_identity_and_never_turns_back(shape: tuple[int, ...]) -> None:
    front, x = MonotoneMap(shape[0], 9)(), torch.randn(5, *shape) * 2
    torch.testing.assert_close(front(x), x, rtol=1e-5, atol=1e-6)
    front.get_buffer("there").copy_(torch.randn(shape[0], 9).cumsum(1).sort(1).values)
    line = torch.linspace(-3, 3, 50).view(50, *[1] * len(shape)).expand(50, *shape)
    assert (front(line).diff(dim=0) >= -1e-6).all()


def test_scanners_that_bend_the_scale_come_to_agree() -> None:
    """The same kind of patients seen through x, 2x + 3 and a steep curve: afterwards their quantiles agree."""
    rng, sites = torch.Generator().manual_seed(0), {}
    bends: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda v: v,
        lambda v: 2 * v + 3,
        lambda v: (0.7 * v).exp(),
    )
    for k, bend in enumerate(bends):
        x = bend(torch.randn(300, 1, 6, 6, generator=rng))
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x, torch.arange(300) % 2)})
    task = Classification(Network("cnn", (1, 6, 6), 2, (("width", 2), ("depth", 1))))
    found = matched(histogram_match(task, LocalTraining(), knots=33), sites, task.first())
    qs = torch.linspace(0.05, 0.95, 10)
    pooled = torch.cat([s.data["train"].x for s in sites.values()]).flatten().quantile(qs)
    before = [s.data["train"].x.flatten().quantile(qs) for s in sites.values()]
    after = [x.flatten().quantile(qs) for x in found.values()]
    for b, a in zip(before, after, strict=True):
        assert (a - pooled).abs().max() < 0.25
        assert (a - pooled).abs().max() < 0.3 * (b - pooled).abs().max()


def test_a_site_alone_is_left_alone() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    task = Classification(Network("mlp", (3,), 2))
    site = Site("a", {"train": Rows(x, torch.arange(200) % 2)})
    found = matched(histogram_match(task, LocalTraining()), {"a": site}, task.first())["a"]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
