"""FedMLP: prototypes, pseudo-labels and both stages' losses against the published ones, and gaps that are filled."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import MultiLabel
from polyclinic.learning.training.augmentation import STILL
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.label_noise.fedmlp import FedMLP, completed, prototypes
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.conftest import Rows, little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, agree, change, ready
from tests.support.departures import moves
from tests.support.few_labels import run

LOCAL = LocalTraining(steps=2, batch_size=8, lr=0.05)


def place(kind: str) -> tuple[MultiLabel, dict[str, Site]]:
    """A task with the network ``kind`` and three findings, of which every site lacks one."""
    inputs = NETWORKS[kind][0].inputs
    task = MultiLabel(Network(NETWORKS[kind][0].name, inputs, 3, NETWORKS[kind][0].options))
    sites = {}
    for k, (name, site) in enumerate(little_sites(inputs).items()):
        data = site.data["train"]
        y = torch.stack([data.y == 0, data.y == 1, data.x.flatten(1).mean(1) > 0.5], 1).float()
        y[:, k] = torch.nan
        sites[name] = Site(name, {"train": Rows(data.x, y)})
    return task, sites


def test_prototypes_are_means_over_the_sites_that_know_a_finding() -> None:
    rng = torch.Generator().manual_seed(0)
    h = [torch.randn(n, 4, generator=rng) for n in (6, 8)]
    y = [torch.randint(0, 2, (len(x), 3), generator=rng).float() for x in h]
    y[1][:, 1] = torch.nan
    merged = (prototypes(h[0], y[0], 6.0) + prototypes(h[1], y[1], 8.0)).value["mean"]
    for c in range(3):
        for s in range(2):
            parts = [(x[t[:, c] == s].mean(0), n) for x, t, n in zip(h, y, (6, 8), strict=True) if (t[:, c] == s).any()]
            expected = sum(n * m for m, n in parts) / sum(n for _, n in parts)
            torch.testing.assert_close(merged[c, s], expected)


def test_the_surest_images_are_labeled() -> None:
    """By the difference of two cosines, the given shares of those on each side, in NumPy; known labels stay."""
    rng = torch.Generator().manual_seed(0)
    h, known = torch.randn(50, 6, generator=rng), torch.randn(2, 2, 6, generator=rng)
    labels = torch.stack([torch.full((50,), torch.nan), torch.arange(50) % 2.0], 1)
    labels[:5, 0] = 1.0
    found = completed(labels, torch.tensor([True, False]), h, known, 0.2, 0.3)
    x, p = h.double().numpy()[5:], known.double().numpy()
    cosine = [x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q) for q in p[0]]
    near = cosine[0] - cosine[1]
    free, having = np.where(near >= 0)[0], np.where(near < 0)[0]
    zeros = sorted(free, key=lambda i: -near[i])[: int(0.2 * len(free))]
    ones = sorted(having, key=lambda i: near[i])[: int(0.3 * len(having))]
    assert zeros
    assert ones
    expected = labels.clone()
    expected[[i + 5 for i in zeros], 0], expected[[i + 5 for i in ones], 0] = 0.0, 1.0
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True])
def test_two_minibatches_are_the_published_ones(kind: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """First known findings and the received model's probabilities, then known and pseudo-labels alone."""
    monkeypatch.setattr("polyclinic.methods.label_noise.fedmlp.WEAK", STILL)
    task, sites = place(kind)
    site, start = sites["site-1"], task.first()
    method = FedMLP(task, 10, LOCAL, without=0.5, having=0.5)
    state = method.init(start)
    means = torch.randn(state.prototypes["mean"].shape, generator=torch.Generator().manual_seed(1))
    state = state._replace(round=4 if late else 0, prototypes={"mean": means})
    reply, memory = method.site_update(method.request(state), {}, site)

    labels = memory["labels"]["y"] if late else site.data["train"].y
    assert bool(labels.isfinite().any(0)[1]) == late
    model, shared = ready(task, start), ready(task, start).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    rng = site.rng(state.round, "train", "train", "")
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    for x, y in LOCAL.batches(Rows(site.data["train"].x, labels), rng):
        loss, active = torch.zeros(()), torch.tensor([0, 2])
        for _ in range(1 if late else 2):
            z = model(x)
            if late:
                loss = F.binary_cross_entropy_with_logits(z[y.isfinite()], y[y.isfinite()])
            else:
                with torch.no_grad():
                    target = shared(x).sigmoid()
                known = F.binary_cross_entropy(z.sigmoid()[:, active], y[:, active])
                loss = loss + (known + (z.sigmoid()[:, 1] - target[:, 1]).square().mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(reply.mean("update").value, change(model, start))


def test_gaps_are_filled_more_in_every_round_and_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.methods.label_noise.fedmlp.WEAK", STILL)
    rng, sites, truth = torch.Generator().manual_seed(0), {}, {}
    for k in range(3):
        x = torch.randn(120, 6, generator=rng)
        truth[f"site-{k}"] = (x[:, :3] > 0).float()
        y = truth[f"site-{k}"].clone()
        y[:, k] = torch.nan
        sites[f"site-{k}"] = Site(f"site-{k}", {"train": Rows(x, y)})
    task = MultiLabel(Network("mlp", (6,), 3, (("width", 16),)))
    method = FedMLP(task, 20, LocalTraining(5, 20, "adam", 0.01), without=0.1, having=0.1)
    filled = []
    for rounds in (3, 5):
        _, engine = run(method, sites, task.first(), rounds)
        filled.append(0)
        for k, (name, site) in enumerate(sites.items()):
            labels = engine.memory[name]["labels"]["y"]
            found = labels[:, k].isfinite()
            filled[-1] += int(found.sum())
            assert torch.equal(labels[found, k], truth[name][found, k])
            kept = [c for c in range(3) if c != k]
            assert torch.equal(labels[:, kept], site.data["train"].y[:, kept])
    assert 0 < filled[0] < filled[1]


def test_labels_without_gaps_are_fedavg_later_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.methods.label_noise.fedmlp.WEAK", STILL)
    task, sites = place("cnn, batch")
    for site in sites.values():
        site.data["train"].y = site.data["train"].y.nan_to_num()
    method = FedMLP(task, 10, LOCAL)
    state = method.init(task.first())._replace(round=5)
    reply, _ = method.site_update(method.request(state), {}, sites["site-0"])
    plain = FedAvg(task, LOCAL)
    other, _ = plain.site_update(plain.request(plain.init(task.first())._replace(round=5)), {}, sites["site-0"])
    assert close(reply.mean("update").value, other.mean("update").value)
    assert moves(method, sites, task.first(), 2)
    with pytest.raises(ConfigError, match="warmup is a share"):
        FedMLP(task, 10, warmup=0.0)
