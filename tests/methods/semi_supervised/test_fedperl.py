"""FedPerl's descriptors, similarities and anonymous peers, written again in numpy; its limits; who sees what."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import STILL
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.fedperl import FedPerl, anonymous_peers, descriptor, similarities
from tests.conftest import little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, agree, minibatches, place, ready
from tests.support.few_labels import half_labeled, near, only_labels, run, same, with_other_targets, without_labels

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def models(task: Any, count: Any = 5) -> Any:
    return {f"site-{i}": task.first(i) for i in range(count)}


def numpy_similarities(found: Any) -> Any:
    """The published steps: (μ, σ) of every tensor, each column scaled to 0...1 over the sites, then the cosine."""
    d = np.array([[f(leaf.double().numpy()) for leaf in model.values() for f in (np.mean, np.std)] for model in found])
    for column in d.T:
        spread = column.max() - column.min()
        column[:] = (column - column.min()) / spread if spread else 1
    return np.array([[a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for b in d] for a in d])


@pytest.mark.parametrize("name", NETWORKS)
def test_descriptors_and_similarities_are_the_published_ones(name: str) -> None:
    """With batch and group normalization and a transformer, in two and three dimensions; all models share a tensor."""
    found = {site: dict(model) for site, model in models(Classification(NETWORKS[name][0])).items()}
    for model in found.values():
        model["constant"] = found["site-0"][next(iter(found["site-0"]))]
    assert descriptor(found["site-0"]).shape == (2 * len(found["site-0"]),)
    wanted, got = numpy_similarities(list(found.values())), similarities(found).numpy()
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(got[off], wanted[off], atol=1e-9)
    assert (got[~off] == -1).all()


@pytest.mark.parametrize("count", [2, 3])
def test_the_peer_is_the_average_of_the_most_similar_others(task: Classification, count: int) -> None:
    """Equation 6: one anonymous peer, the mean of the T most similar models."""
    found = models(task)
    wanted = numpy_similarities(list(found.values()))
    np.fill_diagonal(wanted, -np.inf)
    got = anonymous_peers(found, count)
    for i, name in enumerate(found):
        nearest = np.argsort(-wanted[i])[:count]
        for leaf in found[name]:
            mean = np.mean([found[f"site-{j}"][leaf].double().numpy() for j in nearest], axis=0)
            assert np.allclose(got[name][leaf].numpy(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_minibatches_without_labels_are_the_published_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 4 to 6: labels by the site and its peer for one view, and the distance of their predictions."""
    monkeypatch.setattr("polyclinic.methods.semi_supervised.fedperl.two_views", lambda kind, x, rng: (x, x.flip(-1)))
    task, sites = place(kind)
    site, local = without_labels(sites["site-2"]), LocalTraining(steps=2, batch_size=8, lr=0.05)
    start, peer = task.first(0), task.first(1)
    x, _ = next(minibatches(local, site, data=site.data["unlabeled"]))
    with torch.no_grad():
        both = ready(task, start)(x).softmax(1) + ready(task, peer).eval()(x).softmax(1)
    limit = float(both.max(1).values.sort().values[3:5].mean()) / 2  # four images of the first minibatch are below
    method = FedPerl(task, 10, local, threshold=limit, trust=0.7, agreement=2.0)
    request = method.request(method.init(start))
    request = replace(request, trees={**request.trees, "peer": peer})
    found = tree.under("model", method.site_update(request, {}, site)[0].gather("model")["site-2"])

    model, other = ready(task, start), ready(task, peer).eval()
    optimizer, used = torch.optim.SGD(model.parameters(), 0.05), 0
    for x, _ in minibatches(local, site, data=site.data["unlabeled"]):
        p = model(x).softmax(1)
        with torch.no_grad():
            q = other(x).softmax(1)
            likely, label = ((p + q) / 2).max(1)
            sure = (likely >= limit).nonzero().flatten()
        used += len(sure)
        scores = model(x.flip(-1)).log_softmax(1)
        loss = 0.7 * -scores[sure, label[sure]].sum() / len(x) + 2.0 * ((p - q) ** 2).sum() / p.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(found, params_of(model))
    assert 0 < used < 16


def test_no_site_receives_another_sites_model(task: Classification) -> None:
    found = models(task, 5)
    for peer in anonymous_peers(found, 2).values():
        assert not any(near(peer, model) for model in found.values())
    assert anonymous_peers(models(task, 2), 2) == {}
    assert anonymous_peers({}, 2) == {}
    with pytest.raises(ValueError, match="set peers to 2 or more"):
        FedPerl(task, 10, LOCAL, peers=1)


def test_peers_arrive_after_the_warm_up_each_at_its_own_site(task: Classification, sites: dict[str, Site]) -> None:
    method = FedPerl(task, 10, LOCAL, warmup=0.1)
    step, _ = run(method, sites, task.first(0), 1)
    assert method.request(method.init(task.first(0))).per_site == {}
    request = method.request(step.state)
    assert set(request.per_site) == set(sites)
    wanted = anonymous_peers(step.state.models, 2)
    assert same(request.for_site("site-1").trees["peer"], wanted["site-1"])
    others = [step.state.models[name] for name in ("site-0", "site-2")]
    assert near(wanted["site-1"], tree.lerp(others[0], others[1], 0.5), 1e-6)


def test_with_labels_alone_it_is_fedavg(task: Classification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.methods.semi_supervised.fedperl.WEAK", STILL)
    sites = {name: only_labels(site) for name, site in little_sites().items()}
    step, _ = run(FedPerl(task, 10, LOCAL), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert near(step.state.params, plain.state.params, 1e-4)


def test_peers_matter_and_targets_of_unlabeled_images_do_not(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    one, two = (run(FedPerl(task, 10, LOCAL), s, task.first(0), 3)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)
    alone, _ = run(FedPerl(task, 10, LOCAL, trust=0.0, agreement=0.0), sites, task.first(0), 3)
    assert not near(one.params, alone.state.params)


def test_a_site_that_has_learned_nothing_is_nobodys_peer(task: Classification) -> None:
    step, _ = run(FedPerl(task, 10, LOCAL, warmup=0.9), half_labeled(labeled=2), task.first(0), 1)
    assert set(step.state.models) == {"site-0", "site-1"}
