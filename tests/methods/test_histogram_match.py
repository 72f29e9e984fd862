"""Histogram matching: numpy's interpolation, pooled quantiles, and scanners that bend the scale."""

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.core.train import train
from polyclinic.engines.in_process import InProcess
from polyclinic.methods.histogram_match import histogram_match
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.local import Local
from polyclinic.tasks.monotone import MonotoneMap
from polyclinic.tasks.networks import Network
from polyclinic.tasks.task import borrow
from tests.conftest import Rows


def matched(method, sites, params):
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=1):
        assert not step.lost
        state = step.state
    found = {}
    for name, site in sites.items():
        model = borrow(method.predicts, method.model_at(method.trial(state), federation.memory[name]))
        found[name] = model.get_submodule("front")(site.data["train"].x)
    return found


def test_the_map_is_numpys_interpolation() -> None:
    dice = np.random.default_rng(0)
    front, x = MonotoneMap(2, 6)(), dice.normal(size=(3, 2, 4, 5)).astype("float32") * 3
    here, there = np.sort(dice.normal(size=(2, 2, 6)).astype("float32"), 2)
    front.here.copy_(torch.from_numpy(here))
    front.there.copy_(torch.from_numpy(there))
    found = front(torch.from_numpy(x)).numpy()
    for c in range(2):
        expected = np.interp(x[:, c], here[c], there[c])
        expected += np.minimum(x[:, c] - here[c, 0], 0) + np.maximum(x[:, c] - here[c, -1], 0)
        np.testing.assert_allclose(found[:, c], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (1, 3, 4, 5)])
def test_the_map_begins_as_the_identity_and_never_turns_back(shape) -> None:
    front, x = MonotoneMap(shape[0], 9)(), torch.randn(5, *shape) * 2
    torch.testing.assert_close(front(x), x, rtol=1e-5, atol=1e-6)
    front.there.copy_(torch.randn(shape[0], 9).cumsum(1).sort(1).values)
    line = torch.linspace(-3, 3, 50).view(50, *[1] * len(shape)).expand(50, *shape)
    assert (front(line).diff(dim=0) >= -1e-6).all()


def test_scanners_that_bend_the_scale_come_to_agree() -> None:
    """The same kind of patients seen through x, 2x + 3 and a steep curve: afterwards their quantiles agree."""
    dice, sites = torch.Generator().manual_seed(0), {}
    for k, bend in enumerate((lambda v: v, lambda v: 2 * v + 3, lambda v: (0.7 * v).exp())):
        x = bend(torch.randn(300, 1, 6, 6, generator=dice))
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x, torch.arange(300) % 2)})
    task = Classification(Network("cnn", (1, 6, 6), 2, (("width", 2), ("depth", 1))))
    found = matched(histogram_match(task, Local(), knots=33), sites, task.first())
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
    found = matched(histogram_match(task, Local()), {"a": site}, task.first())["a"]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
