"""MixStyle and FedFA: the places in every convolutional network, and a step written again for a small one."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.feature_styles import stages
from polyclinic.methods.harmonization.fedfa import FedFA, relative
from polyclinic.methods.harmonization.mixstyle import MixStyle
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import agree, change, ready

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)
DEEP = {
    "2-D": Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 3))),
    "3-D": Network("cnn", (2, 8, 8, 8), 2, (("width", 8), ("depth", 3), ("norm", "group"))),
    "2-D, group": Network("cnn", (1, 8, 8), 2, (("width", 8), ("depth", 3), ("norm", "group"))),
    "3-D, batch": Network("cnn", (2, 8, 8, 8), 2, (("width", 4), ("depth", 3))),
}
"""A transformer has no feature maps, and is refused."""


def test_places_are_the_ends_of_the_resolutions() -> None:
    assert stages(DEEP["2-D"]) == (("encoder.2", 4), ("encoder.6", 8), ("encoder.10", 16))
    assert [c for _, c in stages(NETWORKS["unet"][0])] == [2, 2, 4, 8, 16]
    assert [n for n, _ in stages(NETWORKS["unet"][0])] == ["conv_0", "down_1", "down_2", "down_3", "down_4"]
    for name in ("resnet18", "densenet121", "efficientnet-b0", "segresnet", "dynunet"):
        found = stages(Network(name, (1, 64, 64), 2))
        assert len(found) >= 3, name
    for network in (NETWORKS["vit"][0], Network("mlp", (6,), 2), NETWORKS["attention-mil"][0]):
        with pytest.raises(ConfigError, match="no feature maps"):
            stages(network)


class Drawn:
    """The minibatches of a fit, with PyTorch's generator in the state that training gives it."""

    def __init__(self, site: Site, round: int = 0) -> None:
        rng = site.rng(round, "train", "train", "")
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        self.batches = list(LOCAL.batches(site.data["train"], rng))


def parts(model: nn.Module, network: Network) -> list[nn.Module]:
    """The encoder, cut behind each place."""
    encoder = model.get_submodule("encoder")
    assert isinstance(encoder, nn.Sequential)
    cuts = [0, *(int(name.split(".")[1]) + 1 for name, _ in stages(network)), len(encoder)]
    return [encoder[a:b] for a, b in itertools.pairwise(cuts)]


