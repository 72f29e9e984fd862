"""Balanced softmax, FedLC, FedRoD, CCVR, FedNTD and FedDecorr against their steps, written again."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.latent import features, pooled, represent
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.class_imbalance.ccvr import Calibrated, ccvr, virtual_features
from polyclinic.methods.class_imbalance.feddecorr import FedDecorr, correlation
from polyclinic.methods.class_imbalance.fedetf import FrameHead, fedetf
from polyclinic.methods.class_imbalance.fedntd import FedNTD, not_true
from polyclinic.methods.class_imbalance.fedrod import FedRoD
from polyclinic.methods.class_imbalance.logit_adjustment import LogitAdjusted
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import check_method, close, equal
from tests.conftest import Rows, little_sites
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)


def update(method: Any, site: Any, params: Any, memory: Any = None) -> Any:
    return method.site_update(method.request(method.init(params)), memory or {}, site)


def skewed(site: Site, classes: int, absent: int) -> Site:
    """The site without examples of one class, whose others become the next class."""
    data = site.data["train"]
    y = torch.where(data.y == absent, (absent + 1) % classes, data.y)
    return replace(site, data={**site.data, "train": Rows(data.x, y)})


@pytest.mark.parametrize("rule", ["log", "root"])
@pytest.mark.parametrize("kind", KINDS)
def test_adjusted_logits_are_the_published_ones(kind: str, rule: Literal["log", "root"]) -> None:
    """Of three classes, one of which the site does not have."""
    task, sites = place(kind, classes=3)
    site = skewed(sites["site-2"], 3, 1)
    found = update(LogitAdjusted(task, LOCAL, rule=rule, tau=0.7), site, task.first())[0].mean("update").value
    counts = np.bincount(site.data["train"].y.numpy(), minlength=3).astype(float)
    counts[counts == 0] = 1e-8
    assert counts[1] == 1e-8
    shift = torch.from_numpy(0.7 * (np.log(counts) if rule == "log" else -(counts**-0.25))).float()
    model = ready(task, task.first())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, site):
        p = torch.exp(model(x) + shift)
        loss = -torch.log(p.gather(1, y[:, None])[:, 0] / p.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(found, change(model, task.first()))


def test_without_strength_it_is_fedavg_and_a_tasks_own_weights_stay(
    task: Classification, sites: dict[str, Site]
) -> None:
    plain = update(FedAvg(task, LOCAL), sites["site-0"], task.first())[0]
    assert close(update(LogitAdjusted(task, LOCAL, tau=0.0), sites["site-0"], task.first())[0], plain)
    weighted = replace(task, class_weights=(1.0, 5.0))
    a = update(LogitAdjusted(weighted, LOCAL, tau=0.0), sites["site-0"], task.first())[0]
    assert close(a, update(FedAvg(weighted, LOCAL), sites["site-0"], task.first())[0])
    assert not close(a, plain)
    with pytest.raises(ConfigError, match="tau must be at least 0"):
        LogitAdjusted(task, LOCAL, tau=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_fedrods_two_heads_are_trained_as_published(kind: str) -> None:
    """Two optimizers: the network by the balanced loss, the private head by that of the sum on fixed features."""
    task, sites = place(kind, classes=3)
    site, method = sites["site-1"], FedRoD(task, LOCAL)
    reply, memory = update(method, site, task.first())
    counts = torch.bincount(site.data["train"].y, minlength=3)
    model = ready(task, task.first())
    head = next(n for n, _ in model.named_modules() if task.network.in_head(f"{n}."))
    private = ready(task, task.first()).get_submodule(head)
    shared = torch.optim.SGD(model.parameters(), 0.05)
    own = torch.optim.SGD(private.parameters(), 0.05)
    for x, y in minibatches(LOCAL, site):
        h, z = represent(task.network, model, x)
        shared.zero_grad()
        F.cross_entropy(z + counts.float().log(), y).backward()
        shared.step()
        own.zero_grad()
        F.cross_entropy(z.detach() + private(h.detach()), y).backward()
        own.step()
    agree(reply.mean("update").value, change(model, task.first()))
    agree(memory["personal"], dict(private.state_dict()))


def test_fedrod_predicts_with_both_heads_at_a_site_and_with_the_shared_one_elsewhere(
    task: Classification, sites: dict[str, Site]
) -> None:
    method = FedRoD(task, LOCAL)
    _, memory = update(method, sites["site-0"], task.first())
    request, x = method.request(method.init(task.first(1))), torch.randn(5, 1, 8, 8)
    model = method.prediction_task.model().eval()
    model.load_state_dict(method.site_model(request, {}), strict=False)
    shared = ready(task, task.first(1)).eval()
    torch.testing.assert_close(model(x), shared(x))
    model.load_state_dict(method.site_model(request, memory), strict=False)
    h = features(task.network, shared, x)
    wanted = shared(x) + h @ memory["personal"]["weight"].T + memory["personal"]["bias"]
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_ccvrs_gaussians_are_those_of_all_features(kind: str) -> None:
    """Equations 3 and 4 from each site's mean and covariance, against the sums; in numpy's double precision."""
    task, sites = place(kind, classes=3)
    method = Calibrated(task, LOCAL, samples=20)
    model = ready(task, task.first()).eval()
    replies, parts = [], []
    for site in sites.values():
        replies.append(method.site_update(method.request(method.init(task.first())), {}, site)[0])
        with torch.no_grad():
            h = features(task.network, model, site.data["train"].x).double().numpy()
        parts.append([h[site.data["train"].y.numpy() == c] for c in range(3)])
    sums = (replies[0] + replies[1] + replies[2]).mean("sums").total
    for c in range(3):
        n = [len(part[c]) for part in parts]
        means = [part[c].mean(0) for part in parts]
        covs = [np.cov(part[c].T) for part in parts]
        N = sum(n)
        mu = sum(k * m for k, m in zip(n, means, strict=True)) / N
        cov = sum((k - 1) / (N - 1) * s for k, s in zip(n, covs, strict=True))
        cov = (
            cov
            + sum(k / (N - 1) * np.outer(m, m) for k, m in zip(n, means, strict=True))
            - N / (N - 1) * np.outer(mu, mu)
        )
        found = sums["sum"][c].numpy() / float(sums["count"][c])
        np.testing.assert_allclose(found, mu, atol=1e-5)
        square = (sums["square"][c].numpy() - N * np.outer(found, found)) / (N - 1)
        np.testing.assert_allclose(square, cov, atol=1e-5)


def test_ccvr_draws_from_its_gaussians_and_leaves_out_classes_that_it_cannot_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 3, generator=generator).double() @ torch.randn(3, 3, generator=generator).double() + 2
    sums = {
        "count": torch.tensor([50.0, 1.0]).double(),
        "sum": torch.stack([h.sum(0), h[0]]),
        "square": torch.stack([h.T @ h, torch.outer(h[0], h[0])]),
    }
    drawn = virtual_features(sums, 200_000, torch.Generator().manual_seed(1))
    assert drawn.y.unique().tolist() == [0]
    torch.testing.assert_close(drawn.h.double().mean(0), h.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.h.double().T.cov(), h.T.cov(), atol=0.1, rtol=0.02)
    with pytest.raises(ConfigError, match="no class has two examples"):
        virtual_features({**sums, "count": torch.tensor([1.0, 0.0]).double()}, 5, generator)


@pytest.mark.parametrize("kind", KINDS)
def test_ccvr_trains_the_head_alone_in_the_last_round(kind: str) -> None:
    """The last round is plain SGD of the head on the drawn features; before it, the method is FedAvg."""
    task, sites = place(kind)
    method, steps = ccvr(task, LOCAL, 3, samples=10), []
    engine = InProcess(method, sites)
    for step in train(method, engine, method.init(task.first()), rounds=3):
        steps.append(step)
    plain = FedAvg(task, LOCAL)
    state = plain.init(task.first())
    for before in train(plain, InProcess(plain, sites), state, rounds=2):
        state = before.state
    assert [(s.request.round, s.request.job) for s in steps] == [(0, "train"), (1, "train"), (2, "features")]
    assert equal(steps[1].state.params, state.params)
    end, server = steps[2].state.params, engine.server
    drawn = virtual_features(steps[2].reply.mean("sums").total, 10, server.rng(0, "features"))
    head = next(n for n, _ in task.model().named_modules() if task.network.in_head(f"{n}."))
    module = ready(task, state.params).get_submodule(head)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    data = replace(server, data={"train": drawn})
    for h, y in minibatches(replace(LOCAL, epochs=1), data):
        optimizer.zero_grad()
        F.cross_entropy(module(h), y).backward()
        optimizer.step()
    agree(
        {n: leaf for n, leaf in end.items() if n.startswith(f"{head}.")},
        {f"{head}.{n}": p for n, p in module.state_dict().items()},
    )
    assert all(torch.equal(end[n], leaf) for n, leaf in state.params.items() if not n.startswith(f"{head}."))


def test_ccvr_keeps_its_promises_in_the_last_round_and_refuses_what_it_cannot_calibrate(task: Classification) -> None:
    sites = little_sites()
    check_method(ccvr(task, LOCAL, 2, samples=5), task.first(), sites)
    with pytest.raises(ConfigError, match="set rounds to 2 or more"):
        ccvr(task, LOCAL, 1)
    with pytest.raises(ConfigError, match="takes one vector of features"):
        ccvr(Classification(Network("densenet121", (1, 32, 32), 2)), LOCAL, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_fedntds_loss_is_the_published_one(kind: str) -> None:
    """The logits without the true one are gathered, as in the published code, instead of masked."""
    task, sites = place(kind, classes=4)
    site, tau, beta = sites["site-2"], 2.0, 0.6
    found = update(FedNTD(task, LOCAL, beta=beta, temperature=tau), site, task.first())[0].mean("update").value
    model, shared = ready(task, task.first()), ready(task, task.first()).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, site):
        z = model(x)
        others = torch.stack([torch.tensor([c for c in range(4) if c != k]) for k in y.tolist()])
        with torch.no_grad():
            target = (shared(x).gather(1, others) / tau).softmax(1)
        kl = F.kl_div((z.gather(1, others) / tau).log_softmax(1), target, reduction="batchmean")
        optimizer.zero_grad()
        (F.cross_entropy(z, y) + beta * tau**2 * kl).backward()
        optimizer.step()
    agree(found, change(model, task.first()))


def test_fedntd_without_weight_is_fedavg_and_with_two_classes_too(task: Classification, sites: dict[str, Site]) -> None:
    plain = update(FedAvg(task, LOCAL), sites["site-0"], task.first())[0]
    assert equal(update(FedNTD(task, LOCAL, beta=0.0), sites["site-0"], task.first())[0], plain)
    z = torch.randn(5, 2)
    assert float(not_true(z, torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1]), 1.0)) == 0  # one class is left


@pytest.mark.parametrize("kind", KINDS)
def test_feddecorrs_loss_is_the_published_one(kind: str) -> None:
    """The mean square of the entries off the diagonal of XᵀX, divided by N; X is standardized."""
    task, sites = place(kind)
    site, few = sites["site-1"], replace(LOCAL, epochs=1)
    found = update(FedDecorr(task, few, beta=0.1), site, task.first())[0].mean("update").value
    model = ready(task, task.first())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(few, site):
        h, z = represent(task.network, model, x)
        h = pooled(h)
        n, width = h.shape
        X = (h - h.mean(0)) / (1e-8 + h.var(0)).sqrt()
        matrix = X.T @ X
        off = (matrix.square().sum() - matrix.diagonal().square().sum()) / (width * (width - 1))
        optimizer.zero_grad()
        (F.cross_entropy(z, y) + 0.1 * off / n).backward()
        optimizer.step()
    agree(found, change(model, task.first()))


def test_correlations_of_one_example_are_0_and_private_training_is_refused(task: Classification) -> None:
    assert float(correlation(torch.randn(1, 5))) == 0
    x = torch.randn(100, 1)
    assert float(correlation(torch.cat([x, x], 1))) == pytest.approx(99**2 / 100, rel=1e-4)
    with pytest.raises(ConfigError, match="between the examples of a minibatch"):
        FedDecorr(task, DPSGD(batch_size=8))


@pytest.mark.parametrize("kind", KINDS)
def test_fedetf_is_the_published_step(kind: str) -> None:
    """Of three classes: projection, length 1, constant prototypes, trained scale, balanced softmax."""
    task, sites = place(kind, classes=3)
    method, site = fedetf(task, LOCAL), skewed(sites["site-2"], 3, 1)
    params = method.init(task.first()).params
    found = update(method, site, task.first())[0].mean("update").value
    counts = torch.from_numpy(np.bincount(site.data["train"].y.numpy(), minlength=3)).double().clamp_min(1e-8)
    model = ready(method.prediction_task, params)
    at = next(name.removesuffix("prototypes") for name in params if name.endswith("prototypes"))
    m, head = params[f"{at}prototypes"], model.get_submodule(at.rstrip("."))
    gram = m.T @ m
    torch.testing.assert_close(gram, torch.eye(3) * 1.5 - 0.5, atol=1e-5, rtol=0)  # cosines of -1 / (C - 1)
    entering = []
    head.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, site):
        model(x)
        f = F.normalize(head.get_submodule("project")(pooled(entering.pop())), dim=1)
        loss = F.cross_entropy(head.get_parameter("beta") * (f @ m) + counts.log().float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(found, change(model, params), 2e-5)
    assert not found[f"{at}prototypes"].any()


def test_fedetf_has_room_for_more_classes_than_features() -> None:
    head = FrameHead(2, 5)
    torch.testing.assert_close(head.prototypes.T @ head.prototypes, torch.eye(5) * 1.25 - 0.25, atol=1e-5, rtol=0)
    assert head(torch.randn(4, 2)).shape == (4, 5)
