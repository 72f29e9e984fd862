"""Clustered federated learning against its published steps, with SciPy's linkage."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.site import Site
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.cfl import CFL, bipartition
from tests.support.agreement import KINDS, agree, place

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.1)
SERVER = Site("server")


@pytest.mark.parametrize("seed", range(5))
def test_the_division_is_complete_linkage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(7, 5))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    pairs = cosine[np.triu_indices(7, 1)]
    labels = fcluster(linkage(1 - pairs, "complete"), 2, "maxclust")
    found = set(bipartition(torch.from_numpy(x)))
    assert found in ({*np.flatnonzero(labels == 1)}, {*np.flatnonzero(labels == 2)})


@pytest.mark.parametrize("kind", KINDS)
def test_two_opposed_pairs_of_sites_divide_after_the_first_rounds(kind: str) -> None:
    """Changes that cancel in the mean; each cluster then moves by its own mean, and unseen sites get the larger one."""
    task, _ = place(kind)
    names, start = ("a", "b", "c", "d", "e"), task.first()
    method = CFL(task, names, LOCAL, mean_below=1e-3, largest_above=0.1, start_round=1)
    sign = {"a": 3.0, "b": 3.0, "c": -2.0, "d": -2.0, "e": -2.0}
    moves = {name: {n: torch.full_like(leaf, 0.1 * sign[name]) for n, leaf in start.items()} for name in names}
    state = method.init(start)
    for _ in range(2):  # no division in round 0
        assert len(state.clusters) == 1
        state = method.server_update(state, Reply({"update": PerSiteUniform(moves)}), SERVER)
    assert sorted(state.clusters) == [("a", "b"), ("c", "d", "e")]
    for sites, model in zip(state.clusters, state.models, strict=True):
        agree(model, {n: leaf + 0.1 * sign[sites[0]] for n, leaf in start.items()})
        for name in sites:
            assert method.request(state).for_site(name).trees["params"] is model
    assert state.params is state.models[state.clusters.index(("c", "d", "e"))]
    later = method.server_update(state, Reply({"update": PerSiteUniform({"a": moves["a"]})}), SERVER)
    assert later.clusters == state.clusters  # a cluster without replies keeps its model
    agree(later.params, state.params, 0.0)


def test_large_norms_or_too_few_sites_keep_one_cluster_and_one_cluster_is_fedavg() -> None:
    task, sites = place("cnn, batch")
    method, plain = CFL(task, tuple(sites), LOCAL), FedAvg(task, LOCAL, uniform=True)
    state, other = method.init(task.first()), plain.init(task.first())
    for _ in range(2):
        parts = [
            m.site_update(m.request(s).for_site(n), {}, site)[0]
            for n, site in sites.items()
            for m, s in [(method, state)]
        ]
        means = [plain.site_update(plain.request(other), {}, site)[0] for site in sites.values()]
        state = method.server_update(state, parts[0] + parts[1] + parts[2], SERVER)
        other = plain.server_update(other, means[0] + means[1] + means[2], SERVER)
    assert len(state.clusters) == 1
    agree(state.params, other.params)
    assert not method._divides(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 30)
    assert method._divides(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.1]]), 20)
    assert not method._divides(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.1]]), 19)