def moments(x: Any) -> Any:
    axes = tuple(range(2, x.ndim))
    return x.mean(axes, keepdim=True), (x.var(axes, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("kind", DEEP)
def test_mixstyles_steps_are_the_published_ones(kind: str) -> None:
    task = Classification(DEEP[kind])
    site = little_sites(task.network.inputs)["site-2"]
    method = MixStyle(task, LOCAL, blocks=2, probability=0.6, alpha=0.3)
    found = method.site_update(method.request(method.init(task.first())), {}, site)[0].mean("update").value
    with torch.random.fork_rng(devices=[]):
        model, drawn, mixes = ready(task, task.first()), Drawn(site), 0
        optimizer, (one, two, *rest) = torch.optim.SGD(model.parameters(), 0.05), parts(model, task.network)
        for x, y in drawn.batches:
            h = x
            for part in (one, two):
                h = part(h)
                if torch.rand(()) < 0.6:
                    lam = torch.distributions.Beta(0.3, 0.3).sample((len(x), 1)).view(-1, *[1] * (h.ndim - 1))
                    order = torch.randperm(len(x))
                    mu, sigma = (m.detach() for m in moments(h))
                    sigma_mix = lam * sigma + (1 - lam) * sigma[order]
                    h = (h - mu) / sigma * sigma_mix + lam * mu + (1 - lam) * mu[order]
                    mixes += 1
            for part in rest:
                h = part(h)
            optimizer.zero_grad()
            F.cross_entropy(model.get_submodule("head")(h), y).backward()
            optimizer.step()
    assert 0 < mixes < 2 * len(drawn.batches)
    agree(found, change(model, task.first()))


@pytest.mark.parametrize("kind", DEEP)
def test_two_rounds_of_fedfa_are_the_published_ones(kind: str) -> None:
    """The layer of the published code, and the variance over sites by channel in numpy."""
    task = Classification(DEEP[kind])
    sites = little_sites(task.network.inputs)
    method = FedFA(task, LOCAL, probability=0.6)
    state = method.init(task.first())
    for step in train(method, InProcess(method, sites), state, rounds=2):
        state = step.state
    places = stages(task.network)
    w = task.first()
    running = [[torch.zeros(c), torch.ones(c)] for _, c in places]
    spread = [[torch.ones(c), torch.ones(c)] for _, c in places]
    for round in range(2):
        ends, seen = [], []
        for site in sites.values():
            own = [[leaf.clone() for leaf in pair] for pair in running]
            with torch.random.fork_rng(devices=[]):
                model, drawn = ready(task, w), Drawn(site, round)
                optimizer, pieces = torch.optim.SGD(model.parameters(), 0.05), parts(model, task.network)
                for x, y in drawn.batches:
                    h = x
                    for k, part in enumerate(pieces):
                        h = part(h)
                        if k >= len(places) or torch.rand(()) >= 0.6:
                            continue
                        new = []
                        for j, value in enumerate(moments(h)):
                            flat = value.flatten(1)
                            own[k][j] = 0.99 * own[k][j] + 0.01 * flat.detach().mean(0)
                            s = 1 / (1 + 1 / (spread[k][j] + 1e-6))
                            gamma = len(s) * s / s.sum()
                            sd = ((1 + gamma) * (flat.var(0) + 1e-6)).sqrt()
                            new.append((flat + sd * torch.randn_like(flat)).view_as(value))
                        mu, sigma = moments(h)
                        h = (h - mu) / sigma * new[1] + new[0]
                    optimizer.zero_grad()
                    F.cross_entropy(model.get_submodule("head")(h), y).backward()
                    optimizer.step()
            ends.append({n: leaf.clone() for n, leaf in model.state_dict().items() if n in w})
            seen.append(own)
        w = {n: torch.stack([end[n] for end in ends]).mean(0) for n in w}
        for k in range(len(places)):
            for j in range(2):
                stacked = np.stack([own[k][j].numpy() for own in seen])
                running[k][j] = torch.from_numpy(stacked.mean(0))
                spread[k][j] = torch.from_numpy(stacked.var(0, ddof=1))
    agree(state.params, w, 3e-5)
    for k, (name, _) in enumerate(places):
        for j, moment in enumerate(("mean", "std")):
            torch.testing.assert_close(state.running[f"{name}/{moment}"], running[k][j], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(state.variance[f"{name}/{moment}"], spread[k][j], atol=1e-6, rtol=1e-2)


def test_without_probability_both_are_fedavg_and_one_site_has_no_variance(
    task: Classification, sites: dict[str, Site]
) -> None:
    request = FedAvg(task, LOCAL).request(FedAvg(task, LOCAL).init(task.first()))
    plain = FedAvg(task, LOCAL).site_update(request, {}, sites["site-0"])[0].parts["update"]
    assert equal(
        MixStyle(task, LOCAL, probability=0.0).site_update(request, {}, sites["site-0"])[0].parts["update"], plain
    )
    none = FedFA(task, LOCAL, probability=0.0, uniform=False)
    found = none.site_update(none.request(none.init(task.first())), {}, sites["site-0"])[0]
    assert equal(found.parts["update"], plain)
    state = none.server_update(none.init(task.first()), found, Site("server"))
    assert all(bool((leaf == 0).all()) for leaf in state.variance.values())
    assert torch.allclose(relative(torch.zeros(3)), torch.ones(3))
    assert torch.allclose(relative(torch.tensor([1.0, 1.0, 1e9])), torch.tensor([0.75, 0.75, 1.5]), atol=1e-3)


def test_what_cannot_be_mixed_is_refused(task: Classification) -> None:
    vit = Classification(NETWORKS["vit"][0])
    for make in (MixStyle, FedFA):
        with pytest.raises(ConfigError, match="no feature maps"):
            make(vit, LOCAL)
        with pytest.raises(ConfigError, match="remove training"):
            make(task, DPSGD(batch_size=8))
        with pytest.raises(ConfigError, match="probability"):
            make(task, LOCAL, probability=1.5)
