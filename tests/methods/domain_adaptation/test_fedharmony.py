"""FedHarmony's Gaussians and losses in numpy, its first round, and that it unlearns the scanner."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.method import Method
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.latent import encoded
from polyclinic.learning.networks.model_tree import cached_model, load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.adversarial import confusion
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.domain_adaptation.fedharmony import FedHarmony
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal
from tests.conftest import Rows, little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready, restore, statistics

NAMES = ("site-0", "site-1", "site-2")


@pytest.mark.parametrize("name", KINDS)
def test_the_gaussians_are_those_of_the_aggregated_encoder(name: str, local: LocalTraining) -> None:
    """Mean and standard deviation by feature over all training examples, as `get_gaussians.py` has them, in numpy."""
    task = Classification(NETWORKS[name][0])
    sites = little_sites(task.network.inputs)
    method, steps = FedHarmony(task, NAMES, local), []
    for step in train(method, InProcess(method, sites), method.init(task.first()), rounds=2):
        steps.append(step)
    assert [(s.request.round, s.request.job) for s in steps] == [(0, "train"), (1, "describe"), (1, "train")]
    aggregated = cached_model(task, steps[0].state.params).eval()
    for site in NAMES:
        with torch.no_grad():
            features = encoded(task.network, aggregated, sites[site].data["train"].x).double().numpy()
        found, known = steps[1].state.gaussians[site], steps[2].request.trees[f"gaussian.{site}"]
        np.testing.assert_allclose(found["mean"].numpy(), features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["std"].numpy(), np.std(features, axis=0), rtol=1e-3, atol=1e-5)
        assert equal(found, known)


def test_others_are_drawn_from_their_gaussians(task: Classification, sites: dict[str, Site]) -> None:
    method = FedHarmony(task, NAMES, LocalTraining())
    F_ = 8
    known = {k: {"mean": torch.full((F_,), 3.0 * k), "std": torch.full((F_,), 0.5 + k)} for k in (0, 2)}
    request = method.request(method.init(task.first())._replace(gaussians={NAMES[k]: v for k, v in known.items()}))
    drawn, places = method._draw(request, [0, 2], 8000, torch.Generator().manual_seed(0))
    assert places.bincount().tolist() == [4000, 0, 4000]
    for k, g in known.items():
        torch.testing.assert_close(drawn[places == k].mean(0), g["mean"], atol=0.15, rtol=0)
        torch.testing.assert_close(drawn[places == k].std(0), g["std"], atol=0.1, rtol=0)


def test_confusion_is_the_mean_of_minus_log_softmax() -> None:
    z = np.random.default_rng(0).normal(size=(5, 4))
    expected = -(z - np.log(np.exp(z).sum(1, keepdims=True))).mean()
    assert float(confusion(torch.from_numpy(z))) == pytest.approx(expected)
    even = confusion(torch.zeros(3, 4))
    assert float(even) == pytest.approx(np.log(4))
    assert float(confusion(torch.randn(50, 4))) > float(even)


@pytest.mark.parametrize("kind", KINDS)
def test_two_minibatches_are_the_published_three_updates(kind: str) -> None:
    """Task and distance, then the classifier, then the encoder at half the rate: with PyTorch's optimizers."""
    task, sites = place(kind)
    local, site, start = LocalTraining(steps=2, batch_size=8, lr=0.05), sites["site-1"], task.first()
    method = FedHarmony(task, NAMES, local, mu=0.3)
    rng = torch.Generator().manual_seed(2)
    gaussians = {
        n: {
            "mean": torch.randn(method.judge.features, generator=rng),
            "std": torch.rand(method.judge.features, generator=rng),
        }
        for n in NAMES
    }
    request = method.request(method.init(start)._replace(gaussians=gaussians))
    reply, _ = method.site_update(request, {}, site)

    model, judge = ready(task, start), load(method.judge.model(), method.judge.first())
    inside = [p for n, p in model.named_parameters() if task.network.in_encoder(n)]
    learn, guess = (torch.optim.SGD(m.parameters(), 0.05) for m in (model, judge))
    forget, drawing = torch.optim.SGD(inside, 0.025), site.rng(0, "gaussians")
    for step, (x, y) in enumerate(minibatches(local, site)):
        gap = torch.stack([(p - start[n]).square().sum() for n, p in model.named_parameters()]).sum()
        learn.zero_grad()
        (F.cross_entropy(model(x), y) + (0.3 * gap.sqrt() if step else 0.0)).backward()
        learn.step()
        kept = statistics(model)
        own = encoded(task.network, model, x)
        others = [
            g["mean"] + g["std"] * torch.randn(4, len(g["mean"]), generator=drawing)
            for g in (gaussians["site-0"], gaussians["site-2"])
        ]
        places = torch.tensor([1] * 8 + [0] * 4 + [2] * 4)
        guess.zero_grad()
        F.cross_entropy(judge(torch.cat([own.detach(), *others])), places).backward()
        guess.step()
        forget.zero_grad()
        (-judge(own).log_softmax(1).mean()).backward()
        forget.step()
        restore(model, kept)  # the second pass does not count
    agree(reply.mean("update").value, change(model, start))
    agree(reply.mean("judge").value, change(judge, method.judge.first()))


