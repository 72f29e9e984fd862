"""FedCorr: the dimension of predictions, its losses and corrections, and a site with wrong labels that is found."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.label_noise.fedcorr import FedCorr, suspects
from polyclinic.methods.label_noise.intrinsic_dimension import intrinsic_dimension
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.conftest import Rows
from tests.support.agreement import KINDS, agree, change, place, ready
from tests.support.departures import moves
from tests.support.few_labels import run

LOCAL = LocalTraining(steps=2, batch_size=8, lr=0.05)


@pytest.mark.parametrize("n", [40, 9])
def test_the_dimension_is_the_published_one(n: int) -> None:
    """In NumPy and SciPy, with twenty neighbors, or all if there are fewer."""
    p = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    k, x = min(20, n - 1), p.double().numpy()
    radii = np.sort(cdist(x, x), axis=1)[:, 1 : k + 1]
    expected = [-k / (np.sum(np.log(r / (r[-1] + 1e-6))) + 1e-6) for r in radii]
    assert np.allclose(intrinsic_dimension(p).numpy(), expected, rtol=1e-6)
    assert intrinsic_dimension(p[:1]).tolist() == [0.0]


def test_half_of_the_labels_with_high_losses_may_be_corrected() -> None:
    losses = torch.tensor([0.1, 5.0, 0.2, 5.1, 0.15, 4.9, 5.2, 0.12, 0.11, 0.13])
    wrong, level = suspects(losses, 0.5)
    assert level == pytest.approx(0.4)
    assert wrong.nonzero().flatten().tolist() == [3, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixup", [False, True])
def test_two_minibatches_of_the_first_stage_are_the_published_ones(kind: str, mixup: bool) -> None:
    """Mixed examples, and the distance to the received model, not squared, from the second minibatch on."""
    task, sites = place(kind)
    site, start, share = sites["site-1"], task.first(), 0.3
    method = FedCorr(task, 10, LOCAL, mixup=mixup)
    state = method.init(start)._replace(levels={"site-1": share})
    reply, memory = method.site_update(method.request(state).for_site("site-1"), {}, site)

    model, rng = ready(task, start), site.rng(0, "train", "train", "")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        for step, (x, y) in enumerate(LOCAL.batches(site.data["train"], rng)):
            lam, other = (float(torch.rand(())), torch.randperm(len(x))) if mixup else (1.0, torch.arange(len(x)))
            z = model(lam * x + (1 - lam) * x[other])
            loss = lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[other])
            if step:
                gap = sum((p - start[n]).square().sum() for n, p in model.named_parameters())
                loss = loss + 5 * share * gap**0.5
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    agree(reply.mean("update").value, change(model, start))
    with torch.no_grad():
        z = model.eval()(site.data["train"].x)
    each = F.cross_entropy(z, site.data["train"].y, reduction="none")
    torch.testing.assert_close(memory["losses"]["each"], each, rtol=1e-4, atol=1e-5)
    dimension = float(reply.gather("dimension")["site-1"]["mean"])
    assert dimension == pytest.approx(float(intrinsic_dimension(z.softmax(1)).mean()), rel=1e-3)


def flipped(count: int = 5) -> tuple[dict[str, Site], torch.Tensor]:
    """Sites with four classes, the first with about half of its labels wrong; and the true labels."""
    rng, sites, truth = torch.Generator().manual_seed(0), {}, torch.arange(80) % 4
    for k in range(count):
        x = torch.randn(80, 8, generator=rng) + 4 * torch.eye(4, 8)[truth]
        wrong = torch.rand(80, generator=rng) < (0.5 if k == 0 else 0.0)
        other = (truth + torch.randint(1, 4, (80,), generator=rng)) % 4
        sites[f"site-{k}"] = Site(f"site-{k}", {"train": Rows(x, torch.where(wrong, other, truth))})
    return sites, truth


def test_a_site_with_wrong_labels_is_found_corrects_them_and_pauses() -> None:
    sites, truth = flipped()
    task = Classification(Network("mlp", (8,), 4, (("width", 32),)))
    local = LocalTraining(epochs=5, batch_size=10, lr=0.1)
    method = FedCorr(task, 10, local, first=0.2, second=0.3, mixup=False)
    wrong, begun = [], float((sites["site-0"].data["train"].y != truth).float().mean())
    for rounds in (1, 2, 6):
        step, engine = run(method, sites, task.first(), rounds)
        wrong.append(float((engine.memory["site-0"]["labels"]["y"] != truth).float().mean()))
        assert step.state.noisy == ("site-0",)
        assert "labels" not in engine.memory["site-1"]
        if rounds == 2:
            assert method.request(step.state).recipients == ("site-1", "site-2", "site-3", "site-4")
    assert begun > 0.4
    assert begun > wrong[0] > wrong[1] > wrong[2]
    assert wrong[2] < 0.05
    assert method.request(step.state).recipients is None


def test_later_stages_and_mixing_nothing_are_fedavg(task: Classification, sites: dict[str, Site]) -> None:
    method = FedCorr(task, 10, LOCAL, beta=0.0, mixup=False)
    state: Any = method.init(task.first())._replace(round=6)
    for round in (6, 7):
        replies = [method.site_update(method.request(state), {}, s)[0] for s in sites.values()]
        state = method.server_update(state, replies[0] + replies[1] + replies[2], sites["site-0"])
        assert state.round == round + 1
    plain: Any = FedAvg(task, LOCAL).init(task.first())._replace(round=6)
    for _ in range(2):
        fedavg = FedAvg(task, LOCAL)
        replies = [fedavg.site_update(fedavg.request(plain), {}, s)[0] for s in sites.values()]
        plain = fedavg.server_update(plain, replies[0] + replies[1] + replies[2], sites["site-0"])
    assert close(state.params, plain.params)
    assert moves(FedCorr(task, 3, LOCAL, first=0.0, second=0.0), sites, task.first(), 2)
    with pytest.raises(ConfigError, match="add up to at most 1"):
        FedCorr(task, 3, first=0.6, second=0.6)
