"""ComBat from federated sums equals ComBat on pooled data, written independently in numpy."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.combat import combat
from tests.conftest import Rows, little_sites
from tests.support.known import known


def pooled_combat(Y: Any, batch: Any, C: Any, shrink: Any = True) -> Any:
    """Johnson et al. 2007 on pooled Y [n, F], with the covariates C [n, c]: numpy, straight from the paper's steps."""
    names, n = np.unique(batch), len(Y)
    D = np.c_[(batch[:, None] == names).astype(float), C]
    B = np.linalg.lstsq(D, Y, rcond=None)[0]
    sizes = np.array([(batch == k).sum() for k in names])
    grand = sizes / n @ B[: len(names)]
    sigma = np.sqrt(((Y - D @ B) ** 2).mean(0))
    stand = grand + C @ B[len(names) :]
    Z = (Y - stand) / sigma
    out = np.empty_like(Y)
    for k in names:
        z = Z[batch == k]
        g, d = z.mean(0), z.var(0, ddof=1)
        gamma, delta = g.copy(), d.copy()
        if shrink:
            bar, t2, m, s2 = g.mean(), g.var(ddof=1), d.mean(), d.var(ddof=1)
            a, b = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
            for v in range(Y.shape[1]):
                while True:
                    new_g = (t2 * len(z) * g[v] + delta[v] * bar) / (t2 * len(z) + delta[v])
                    new_d = (0.5 * ((z[:, v] - new_g) ** 2).sum() + b) / (len(z) / 2 + a - 1)
                    change = max(abs(new_g - gamma[v]), abs(new_d - delta[v]))
                    gamma[v], delta[v] = new_g, new_d
                    if change < 1e-10:
                        break
        out[batch == k] = (z - gamma) / np.sqrt(delta) * sigma + stand[batch == k]
    return out


def scanners(F: Any = 7, sizes: Any = (20, 35, 11), seed: Any = 0) -> Any:
    """Tables whose last two columns are covariates, seen through scanners with offsets and scales of their own."""
    rng = np.random.default_rng(seed)
    batch = np.repeat(np.arange(len(sizes)), sizes)
    C = np.c_[rng.normal(50 + 3 * batch, 9), rng.integers(0, 2, len(batch))]
    truth = rng.normal(size=(len(batch), F)) + C @ rng.normal(size=(2, F)) * 0.1
    Y = 5 + rng.normal(size=(len(sizes), F))[batch] + rng.uniform(0.5, 2, (len(sizes), F))[batch] * truth
    return Y.astype("float32"), batch, C.astype("float32")


def harmonized(method: Any, x: Any, batch: Any, task: Any, rounds: Any = 1) -> Any:
    names = [f"s{k}" for k in np.unique(batch)]
    sites = {
        n: Site(n, {"train": Rows(torch.from_numpy(x[batch == k]), torch.arange((batch == k).sum()) % 2)})
        for k, n in enumerate(names)
    }
    federation, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, federation, state, rounds=rounds):
        assert not step.lost
        state = step.state
    out = np.empty_like(x)
    for k, name in enumerate(names):
        model = cached_model(
            method.prediction_task, method.site_model(method.evaluation_request(state), federation.memory[name])
        )
        out[batch == k] = model.get_submodule("front")(sites[name].data["train"].x).numpy()
    return out


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_it_equals_pooled_combat(shrink: bool, keep: bool) -> None:
    Y, batch, C = scanners()
    x = np.c_[Y, C] if keep else Y
    task = Classification(Network("mlp", (x.shape[1],), 2))
    covariates = (7, 8) if keep else ()
    method = combat(task, LocalTraining(), ("s0", "s1", "s2"), covariates=covariates, shrink=shrink)
    found = harmonized(method, x, batch, task)
    design = C.astype("float64") if keep else np.empty((len(Y), 0))
    if keep:  # the prior of a site is over all columns it sees, covariates among them; here none of theirs
        np.testing.assert_array_equal(found[:, 7:], C)
    expected = pooled_combat(Y.astype("float64"), batch, design, shrink)
    np.testing.assert_allclose(found[:, :7], expected, rtol=2e-3 if shrink else 1e-4, atol=2e-3 if shrink else 1e-4)


