"""The federated fingerprint is that of the pooled data: to rounding for sums, within a bin for quantiles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.pipeline import UnsuitableTransforms, send_through
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.statistics.pooled_statistics import Fingerprint
from polyclinic.secure_aggregation.fixed_point import SecureSum
from polyclinic.testing import check_engine, check_method
from tests.conftest import Rows, little_sites, segmentation_sites
from tests.support.known import known


def found(method: Any, sites: Any) -> Any:
    state = method.init({})
    for step in train(method, InProcess(method, sites), state, rounds=1):
        state = step.state
    assert state.finished
    return state


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), st.integers(0, 99)
)
def test_sums_are_those_of_pooled_data(counts: Any, center: Any, spread: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [center + spread * rng.normal(size=(n, 3)) for n in counts]
    sites = {
        f"s{k}": Site(f"s{k}", {"train": Rows(torch.from_numpy(t).float(), torch.zeros(len(t), dtype=torch.long))})
        for k, t in enumerate(tables)
    }
    task = Classification(Network("mlp", (3,), 2))
    summary = (method := Fingerprint(task)).summary(found(method, sites))
    pooled = np.concatenate(tables).astype("float32").astype("float64")
    assert summary.examples == len(pooled)
    np.testing.assert_allclose(summary.mean, pooled.mean(0), rtol=1e-9, atol=1e-9 * spread)
    np.testing.assert_allclose(summary.std, pooled.std(0), rtol=1e-6, atol=1e-9 * (abs(center) + spread))
    bin_width = np.diff(summary.edges.numpy()[:, :2])[:, 0]
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        exact = np.quantile(pooled, q, axis=0, method="inverted_cdf")
        assert (np.abs(summary.quantile(q).numpy() - exact) <= bin_width * 1.001 + 1e-9 * abs(center)).all()


def test_images_by_channel_and_classes() -> None:
    sites = little_sites((2, 8, 8))
    task = Classification(Network("cnn", (2, 8, 8), 2))
    method = Fingerprint(task, by_site=True)
    state = found(method, sites)
    x, y = (torch.cat([getattr(s.data["train"], part) for s in sites.values()]) for part in "xy")
    summary = method.summary(state)
    torch.testing.assert_close(summary.mean, x.double().mean((0, 2, 3)))
    assert summary.classes.tolist() == y.bincount(minlength=2).tolist()
    alone = method.summary(state, "site-1")
    assert alone.examples == 17
    torch.testing.assert_close(alone.mean, sites["site-1"].data["train"].x.double().mean((0, 2, 3)))


def test_missing_values_and_labels() -> None:
    nan = float("nan")
    rows = Rows(torch.tensor([[1.0, nan], [3.0, nan], [nan, 4.0]]), torch.tensor([[1.0, 0], [1, nan], [0, 1]]))
    method = Fingerprint(MultiLabel(Network("mlp", (2,), 2)))
    summary = method.summary(found(method, {"a": Site("a", {"train": rows})}))
    assert summary.mean.tolist() == [2.0, 4.0]
    assert summary.missing.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert summary.classes.tolist() == [2.0, 1.0]
    assert float(summary.quantile(0.5)[1]) == pytest.approx(4.0, abs=0.04)


def test_pixels_by_class() -> None:
    sites = segmentation_sites(2)
    method = Fingerprint(Segmentation(Network("unet", (1, 16, 16), 2)))
    masks = torch.cat([s.data["train"].y for s in sites.values()])
    assert method.summary(found(method, sites)).classes.tolist() == masks.flatten().bincount(minlength=2).tolist()


def test_only_sums_are_sent_unless_sites_are_kept_apart() -> None:
    method = Fingerprint(Classification(Network("cnn", (1, 8, 8), 2)))
    reply, _ = method.site_update(known(method.request(method.init({}))), {}, little_sites()["site-0"])
    assert set(reply.parts) == {"sums"}
    assert max(leaf.numel() for leaf in reply.mean("sums").total.values()) == 2  # nothing the size of an image


@dataclass(frozen=True)
class Nothing(Fingerprint):
    """A fingerprint that a network's front needs nothing of, so that a method can follow it."""

    def front(self, state: Any) -> Any:
        return {}


def test_it_keeps_every_promise_and_a_method_can_follow(task: Classification, local: LocalTraining) -> None:
    method = Prepared(Nothing(task, by_site=True), FedAvg(task, local), task)
    check_method(method, task.first(), little_sites())


def test_the_same_bits_on_both_engines(task: Classification) -> None:
    engines = []

    def start(method: Any, sites: Any) -> Any:
        engines.append(Workers(method, sites))
        return engines[0]

    try:
        check_engine(start, Fingerprint(task, by_site=True), {}, little_sites())
    finally:
        for engine in engines:
            engine.close()


def test_it_passes_secure_summation() -> None:
    """The server sees nothing but the sum, and the sum is right to the digits that are kept."""
    sites = little_sites(count=4)
    task = Classification(Network("cnn", (1, 8, 8), 2))
    plain = Fingerprint(task, bins=32)
    method = send_through(plain, SecureSum(limit=64.0, bits=20, heaviest=32.0))
    state = method.init({})
    for step in train(method, InProcess(method, sites), state, rounds=1):
        assert not step.lost
        assert step.request.secure
        state = step.state
    secret, open_ = plain.summary(state.inner), plain.summary(found(plain, sites))
    torch.testing.assert_close(secret.mean, open_.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(secret.std, open_.std, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(secret.classes, open_.classes, rtol=1e-3, atol=0.05)
    torch.testing.assert_close(secret.quantile(0.9), open_.quantile(0.9), rtol=0, atol=0.3)


def test_keeping_sites_apart_and_secure_summation_exclude_each_other() -> None:
    plain = Fingerprint(Classification(Network("cnn", (1, 8, 8), 2)), by_site=True)
    with pytest.raises(UnsuitableTransforms, match="needs each site's reply"):
        send_through(plain, SecureSum(limit=64.0, bits=20, heaviest=32.0))
