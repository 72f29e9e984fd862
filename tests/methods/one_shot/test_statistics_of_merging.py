"""Merging with statistics of the sites' data: Fisher merging, RegMean, and the random mask of DARE."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.fisher import FisherMerging
from polyclinic.methods.one_shot.merging import Merging, thinned
from polyclinic.methods.one_shot.regmean import RegMean, _inputs_of, _rows
from tests.conftest import Rows, little_sites

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.1)
LINEAR = Network.of(lambda: nn.Sequential(nn.Linear(6, 3)), (6,), 3, head="0.bias")


def rows(seed: int, n: int = 60) -> Rows:
    rng = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(n, 6, generator=rng) * (1 + seed), torch.randint(3, (n,), generator=rng))


def merged(method: Any, params: Tree, sites: dict[str, Site]) -> tuple[Tree, dict[str, Tree]]:
    """The merged model, and each site's own after the same training."""
    state = method.init(params)
    request = method.request(state)
    replies = [method.site_update(request, {}, site)[0] for site in sites.values()]
    after = method.server_update(state, sum(replies, Reply()), Site("server"))
    assert method.request(after) is None
    return after.params, {name: LOCAL.fit(method.task, params, site, 0) for name, site in sites.items()}


def test_fisher_information_of_a_linear_model_is_that_of_the_formula() -> None:
    """For softmax regression F = E[p_k (1 - p_k) x²]."""
    task, data = Classification(LINEAR), rows(0, 1500)
    params = {"0.weight": 0.3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(5)), "0.bias": torch.zeros(3)}
    found = FisherMerging(task, LOCAL, examples=1500, floor=1e-9).information(params, Site("a", {"train": data}))
    p = (data.x @ params["0.weight"].T).softmax(1)
    expected = torch.einsum("nk,nd->kd", p * (1 - p), data.x.square()) / len(data)
    torch.testing.assert_close(found["0.weight"], expected, rtol=0.25, atol=0)
    torch.testing.assert_close(found["0.bias"], (p * (1 - p)).mean(0), rtol=0.15, atol=0)


def test_fisher_merging_is_the_weighted_mean_of_the_sites_models() -> None:
    task, sites = Classification(LINEAR), {k: Site(k, {"train": rows(i, 30 + 10 * i)}) for i, k in enumerate("ab")}
    method, params = FisherMerging(task, LOCAL), task.first(0)
    after, ends = merged(method, params, sites)
    above = below = torch.zeros(3, 6)
    for name, site in sites.items():
        weight = len(site.data["train"]) * method.information(ends[name], site)["0.weight"]
        above, below = above + weight * ends[name]["0.weight"], below + weight
    torch.testing.assert_close(after["0.weight"], above / below, rtol=1e-4, atol=1e-5)
    equal, _ = merged(replace(method, floor=1e9), params, sites)
    mean = sum(len(sites[k].data["train"]) * ends[k]["0.weight"] for k in "ab") / 70  # type: ignore[operator]
    torch.testing.assert_close(equal["0.weight"], mean, rtol=1e-4, atol=1e-5)


def test_regmean_predicts_what_the_sites_predict_on_their_own_data() -> None:
    """With α = 1, one layer is the least squares solution of all sites' rows stacked (a second implementation)."""
    task, sites = Classification(LINEAR), {k: Site(k, {"train": rows(i, 30 + 10 * i)}) for i, k in enumerate("ab")}
    after, ends = merged(RegMean(task, LOCAL, alpha=1.0), task.first(0), sites)
    x = torch.cat([sites[k].data["train"].x for k in "ab"])
    wanted = torch.cat([sites[k].data["train"].x @ ends[k]["0.weight"].T for k in "ab"])
    torch.testing.assert_close(after["0.weight"], torch.linalg.lstsq(x, wanted).solution.T, rtol=1e-3, atol=1e-4)
    # with α = 0, each column is the mean of the sites' with the sum of squares of its input as weight
    squares = {k: sites[k].data["train"].x.square().sum(0) for k in "ab"}
    expected = sum(squares[k] * ends[k]["0.weight"] for k in "ab") / sum(squares.values())
    apart, _ = merged(RegMean(task, LOCAL, alpha=0.0), task.first(0), sites)
    torch.testing.assert_close(apart["0.weight"], expected, rtol=1e-3, atol=1e-4)
    plain, _ = merged(RegMean(task, LOCAL, largest=1), task.first(0), sites)
    mean = sum(len(sites[k].data["train"]) * ends[k]["0.weight"] for k in "ab") / 70  # type: ignore[operator]
    torch.testing.assert_close(plain["0.weight"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FisherMerging, RegMean])
def test_the_merge_of_one_site_is_its_model(kind: Any) -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    after, ends = merged(kind(task, LOCAL), task.first(0), {"site-0": little_sites()["site-0"]})
    for name, leaf in ends["site-0"].items():
        torch.testing.assert_close(after[name], leaf, rtol=1e-3, atol=1e-4)


def test_a_convolution_is_a_linear_layer_of_its_patches() -> None:
    x = torch.randn(2, 3, 9, 8)
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), bias=False)
    assert _inputs_of(layer) == 18
    found = _rows(layer, x) @ layer.weight.flatten(1).T
    torch.testing.assert_close(found, layer(x).flatten(2).transpose(1, 2).flatten(0, 1))
    for other in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(1, 1, 3, padding="same"), nn.Conv3d(1, 1, 3), nn.ReLU()):
        assert _inputs_of(other) == 0


def test_dare_drops_entries_and_keeps_the_expectation() -> None:
    vector = {"b": torch.ones(300), "a": torch.ones(40, 50)}
    found = thinned(vector, 0.75, "lyon")
    assert set(found["a"].unique().tolist()) == {0.0, 4.0}
    assert float(tree.flatten(found).mean()) == pytest.approx(1.0, abs=0.1)
    assert all(torch.equal(found[k], leaf) for k, leaf in thinned(dict(reversed(vector.items())), 0.75, "lyon").items())
    assert not torch.equal(found["a"], thinned(vector, 0.75, "kiel")["a"])
    direction = Merging(dare=0.75).direction({"lyon": vector, "kiel": vector})
    assert torch.equal(direction["a"], found["a"] + thinned(vector, 0.75, "kiel")["a"]) or torch.equal(
        direction["a"], thinned(vector, 0.75, "kiel")["a"] + found["a"]
    )


def test_options_that_make_no_sense_are_refused() -> None:
    task = Classification(LINEAR)
    for make, message in (
        (lambda: RegMean(task, alpha=1.5), "alpha must be from 0 to 1, not 1.5"),
        (lambda: FisherMerging(task, floor=0.0), "floor a positive number"),
        (lambda: Merging(dare=1.0), "dare is the share of entries to drop"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
