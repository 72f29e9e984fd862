"""Rounds of federated adapters, written again, on networks of every kind.

A reference trains the plain network with the weights ``W + (α / r) B A`` (Hu et al., equation 3) by PyTorch's SGD on the
factors and the head. Everything else is constant, and batch normalization uses its stored statistics.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.adapters import LowRank
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from tests.conftest import little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, agree, in_head, largest_gap, mean, minibatches, sizes
from tests.support.few_labels import run
from tests.support.start_weights import weights_of

ROUNDS, RANK, ALPHA, ETA = 3, 2, 12.0, 0.1
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=ETA)
A, B = ".lora_down.weight", ".lora_up.weight"
Trained = Callable[..., bool]


def adapted(kind: str) -> Classification:
    network = NETWORKS[kind][0]
    return Classification(FineTuned(network, weights_of(network), ("adapters", "head"), LowRank((), RANK, ALPHA)))  # type: ignore[arg-type]


def product(down: Tensor, up: Tensor) -> Tensor:
    """``B A`` as a matrix of outputs × inputs, in the shape of the layer's weights."""
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


def trained_at(task: Classification, start: Tree, site: Site, round: int, moves: Trained) -> Tree:
    """The factors and the head after a round at a site."""
    plain = task.network.network().eval()  # type: ignore[attr-defined]
    constant = {n.replace(".base.", "."): x.clone() for n, x in task.model().state_dict().items() if "lora_" not in n}
    leaves = {n: x.clone().requires_grad_(moves(n)) for n, x in start.items()}
    optimizer = torch.optim.SGD([x for x in leaves.values() if x.requires_grad], ETA)
    for x, y in minibatches(LOCAL, site, round):
        weights = {n: leaf for n, leaf in leaves.items() if in_head(n)}
        for n in leaves:
            if n.endswith(A):
                layer = n.removesuffix(A)
                change = product(leaves[n], leaves[layer + B])
                weights[f"{layer}.weight"] = constant[f"{layer}.weight"] + ALPHA / RANK * change
        optimizer.zero_grad()
        F.cross_entropy(functional_call(plain, {**constant, **weights}, (x,)), y).backward()
        optimizer.step()
    return {n: x.detach() for n, x in leaves.items()}


def means(task: Classification, sites: dict[str, Site], moves: Any, stays: Trained) -> tuple[Tree, dict[str, Tree]]:
    """FedAvg of what moves in a round; leaves for which ``stays`` holds are kept at each site."""
    models = dict.fromkeys(sites, task.first())
    for round in range(ROUNDS):
        ends = {
            name: trained_at(task, models[name], site, round, lambda n, r=round: moves(n, r))
            for name, site in sites.items()
        }
        shared = {n: x for n, x in mean(list(ends.values()), sizes(sites)).items() if not stays(n)}
        models = {name: {**end, **shared} for name, end in ends.items()}
    return shared, models


def rolora(task: Classification, sites: dict[str, Site]) -> tuple[Tree, dict[str, Tree]]:
    """Chen et al., section 4: B in even rounds, A in odd ones."""
    return means(task, sites, lambda n, r: not n.endswith((A, B)[r % 2]), lambda n: False)


def ffa_lora(task: Classification, sites: dict[str, Site]) -> tuple[Tree, dict[str, Tree]]:
    """Sun et al., equation 7: A keeps its random start."""
    return means(task, sites, lambda n, r: not n.endswith(A), lambda n: False)


def fedsa_lora(task: Classification, sites: dict[str, Site]) -> tuple[Tree, dict[str, Tree]]:
    """Guo et al., with ``local_param: ['lora_B', 'classifier']`` as published."""
    return means(task, sites, lambda n, r: True, lambda n: n.endswith(B) or in_head(n))


def flexlora(task: Classification, sites: dict[str, Site]) -> tuple[Tree, dict[str, Tree]]:
    """Bai et al., section 3.2, in NumPy: the mean of products, cut to the rank; both factors get roots."""
    shared, weights = dict(task.first()), np.array(sizes(sites)) / sum(sizes(sites))
    for round in range(ROUNDS):
        ends = [trained_at(task, shared, site, round, lambda n: True) for site in sites.values()]
        shared = mean(ends, sizes(sites))
        for n in [n for n in shared if n.endswith(A)]:
            up = n.removesuffix(A) + B
            whole = sum(w * product(e[n].double(), e[up].double()).numpy() for w, e in zip(weights, ends, strict=True))
            u, s, v = np.linalg.svd(whole.reshape(len(whole), -1), full_matrices=False)
            roots = np.sqrt(s[:RANK])
            shared[n] = torch.from_numpy(roots[:, None] * v[:RANK]).float().reshape(shared[n].shape)
            shared[up] = torch.from_numpy(u[:, :RANK] * roots).float().reshape(shared[up].shape)
    return shared, dict.fromkeys(sites, shared)


PUBLISHED: dict[str, Any] = {"rolora": rolora, "ffa-lora": ffa_lora, "fedsa-lora": fedsa_lora, "flexlora": flexlora}


def products(params: Tree) -> Tree:
    """The changes by adapters, which do not depend on the signs of singular vectors, and all other leaves."""
    changes = {n: product(x, params[n.removesuffix(A) + B]) for n, x in params.items() if n.endswith(A)}
    return {**changes, **{n: x for n, x in params.items() if not n.endswith((A, B))}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_three_rounds_are_the_published_ones(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path))
    task, sites = adapted(kind), little_sites(NETWORKS[kind][0].inputs)
    method = build(name, Setting(task, LOCAL, tuple(sites), ROUNDS))
    step, engine = run(method, sites, task.first(), ROUNDS)
    shared, models = PUBLISHED[name](task, sites)
    compared: Any = products if name == "flexlora" else dict
    agree(compared({n: leaf for n, leaf in step.state.params.items() if n in shared}), compared(shared))
    request = method.evaluation_request(step.state)
    for site, wanted in models.items():
        found = method.site_model(request.for_site(site), engine.memory.get(site, {}))
        agree(compared(found), compared(wanted))
    plain, _ = means(task, sites, lambda n, r: True, lambda n: False)
    wanted = models["site-0"]
    assert largest_gap(compared(wanted), compared(plain)) > 1e-4  # ten times the tolerance