def test_the_first_round_is_uniform_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    """No Gaussian is known yet; with μ = 0 nothing else differs."""
    ours, plain = FedHarmony(task, NAMES, local, mu=0.0), FedAvg(task, local, uniform=True)
    params = task.first()
    a = ours.site_update(ours.request(ours.init(params)), {}, sites["site-2"])[0]
    b = plain.site_update(plain.request(plain.init(params)), {}, sites["site-2"])[0]
    assert equal(a.parts["update"], b.parts["update"])


def test_the_distance_has_a_slope_of_zero_where_it_is_zero(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = FedHarmony(task, NAMES, local, mu=1.0)
    reply, _ = method.site_update(method.request(method.init(task.first())), {}, sites["site-0"])
    assert all(leaf.isfinite().all() for leaf in reply.mean("update").total.values())


def told_apart(task: Any, features: list[torch.Tensor]) -> float:
    """How often a linear classifier fitted to sites' features names the site."""
    x, y = torch.cat(features), torch.arange(len(features)).repeat_interleave(len(features[0]))
    x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(x), 1)], 1)
    w = torch.zeros(x.shape[1], len(features), requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=50)

    def loss() -> Any:
        solver.zero_grad()
        value = F.cross_entropy(x @ w, y) + 0.01 * w.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return float((x @ w).argmax(1).eq(y).float().mean())


@pytest.mark.slow
def test_it_unlearns_the_scanner() -> None:
    """The first feature decides the label, the fourth betrays the scanner: the encoder forgets the fourth."""
    task, local = Classification(Network("mlp", (4,), 2, (("width", 8),))), LocalTraining(2, 16, "adam", 0.01)
    rng, sites = torch.Generator().manual_seed(0), {}
    for k, name in enumerate(NAMES):
        x = torch.randn(80, 4, generator=rng)
        x[:, 3] = 2 * (k - 1) + 0.2 * x[:, 3]
        sites[name] = Site(name, {"train": Rows(x, (x[:, 0] > 0).long())})
    found = []
    methods: tuple[Method[Any], ...] = (FedHarmony(task, NAMES, local, mu=0.0), FedAvg(task, local))
    for method in methods:
        state = method.init(task.first())
        for step in train(method, InProcess(method, sites), state, rounds=10):
            state = step.state
        model = cached_model(task, state.params).eval()
        with torch.no_grad():
            right = [model(s.data["train"].x).argmax(1) == s.data["train"].y for s in sites.values()]
            found.append(told_apart(task, [encoded(task.network, model, s.data["train"].x) for s in sites.values()]))
        assert float(torch.cat(right).float().mean()) > 0.95
    assert found[0] < found[1] - 0.1