def test_sites_come_to_agree_and_covariates_stay() -> None:
    Y, batch, C = scanners(F=30, sizes=(80, 90, 70))
    x = np.c_[Y, C]
    task = Classification(Network("mlp", (32,), 2))
    found = harmonized(combat(task, LocalTraining(), ("s0", "s1", "s2"), covariates=(30, 31)), x, batch, task)

    def between(values: Any) -> Any:  # the share of variance that lies between sites, the covariates' effect taken out
        D = np.c_[np.ones(len(C)), C]
        rest = values - D @ np.linalg.lstsq(D, values, rcond=None)[0]
        means = np.array([rest[batch == k].mean(0) for k in range(3)])
        return (means.var(0) / rest.var(0)).mean()

    assert between(found[:, :30]) < 0.1 * between(Y)


def test_one_site_is_left_nearly_alone() -> None:
    Y, _, _ = scanners(sizes=(40,))
    task = Classification(Network("mlp", (7,), 2))
    found = harmonized(combat(task, LocalTraining(), ("s0",), shrink=False), Y, np.zeros(40, int), task)
    # γ̂ = 0 and δ̂ = n/(n − 1) remain: the variance is taken with n − 1, σ² with n
    np.testing.assert_allclose(found - Y.mean(0), (Y - Y.mean(0)) * np.sqrt(39 / 40), rtol=1e-3, atol=1e-3)


def test_a_site_learns_nothing_of_the_others_offsets() -> None:
    method = combat(Classification(Network("cnn", (1, 8, 8), 2)), LocalTraining(), ("site-0", "site-1", "site-2"))
    sites = little_sites()
    state = method.init({})
    reply = sum(
        (method.site_update(known(method.request(state)), {}, s)[0] for s in sites.values()),
        start=method.site_update(known(method.request(state)), {}, sites["site-0"])[0] * 0,
    )
    request = known(method.request(method.server_update(state, reply, Site("server"))))
    assert set(request.for_site("site-1").trees) == {"fit", "sigma", "own"}
    assert request.for_site("site-1").trees["own"]["gamma"].shape == (64,)


def test_missing_values_and_covariates_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="columns of a table"):
        combat(Classification(Network("cnn", (1, 8, 8), 2)), LocalTraining(), ("a",), covariates=(0,))
    task = Classification(Network("mlp", (2,), 2))
    method = combat(task, LocalTraining(), ("a",))
    site = Site("a", {"train": Rows(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))})
    with pytest.raises(ValueError, match="impute"):
        method.site_update(known(method.request(method.init(task.first()))), {}, site)


@pytest.mark.skipif(not os.environ.get("POLYCLINIC_DATA"), reason="POLYCLINIC_DATA names no folder of real data")
def test_real_scanners(real_data: Path) -> None:
    """Cortical thickness at 23 sites: federated equals pooled, on data as they come."""
    import csv
    import gzip

    with gzip.open(real_data / "brain_roi_tables_by_site" / "fcon1000_roi_23sites.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    columns = [c for c in rows[0] if "thickness" in c.lower()][:40]
    if not columns:
        columns = [c for c in rows[0] if c not in ("site", "age", "sex")][1:41]
    site_column = next(c for c in rows[0] if c.lower() in ("site", "site_id"))
    Y = np.array([[float(r[c]) for c in columns] for r in rows], "float32")
    names, batch = np.unique([r[site_column] for r in rows], return_inverse=True)
    task = Classification(Network("mlp", (len(columns),), 2))
    found = harmonized(combat(task, LocalTraining(), tuple(f"s{k}" for k in range(len(names)))), Y, batch, task)
    expected = pooled_combat(Y.astype("float64"), batch, np.empty((len(Y), 0)))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(Y).mean())
