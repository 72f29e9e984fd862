"""Pseudo-labels: the loss by its definition, views that show the same places, and FedSemi's limits."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.pseudo_labels import pseudo_loss, two_views
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.fedsemi import FedSemi
from tests.conftest import little_sites, segmentation_sites
from tests.support.few_labels import half_labeled, only_labels, run, same, with_other_targets

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.1)


@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 4, 4)])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.1])
def test_the_loss_is_its_equation_in_numpy(shape: tuple[int, ...], threshold: float) -> None:
    z, p = torch.randn(shape, generator=Site("s").rng("z")), torch.randn(shape, generator=Site("s").rng("p")).softmax(1)
    Z, P = (np.moveaxis(a.double().numpy(), 1, -1).reshape(-1, 3) for a in (z, p))
    terms = [-(Z[i, P[i].argmax()] - np.log(np.exp(Z[i]).sum())) * (P[i].max() >= threshold) for i in range(len(Z))]
    assert float(pseudo_loss(z, p, threshold)) == pytest.approx(np.mean(terms), rel=1e-4)


def test_views_of_a_mask_show_the_same_places() -> None:
    x = torch.zeros(6, 1, 16, 16)
    x[:, :, 3:8, 6:12] = 10
    weak, strong = two_views("segmentation", x, Site("s").rng("v"))
    assert not torch.equal(weak, strong)
    bright = [(v - v.mean((2, 3), keepdim=True) > 2) for v in (weak, strong)]
    assert (bright[0] == bright[1]).float().mean() > 0.9
    a, b = two_views("classification", x, Site("s").rng("v"))
    assert not torch.equal((a > 5), (b > 5))


def test_with_labels_alone_it_is_fedavg(task: Classification) -> None:
    sites = {name: only_labels(site) for name, site in little_sites().items()}
    step, _ = run(FedSemi(task, LOCAL), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert same(step.state.params, plain.state.params)


def test_in_the_warm_up_it_is_fedavg_of_the_labeled_sites(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    step, _ = run(FedSemi(task, LOCAL, rounds=5, warmup=1.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), {k: sites[k] for k in ("site-0", "site-1")}, task.first(0))
    assert same(step.state.params, plain.state.params)


def test_unlabeled_images_count_by_trust_and_their_targets_not_at_all(task: Classification) -> None:
    sites = half_labeled(labeled=1)
    method = FedSemi(task, LOCAL, warmup=0.0, trust=0.25, threshold=0.5)
    request = method.request(method.init(task.first(0)))
    weights = [method.site_update(request, {}, site)[0].mean("update").weight for site in sites.values()]
    assert weights == [12, 0.25 * 17, 0.25 * 22]
    one, two = (run(method, s, task.first(0), 3)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)
    never, _ = run(FedSemi(task, LOCAL, rounds=3, warmup=1.0), sites, task.first(0), 3)
    assert not same(one.params, never.state.params)


@pytest.mark.slow
def test_it_helps_segmentation_where_two_of_three_sites_have_no_masks() -> None:
    task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 4), ("norm", "batch"))))
    sites = half_labeled(labeled=1, sites=segmentation_sites())
    local = LocalTraining(epochs=6, batch_size=5, lr=0.01, optimizer="adam")

    def dice(warmup: Any) -> Any:
        method = Evaluated(FedSemi(task, local, rounds=6, warmup=warmup, threshold=0.6), task)
        step, engine = run(method, sites, task.first(0), 6)
        return np.mean([float(s["dice"]) for s in evaluate(method, engine, step.state, engine.sites).values()])

    assert dice(0.5) > dice(1.0) + 0.1
