"""FedNoRo: its division, losses and weights against the published ones, and a site with flipped labels that is found."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.class_imbalance.logit_adjustment import LogitAdjusted
from polyclinic.methods.label_noise.fednoro import FedNoRo, distance_weights, normalized
from polyclinic.methods.label_noise.two_groups import higher_group
from polyclinic.testing import check_method, close
from tests.conftest import Rows, blobs
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def ran(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    steps = []
    for step in train(method, InProcess(method, sites), method.init(params), rounds=rounds):
        steps.append(step)
    return steps[-1].state, steps


@pytest.mark.parametrize("seed", range(2))
def test_the_two_groups_are_those_of_scikit_learn(seed: int) -> None:
    """Well-separated sites: the majority of nine random starts, as in the published code."""
    mixture = pytest.importorskip("sklearn.mixture")
    rng = np.random.default_rng(seed)
    high = rng.random(12) < 0.4
    high[:2] = [True, False]
    x = rng.normal(0.2, 0.05, (12, 3)) + 0.6 * high[:, None]
    votes = []
    for start in range(9):
        fitted = mixture.GaussianMixture(2, random_state=start).fit(x)
        votes.append(tuple(fitted.predict(x) == fitted.means_.sum(1).argmax()))
    wanted = max(votes, key=votes.count)
    found = higher_group(torch.from_numpy(x))
    assert found.tolist() == list(wanted) == high.tolist()


def test_degenerate_tables_have_no_noisy_site() -> None:
    for table in (torch.zeros(4, 2), torch.ones(1, 3), torch.full((5, 2), 0.3)):
        assert not higher_group(table).any()
    assert higher_group(torch.tensor([[0.0, 0.0], [1.0, 1.0]])).tolist() == [False, True]


def test_losses_are_scaled_by_class_and_missing_classes_count_as_the_lowest() -> None:
    losses = torch.tensor([[1.0, 0.0, 0.4], [3.0, 5.0, 0.0], [2.0, 7.0, 0.4]]).double()
    known = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 1, 1]]).double()
    table = losses.numpy().copy()
    table[known.numpy() == 0] = np.nan
    for j in range(3):
        table[np.isnan(table[:, j]), j] = np.nanmin(table[:, j])
    spread = table.max(0) - table.min(0)
    wanted = (table - table.min(0)) / np.where(spread > 0, spread, 1)
    np.testing.assert_allclose(normalized(losses, known).numpy(), wanted)
    assert not normalized(losses, known * torch.tensor([1, 1, 0])).isnan().any()


def test_weights_decrease_with_the_distance_to_the_nearest_clean_site() -> None:
    generator = torch.Generator().manual_seed(0)
    w = {s: {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)} for s in "abcd"}
    sizes = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0}
    gap = {
        s: min(sum(np.linalg.norm(w[s][n].numpy() - w[c][n].numpy()) for n in ("a", "b")) for c in "ab") for s in "cd"
    }
    wanted = {s: n * math.exp(-gap.get(s, 0) / max(gap.values())) for s, n in sizes.items()}
    assert distance_weights(w, sizes, ("c", "d")) == pytest.approx(wanted)
    assert distance_weights(w, sizes, ()) == sizes
    assert distance_weights(w, sizes, tuple("abcd")) == sizes
    assert distance_weights({"a": w["a"], "c": w["a"]}, {"a": 1.0, "c": 2.0}, ("c",)) == {"a": 1.0, "c": 2.0}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sites_loss_is_the_published_one(kind: str, noisy: bool) -> None:
    """A clean site: a softmax adjusted by class shares. A noisy one: also the received model's probabilities."""
    task, sites = place(kind, classes=3)
    method, site = FedNoRo(task, 20, LOCAL, most=0.8), sites["site-1"]
    state = method.init(task.first())._replace(round=6, divided=True, noisy=("site-1",) if noisy else ())
    request = method.request(state).for_site("site-1")
    reply = method.site_update(request, {}, site)[0].gather("update")["site-1"]
    share = 0.8 * math.exp(-5 * (1 - (6 - 2) / 8) ** 2) if noisy else 0.0
    counts = torch.bincount(site.data["train"].y, minlength=3).float()
    prior = (counts / counts.sum()).log()
    model, teacher = ready(task, task.first()), ready(task, task.first()).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(LOCAL, site, 6):
        with torch.no_grad():
            soft = (teacher(x) / 0.8).softmax(1)
        log = (model(x) + prior).log_softmax(1)
        kl = F.kl_div(log, soft, reduction="batchmean")
        optimizer.zero_grad()
        (share * kl + (1 - share) * F.nll_loss(log, y)).backward()
        optimizer.step()
    agree({n: leaf for n, leaf in reply.items() if n != "/weight"}, change(model, task.first()))
    assert float(reply["/weight"]) == len(site.data["train"])


def test_the_warm_up_is_federated_training_with_a_balanced_softmax(
    task: Classification, sites: dict[str, Site]
) -> None:
    found, steps = ran(FedNoRo(task, 20, LOCAL), task.first(), sites, 2)
    assert [s.request.job for s in steps] == ["train", "train"]
    assert close(found.params, ran(LogitAdjusted(task, LOCAL), task.first(), sites, 2)[0].params)


def test_promises_hold_when_sites_are_divided(task: Classification, sites: dict[str, Site]) -> None:
    check_method(FedNoRo(task, 4, LOCAL, warmup=0.1), task.first(), sites, rounds=3)
    with pytest.raises(ConfigError, match="warmup must be a share"):
        FedNoRo(task, 4, LOCAL, warmup=0.0)


@pytest.mark.slow
def test_a_site_with_flipped_labels_is_found_and_counts_less(task: Classification) -> None:
    sites = {f"site-{k}": Site(f"site-{k}", {"train": blobs(k, 40, (1, 8, 8))}) for k in range(6)}
    for name in ("site-1", "site-4"):
        data, rng = sites[name].data["train"], torch.Generator().manual_seed(5)
        wrong = torch.rand(40, generator=rng) < 0.7
        sites[name] = Site(name, {"train": Rows(data.x, torch.where(wrong, 1 - data.y, data.y))})
    local = LocalTraining(epochs=2, batch_size=8, lr=0.05)
    state, steps = ran(FedNoRo(task, 10, local, warmup=0.3), task.first(), sites, 6)
    assert state.noisy == ("site-1", "site-4")
    assert [s.request.job for s in steps] == ["train"] * 3 + ["losses"] + ["train"] * 3
