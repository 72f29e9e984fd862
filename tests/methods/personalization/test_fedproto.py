"""FedProto: its loss, its prototypes, and predictions by the nearest one."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.latent import features, pooled, represent
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.baselines import LocalOnly
from polyclinic.methods.personalization.fedproto import FedProto
from polyclinic.testing import close
from tests.conftest import Rows
from tests.support.agreement import KINDS, agree, minibatches, place, ready

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_are_the_published_ones(kind: str) -> None:
    """Features towards the prototype of their class, and prototypes as unweighted means over the sites that have one.

    Of four classes, one site has two, and no site has the fourth: it has no prototype.
    """
    task, sites = place(kind, classes=4)
    for k, (name, site) in enumerate(sites.items()):
        data = site.data["train"]
        allowed = (0, 1) if k == 0 else (0, 1, 2)
        y = torch.tensor([c if c in allowed else 0 for c in data.y.tolist()])
        sites[name] = Site(name, {**site.data, "train": Rows(data.x, y)})
    method = FedProto(task, LOCAL, lam=0.7)
    engine, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, engine, state, rounds=2):
        state = step.state
    own, prototypes = {name: task.first() for name in sites}, dict[int, torch.Tensor]()
    for round in range(2):
        found = {c: list[torch.Tensor]() for c in range(4)}
        for name, site in sites.items():
            model = ready(task, own[name])
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for x, y in minibatches(LOCAL, site, round):
                h, z = represent(task.network, model, x)
                h = pooled(h)
                target = h.detach().clone()
                for i, c in enumerate(y.tolist()):
                    if c in prototypes:
                        target[i] = prototypes[c]
                optimizer.zero_grad()
                (F.cross_entropy(z, y) + 0.7 * F.mse_loss(target, h)).backward()
                optimizer.step()
            own[name] = params_of(model)
            with torch.no_grad():
                h = features(task.network, model.eval(), site.data["train"].x)
            for c in site.data["train"].y.unique().tolist():
                found[c].append(h[site.data["train"].y == c].mean(0))
        prototypes = {c: torch.stack(each).mean(0) for c, each in found.items() if each}
    for name in sites:
        agree(engine.memory[name]["own"], own[name])
    assert state.prototypes["known"].tolist() == [1, 1, 1, 0]
    for c, mean in prototypes.items():
        torch.testing.assert_close(state.prototypes["mean"][c], mean, atol=1e-5, rtol=1e-5)


def test_the_nearest_prototype_is_predicted(task: Classification, sites: dict[str, Site]) -> None:
    method = FedProto(task, LOCAL)
    state = method.init(task.first())
    mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).abs()
    x, net = torch.randn(6, 1, 8, 8), cached_model(task, task.first(3)).eval()
    with torch.no_grad():
        h, z = features(task.network, net, x).numpy(), net(x)
    for known, wanted in (
        ([0, 0], z.numpy()),  # before the first prototypes, the network's own head
        ([1, 1], -np.stack([((h - m) ** 2).sum(1) for m in mean.numpy()], 1)),
    ):
        prototypes = {"mean": mean, "known": torch.tensor(known).float()}
        request = method.request(state._replace(prototypes=prototypes))
        params = method.site_model(request, {"own": task.first(3)})
        with torch.no_grad():
            found = cached_model(method.prediction_task, params).eval()(x)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    one = {"mean": mean, "known": torch.tensor([0.0, 1.0])}
    params = method.site_model(method.request(state._replace(prototypes=one)), {"own": task.first(3)})
    assert (cached_model(method.prediction_task, params).eval()(x).argmax(1) == 1).all()


def test_without_weight_sites_train_alone_and_no_model_leaves(task: Classification, sites: dict[str, Site]) -> None:
    method, alone = FedProto(task, LOCAL, lam=0.0), LocalOnly(task, LOCAL)
    for site in sites.values():
        memory: Mapping[str, Tree] = {}
        other: Mapping[str, Tree] = {}
        for round in range(2):
            request = method.request(method.init(task.first())._replace(round=round))
            reply, memory = method.site_update(request, memory, site)
            other = alone.site_update(alone.request(alone.init(task.first())._replace(round=round)), other, site)[1]
            assert set(reply.parts) == {"prototypes"}
            assert reply.nbytes <= 2 * 2 * 8 * 4
        assert close(memory["own"], other["params"])
