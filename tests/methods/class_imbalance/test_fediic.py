"""FedIIC: its losses, its prototypes and two minibatches against the published steps, written again with loops."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.latent import pooled, represent
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import STILL
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.class_imbalance.balanced_contrast import across, prototypes, within
from polyclinic.methods.class_imbalance.fediic import FedIIC
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready
from tests.support.departures import moves

LOCAL = LocalTraining(steps=2, batch_size=8, lr=0.02)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_contrasts_are_the_published_ones_in_loops() -> None:
    f, y = F.normalize(normal(10, 6), dim=1), torch.tensor([0, 1, 2, 0, 1] * 2)
    share, centers = torch.tensor([0.7, 0.29, 0.01]), F.normalize(normal(3, 6, seed=1), dim=1)
    z, p, terms = f.double().numpy(), share.double().numpy(), []
    for i in range(10):
        logits = [z[i] @ z[j] / max((p[y[i]] * p[y[j]]) ** 0.5, 0.07) for j in range(10)]
        rest = logsumexp([logits[j] for j in range(10) if j != i])
        terms.append(-np.mean([logits[j] - rest for j in range(10) if j != i and y[j] == y[i]]))
    assert float(within(f, y, share)) == pytest.approx(np.mean(terms), rel=1e-5)
    c = centers.double().numpy()
    expected = [-(z[i] @ c[y[i]] / 0.1 - logsumexp(z[i] @ c.T / 0.1)) for i in range(10)]
    assert float(across(f, y, centers)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_prototypes_are_pushed_apart_as_published() -> None:
    """A thousand steps of PyTorch's SGD on the largest cosines, with a mask that makes an own cosine 0."""
    begun = normal(4, 5)
    f = begun.clone().requires_grad_()
    optimizer, mask = torch.optim.SGD([f], lr=0.1), torch.ones(4, 4) - torch.eye(4)
    for _ in range(1000):
        unit = F.normalize(f, dim=1)
        optimizer.zero_grad()
        ((unit @ unit.T) * mask).max(1)[0].sum().backward()
        optimizer.step()
    found = prototypes(begun)
    torch.testing.assert_close(found, F.normalize(f.detach(), dim=1), rtol=1e-4, atol=1e-5)

    def largest(x: torch.Tensor) -> float:
        unit = F.normalize(x, dim=1)
        return float((unit @ unit.T - 2 * torch.eye(4)).max())

    assert largest(found) < largest(begun) - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_is_the_published_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class losses over all sites, then margins and both contrasts in two minibatches."""
    monkeypatch.setattr("polyclinic.methods.class_imbalance.fediic.WEAK", STILL)
    task, sites = place(kind, 3)
    method = FedIIC(task, LOCAL, width=16)
    state = method.init(task.first())
    replies = [method.site_update(method.request(state), {}, s)[0] for s in sites.values()]
    asked = method.server_update(state, replies[0] + replies[1] + replies[2], sites["site-0"])
    site, network = sites["site-1"], method.prediction_task.network
    found = method.site_update(method.request(asked), {}, site)[0].mean("update").value

    model, each, labels = ready(method.prediction_task, state.params).eval(), [], []
    with torch.no_grad():
        for s in sites.values():
            each.append(F.cross_entropy(model(s.data["train"].x), s.data["train"].y, reduction="none"))
            labels.append(s.data["train"].y)
        head = next(m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 3)
    centers = prototypes(model.get_submodule("projector")(head.weight))
    y_all, l_all = torch.cat(labels), torch.cat(each)
    hard = torch.stack([l_all[y_all == c].sum() / (1e-5 + (y_all == c).sum()) for c in range(3)])
    torch.testing.assert_close(asked.known["losses"], hard, rtol=1e-4, atol=1e-5)
    share = torch.bincount(site.data["train"].y, minlength=3) / len(site.data["train"])
    margin = torch.log(share / (hard**0.25 + 1e-5))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for x, y in minibatches(LOCAL, site):
        h, z = represent(network, model, torch.cat([x, x]))
        f, twice = F.normalize(model.get_submodule("projector")(pooled(h)), dim=1), torch.cat([y, y])
        loss = F.cross_entropy(z[: len(y)] + margin, y)
        loss = loss + 2 * within(f, twice, share) + 2 * F.cross_entropy(f @ centers.T / 0.1, twice)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(found, change(model, state.params))


def test_it_is_fedavg_without_its_terms_and_refuses_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.methods.class_imbalance.fediic.WEAK", STILL)
    task, sites = place("cnn, group, 3-D")
    even = {n: type(s)(n, {"train": s.data["train"]}) for n, s in sites.items()}
    for site in even.values():
        site.data["train"].y = torch.arange(len(site.data["train"])) % 2
        site.data["train"].x, site.data["train"].y = site.data["train"].x[:12], site.data["train"].y[:12]
    method = FedIIC(task, LOCAL, 0.0, 0.0, 0.0, 8)
    found, plain = moves(method, even, task.first()), moves(FedAvg(task, LOCAL), even, task.first())
    assert close({n: found[n] for n in plain}, plain)
    with pytest.raises(ConfigError, match="one linear layer"):
        FedIIC(Classification(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))).init({})
