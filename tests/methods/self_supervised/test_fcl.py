"""FCL: which slices count as alike, the loss in numpy, and what other sites' features do."""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from polyclinic.core.site import Site
from polyclinic.errors import DataError
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.contrastive import Contrast, alike, partitions
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import STILL
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.self_supervised.fcl import FCL, fcl
from tests.conftest import Rows, little_sites
from tests.support.few_labels import half_labeled, near, run, same, with_other_targets
from tests.support.known import known

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def with_positions(sites: Any) -> Any:
    """The same sites, whose images know where in the body they lie: brighter above."""
    found = {}
    for name, site in sites.items():
        roles = dict(site.data)
        for role in ("train", "unlabeled"):
            data = Rows(roles[role].x.clone(), roles[role].y)
            data.positions = torch.rand(len(data), generator=Site(name).rng(role))
            data.x += 4 * data.positions.view(-1, 1, 1, 1)
            roles[role] = data
        found[name] = replace(site, data=roles)
    return found


def test_partitions_cut_a_volume_evenly_and_are_unknown_without_positions() -> None:
    data, unknown = Rows(torch.zeros(5, 1), torch.zeros(5)), Rows(torch.zeros(2, 1), torch.zeros(2))
    data.positions, unknown.positions = [0.0, 0.24, 0.25, 0.99, 1.0], None
    assert partitions((data, unknown), 4).tolist() == [0, 0, 1, 3, 3, -1, -1]
    assert partitions((), 4).tolist() == []
    assert alike(torch.tensor([1, -1]), torch.tensor([1, -1, 2, 1])).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


def test_the_loss_is_its_equation_in_numpy(task: Classification, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice: the mean over its partition's keys of −log softmax over all keys, own, queued and remote."""
    monkeypatch.setattr("polyclinic.methods.self_supervised.fcl.STRONG", STILL)
    contrast, site = Contrast(task, 6, 0.5), with_positions(little_sites())["site-0"]
    site = replace(site, data={"train": site.data["train"]})
    method = FCL(contrast, LocalTraining(steps=1, batch_size=100, lr=0.0), parts=3)
    request = method.request(method.init(task.first(0)))
    unit = torch.nn.functional.normalize(torch.randn(9, 6, generator=Site("s").rng("k")), dim=1)
    place = torch.arange(9) % 3
    memory = {"queue": {"keys": unit[:5], "places": place[:5]}}
    request = replace(request, trees={**request.trees, "features": {"other/keys": unit[5:], "other/places": place[5:]}})
    losses, real = list[float](), cast(Any, torch.Tensor.backward)

    def backward(self: torch.Tensor, *a: Any, **k: Any) -> None:
        losses.append(self.item())
        real(self, *a, **k)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    method.site_update(request, memory, site)
    monkeypatch.undo()

    model = cached_model(contrast, request.trees["whole"]).train()
    k = contrast.embed(model, site.data["train"].x).detach().double().numpy()
    here = partitions((site.data["train"],), 3).numpy()
    keys, where = np.r_[k, unit.double().numpy()], np.r_[here, place.numpy()]
    terms = []
    for i in range(len(k)):
        z = keys @ k[i] / 0.5
        same_part = (where == here[i]) | (np.arange(len(keys)) == i)
        terms.append(-np.mean(z[same_part] - logsumexp(z)))
    assert losses == pytest.approx([np.mean(terms)], rel=1e-3)


def test_features_of_single_images_travel_and_matter(task: Classification) -> None:
    sites = with_positions(little_sites())
    method = FCL(Contrast(task, 8), LOCAL, exchange=7)
    step, engine = run(method, sites, task.first(0), 1)
    sent = step.reply.gather("features")
    assert {name: tuple(x["keys"].shape) for name, x in sent.items()} == dict.fromkeys(sites, (7, 8))
    assert engine.memory["site-0"]["queue"]["keys"].shape == (24, 8)
    request = method.request(step.state)
    alone = replace(request, trees={**request.trees, "features": {}})
    own = replace(
        request,
        trees={**request.trees, "features": {k: v for k, v in request.trees["features"].items() if "site-1" in k}},
    )
    found, without, only = (
        method.site_update(a, {}, sites["site-1"])[0].mean("update").total for a in (request, alone, own)
    )
    assert not near(found, without)
    assert same(only, without)  # a site's own features come back to it and are not used


def test_targets_are_never_read_in_the_first_phase_and_labels_in_the_second(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    one, two = (run(fcl(task, LOCAL, 4), s, task.first(0), 4)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)
    assert not torch.equal(one.params["head.weight"], task.first(0)["head.weight"])


def test_slices_of_one_part_become_alike(task: Classification) -> None:
    sites = with_positions(little_sites())
    contrast = Contrast(task, 8)
    step, _ = run(FCL(contrast, LocalTraining(epochs=4, batch_size=8, lr=0.1), parts=3), sites, task.first(0), 4)
    start = FCL(contrast).init(task.first(0)).whole
    data = sites["site-1"].data["train"]
    place = partitions((data,), 3)

    def gap(whole: Any) -> Any:
        k = contrast.keys(whole, data)
        near, far = alike(place, place).bool(), ~alike(place, place).bool()
        return float((k @ k.T)[near].mean() - (k @ k.T)[far].mean())

    assert gap(step.state.whole) > gap(start) + 0.05


def test_images_without_a_height_are_refused(task: Classification, sites: dict[str, Site]) -> None:
    method = fcl(task, LocalTraining(batch_size=8), 4)
    for data in sites["site-0"].data.values():
        data.positions = None
    with pytest.raises(DataError, match="site 'site-0' has one: set position in"):
        method.site_update(known(method.request(method.init(task.first()))), {}, sites["site-0"])
