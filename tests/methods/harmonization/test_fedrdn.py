"""FedRDN: the statistics in numpy, its steps, and the statistics with which each kind of site predicts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import Augment
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.fedrdn import FedRDN, statistics
from tests.conftest import Rows, blobs
from tests.support.agreement import KINDS, agree, change, place, ready

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)


def began(task: Any, sites: Any, local: Any = LOCAL) -> Any:
    """The method after its statistics, and the sites' memories."""
    method = FedRDN(task, local)
    engine = InProcess(method, sites)
    steps = train(method, engine, method.init(task.first()), rounds=1)
    return method, next(steps).state, engine.memory


def test_statistics_are_the_mean_over_images_of_each_channel() -> None:
    x = torch.randn(300, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.0]).view(
        3, 1, 1
    )
    found = statistics(Rows(x, torch.zeros(300)), (3, 1, 1))
    np.testing.assert_allclose(found["mean"][:, 0, 0], x.numpy().mean((2, 3)).mean(0), atol=1e-6)
    np.testing.assert_allclose(found["std"][:2, 0, 0], x.numpy().std((2, 3)).mean(0)[:2], rtol=1e-5)
    assert float(found["std"][2]) > 0  # a constant channel divides by no 0
    with pytest.raises(ConfigError, match="without images"):
        statistics(Rows(x[:0], torch.zeros(0)), (3, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_of_a_step_has_the_statistics_of_a_drawn_site(kind: str) -> None:
    task, sites = place(kind)
    method, state, memory = began(task, sites)
    site = sites["site-1"]
    found = method.site_update(method.request(state), memory["site-1"], site)[0].mean("update").value
    known = [
        statistics(sites[name].data["train"], (1, *[1] * (len(task.network.inputs) - 1))) for name in sorted(sites)
    ]
    model, rng = ready(task, task.first()), site.rng(0, "train", "train", "")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.randint(2**62, (), generator=rng)
    data, drawn = site.data["train"], set()
    for _ in range(2):
        order = torch.randperm(len(data), generator=rng)
        for chunk in [c for c in order.split(8) if len(c) > 1]:
            j = torch.randint(3, (len(chunk),), generator=rng)
            drawn |= set(j.tolist())
            x = torch.stack([(data.x[i] - known[k]["mean"]) / known[k]["std"] for i, k in zip(chunk, j, strict=True)])
            optimizer.zero_grad()
            F.cross_entropy(model(x), data.y[chunk]).backward()
            optimizer.step()
    agree(found, change(model, task.first()))
    assert drawn == {0, 1, 2}


def test_sites_predict_with_their_own_statistics_and_strangers_with_those_of_their_images(
    task: Classification, sites: dict[str, Site]
) -> None:
    method, state, memory = began(task, sites)
    request, x = method.request(state), torch.randn(5, 1, 8, 8) * 3 + 2
    plain = cached_model(task, state.params).eval()
    far = Site("elsewhere", {"test": blobs(7, 9, (1, 8, 8), shift=5.0)})
    for site, own, role in ((sites["site-2"], memory["site-2"], "train"), (far, {}, "test")):
        params = method.adapted_model(request, own, site, role)
        found = statistics(site.data[role], (1, 1, 1))
        with torch.no_grad():
            z = cached_model(method.prediction_task, params, slot="found").eval()(x)
            torch.testing.assert_close(z, plain((x - found["mean"]) / found["std"]), atol=1e-4, rtol=1e-4)
    shared = method.shared_model(state)
    mean = torch.stack([memory[s]["statistics"]["mean"] for s in sites]).mean(0)
    std = torch.stack([memory[s]["statistics"]["std"] for s in sites]).mean(0)
    torch.testing.assert_close(shared["front.shift"], -mean / std)
    assert method.capabilities.needs_each_reply


def test_a_studys_own_augmentation_comes_first_and_tables_are_refused(sites: dict[str, Site]) -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    seen: list[int] = []

    class Counting(Augment):
        def __call__(self, batch: Any, rng: Any) -> Any:
            seen.append(len(batch[0]))
            return super().__call__(batch, rng)

    method, state, memory = began(task, sites, LocalTraining(steps=2, batch_size=8, augment=Counting()))
    method.site_update(method.request(state), memory["site-0"], sites["site-0"])
    assert len(seen) == 2
    with pytest.raises(ConfigError, match="standardizes images"):
        FedRDN(Classification(Network("mlp", (6,), 2)))
