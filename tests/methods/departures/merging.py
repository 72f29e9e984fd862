"""Departures of adapters, of merging by one message and of networks that differ between sites."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.adapters import LowRank, factors, product
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.methods.adapters.flexlora import FlexLoRA
from polyclinic.methods.heterogeneity.asym_fedavg import AsymFedAvg
from polyclinic.methods.one_shot import regmean
from polyclinic.methods.one_shot.fisher import FisherMerging
from tests.conftest import little_sites, segmentation_sites
from tests.support.agreement import ready
from tests.support.departures import LOCAL, apart, departs, moves, small
from tests.support.start_weights import weights_of


@contextmanager
def store() -> Iterator[None]:
    """A store of start weights that is deleted again."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"POLYCLINIC_WEIGHTS": folder}):
        yield


def unequal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of which B has the singular values, and A none."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    ones = [1] * (weight.ndim - 2)
    down, up = v[:rank].reshape(rank, *weight.shape[1:]), (u[:, :rank] * s[:rank]).reshape(len(weight), rank, *ones)
    return down, up, float(s[rank:].norm())


@departs(
    "flexlora",
    "both factors get the square roots of the singular values",
    "the changes by adapters after 3 rounds, relative; if B gets the singular values instead",
)
def flexlora_roots() -> float:
    with store():
        task = small()
        tuned: Any = FineTuned(task.network, weights_of(task.network), ("adapters", "head"), LowRank(rank=2, alpha=4.0))
        task, local = task.with_network(tuned), replace(LOCAL, epochs=4, lr=0.2)
        method = FlexLoRA(task, local)
        found = moves(method, little_sites(), task.first(), 3)
        with patch("polyclinic.methods.adapters.flexlora.factorized", unequal):
            published = moves(method, little_sites(), task.first(), 3)
    one, other = ({n: product(*pair) for n, pair in factors(t).items()} for t in (found, published))
    return apart(one, other)


class WholeExpectation(FisherMerging):
    """Fisher information with the sum over all classes instead of one that is drawn."""

    def information(self, params: Tree, site: Site) -> Tree:
        task: Any = self.task
        model, data = ready(task, params).eval(), site.data["train"]
        names = [n for n, _ in model.named_parameters()]
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in range(len(data)):
            scores = model(data[torch.tensor([i])][0])
            for c, likely in enumerate(scores.detach().softmax(1)[0]):
                loss = F.cross_entropy(scores, torch.tensor([c]))
                each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                total = {n: total[n] + likely * g.square() for n, g in zip(names, each, strict=True)}
        return {n: x / len(data) + self.floor for n, x in total.items()}


@departs(
    "fisher-merging",
    "one class is drawn for each image instead of the sum over all classes",
    "the merged model, relative to its change",
)
def fisher_drawn() -> float:
    start, sites = small().first(), little_sites()
    found, published = (moves(kind(small(), LOCAL), sites, start) for kind in (FisherMerging, WholeExpectation))
    return apart(found, published, start)


@departs(
    "regmean",
    "convolutions are merged as linear layers of their patches",
    "the merged model, relative to its change, from one whose convolutions are averaged",
)
def regmean_convolutions() -> float:
    start, sites, method = small().first(), little_sites(), regmean.RegMean(small(), LOCAL)
    found, of = moves(method, sites, start), regmean._inputs_of
    with patch.object(regmean, "_inputs_of", lambda layer: of(layer) if isinstance(layer, nn.Linear) else 0):
        return apart(found, moves(method, sites, start), start)


@departs(
    "asym-fedavg",
    "common tensors begin with the same values everywhere",
    "the common tensors after 1 round, relative to their change, if each site begins with values of its own",
)
def asym_first() -> float:
    task = Segmentation(Network("nnunet", (1, 16, 16), 2, (("width", 4), ("widest", 8))))
    sites, local = segmentation_sites(), replace(LOCAL, batch_size=4)
    method = AsymFedAvg(task, tuple(sites), local, {"site-2": {"widest": 6}}, uniform=True)

    begun, ends = method.init(task.first(0)), []
    (step,) = train(method, InProcess(method, sites), begun, rounds=1)
    for k, name in enumerate(sites):
        own: Any = task.with_network(method.network(name))
        ends.append(local.fit(own, own.first(k), sites[name], 0))
    published = {n: torch.stack([end[n] for end in ends]).mean(0) for n in begun.common}
    return apart(step.state.common, published, dict(begun.common))
