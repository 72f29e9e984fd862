"""Robust rules against numpy written from the papers, and the laws that hold whatever the numbers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.methods.robust.rules.aggregation_rule import CHUNK, Average, Updates, faults, standings
from polyclinic.methods.robust.rules.bulyan import Bulyan
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.dos import DOS, copod
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.geometric_median import GeometricMedian
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum
from polyclinic.methods.robust.rules.site_sorting import exchanges, sort_rows

RULES = [
    Average(False),
    Krum(),
    MultiKrum(),
    Bulyan(),
    Median(),
    TrimmedMean(),
    GeometricMedian(),
    CentredClipping(),
    FLTrust("s00"),
    DOS(),
]


def trees(x: np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
    """Each row of x [n, d] as an update of two leaves, from site s00, s01, ..."""
    cut = x.shape[1] // 3
    rows = torch.from_numpy(x).float()
    return {f"s{i:02d}": {"a.w": row[:cut].reshape(-1, 1), "b": row[cut:]} for i, row in enumerate(rows)}


def flat(tree: Any) -> np.ndarray:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()]).double().numpy()


def run(rule: Any, x: Any, last: Any = None) -> Any:
    return flat(rule.aggregate(Updates.of(trees(x)), {} if last is None else trees(last[None])["s00"]).aggregate)


def draw(seed: int, n: int = 10, d: int = 37) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        (rng.normal(size=d) + rng.normal(size=(n, d)) * rng.uniform(0.3, 2, size=(n, 1)))
        .astype(np.float32)
        .astype(float)
    )


def krum_order(x: np.ndarray, f: int) -> np.ndarray:
    """Blanchard et al., section 4: the sum of squared distances to the n-f-2 closest others."""
    scores = []
    for i in range(len(x)):
        others = sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i)
        scores.append(sum(others[: max(1, len(x) - f - 2)]))
    return np.argsort(scores, kind="stable")


@pytest.mark.parametrize("seed", range(4))
def test_krum_and_multi_krum(seed: int) -> None:
    x = draw(seed)
    order = krum_order(x, 2)
    np.testing.assert_allclose(run(Krum(0.2), x), x[order[0]], rtol=1e-6)
    np.testing.assert_allclose(run(MultiKrum(0.2), x), x[order[:8]].mean(0), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(run(MultiKrum(0.2, keep=3), x), x[order[:3]].mean(0), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (12, 2), (15, 3)])
def test_bulyan(n: int, f: int) -> None:
    x = draw(n, n)
    left, chosen = list(range(n)), list[int]()
    while len(chosen) < n - 2 * f:
        chosen.append(left.pop(int(krum_order(x[left], f)[0])))
    few = x[chosen]
    near = np.argsort(np.abs(few - np.median(few, 0)), axis=0)[: len(chosen) - 2 * f]
    np.testing.assert_allclose(run(Bulyan(f / n), x), np.take_along_axis(few, near, 0).mean(0), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10, 70])
def test_median_and_trimmed_mean(n: int) -> None:
    x = draw(n, n)
    assert np.array_equal(run(Median(), x).astype(np.float32), np.median(x.astype(np.float32), 0))
    f = n // 5
    np.testing.assert_allclose(run(TrimmedMean(0.2), x), np.sort(x, 0)[f : n - f].mean(0), rtol=2e-5, atol=1e-6)


def test_geometric_median_is_where_the_distances_pull_equally() -> None:
    from scipy.optimize import minimize

    x = draw(5, 9, 6)
    z = run(GeometricMedian(), x)
    pull = ((x - z) / np.linalg.norm(x - z, axis=1, keepdims=True)).sum(0)  # 0 at the minimum
    assert np.abs(pull).max() < 1e-4
    best = minimize(lambda v: np.linalg.norm(x - v, axis=1).sum(), x.mean(0), tol=1e-12).x
    np.testing.assert_allclose(z, best, atol=1e-4)


def test_geometric_median_steps_are_those_of_the_paper() -> None:
    x, weights = draw(6, 8), np.arange(1.0, 9.0)
    alpha, nu = weights / weights.sum(), 1e-6 * np.median(np.linalg.norm(x, axis=1))
    z = (alpha[:, None] * x).sum(0)
    for _ in range(3):
        beta = alpha / np.maximum(nu, np.linalg.norm(x - z, axis=1))
        z = (beta[:, None] * x).sum(0) / beta.sum()
    claimed = {f"s{i:02d}": w for i, w in enumerate(weights)}
    found = GeometricMedian(weighted=True, steps=3).aggregate(Updates.of(trees(x), claimed), {}).aggregate
    np.testing.assert_allclose(flat(found), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 2.5])
def test_centered_clipping(tau: float) -> None:
    x, v = draw(7), draw(8, 1)[0]
    given, t = v.copy(), tau or np.median(np.linalg.norm(x - v, axis=1))
    for _ in range(3):
        gap = x - v
        v = v + (gap * np.minimum(1, t / np.linalg.norm(gap, axis=1, keepdims=True))).mean(0)
    np.testing.assert_allclose(run(CentredClipping(tau), x, given), v, rtol=1e-4, atol=1e-5)


def test_centered_clipping_begins_at_nothing() -> None:
    x = draw(9)
    t = np.median(np.linalg.norm(x, axis=1))
    once = (x * np.minimum(1, t / np.linalg.norm(x, axis=1, keepdims=True))).mean(0)
    np.testing.assert_allclose(run(CentredClipping(steps=1), x), once, rtol=1e-4, atol=1e-5)


def test_fltrust() -> None:
    x = draw(10)
    g0 = x[0]
    trust = np.maximum(0, x @ g0 / np.linalg.norm(x, axis=1) / np.linalg.norm(g0))
    expected = (trust[:, None] * x * (np.linalg.norm(g0) / np.linalg.norm(x, axis=1))[:, None]).sum(0) / trust.sum()
    np.testing.assert_allclose(run(FLTrust("s00"), x), expected, rtol=1e-4, atol=1e-5)
    against = np.stack([g0, -g0, -2 * g0])
    np.testing.assert_allclose(run(FLTrust("s00"), against), g0, rtol=1e-5)  # its own is all that agrees
    with pytest.raises(ValueError, match="missing in this round"):
        run(FLTrust("nobody"), x)


def by_hand(x: np.ndarray) -> np.ndarray:
    """COPOD, row by row and column by column."""
    n, d = x.shape
    total = np.zeros(n)
    for j in range(d):
        column = x[:, j]
        left = np.array([-np.log(sum(v <= u for v in column) / n) for u in column])
        right = np.array([-np.log(sum(v >= u for v in column) / n) for u in column])
        skew = np.sign(((column - column.mean()) ** 3).mean())
        skewed = left + right if skew == 0 else (right if skew > 0 else left)
        total += np.maximum(skewed, (left + right) / 2)
    return total


def test_copod() -> None:
    x = np.random.default_rng(0).normal(size=(12, 5)) ** 3
    np.testing.assert_allclose(copod(torch.from_numpy(x)).numpy(), by_hand(x), rtol=1e-12)


def test_copod_is_pyods() -> None:
    found = pytest.importorskip("pyod.models.copod", reason="pyod is not installed")
    for seed in range(5):
        x = np.random.default_rng(seed).gamma(1.0, size=(11, 7))
        np.testing.assert_allclose(copod(torch.from_numpy(x)).numpy(), found.COPOD().fit(x).decision_scores_, rtol=1e-9)


def test_dos() -> None:
    x = draw(11)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, euclid = 1 - unit @ unit.T, np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(cosine, 0)
    w = np.exp(-(by_hand(cosine) + by_hand(euclid)) / 2)
    np.testing.assert_allclose(run(DOS(), x), (w[:, None] * x).sum(0) / w.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", range(1, 10))
def test_sorting_network_sorts_all_zeros_and_ones(n: int) -> None:
    """By the 0-1 principle it then sorts everything (Knuth, 5.3.4, theorem Z)."""
    columns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n))).T.contiguous()
    assert torch.equal(torch.stack(sort_rows(list(columns.clone()))), columns.sort(0).values)
    assert all(i < j for i, j in exchanges(n))


@given(st.integers(1, 80), st.integers(0, 2**31))
def test_sorting_rows_is_sorting(n: int, seed: int) -> None:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    assert torch.equal(torch.stack(sort_rows(list(x.clone()))), x.sort(0).values)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_rules_keep_what_all_agree_on_and_follow_shift_and_scale(rule: Any) -> None:
    x = draw(12)
    same = np.repeat(x[:1], 10, 0)
    np.testing.assert_allclose(run(rule, same), x[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(rule, 8 * x), 8 * run(rule, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rule", [r for r in RULES if type(r) not in (FLTrust, CentredClipping, DOS)], ids=lambda r: type(r).__name__
)
def test_rules_that_know_no_origin_move_with_it(rule: Any) -> None:
    x, by = draw(13), draw(14, 1)
    np.testing.assert_allclose(run(rule, x + by), run(rule, x) + by[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_rules_do_not_depend_on_the_order_of_sites(rule: Any) -> None:
    given = trees(draw(15))
    forth = rule.aggregate(Updates.of(given), {})
    back = rule.aggregate(Updates.of(dict(reversed(given.items()))), {})
    assert all(torch.equal(forth.aggregate[name], back.aggregate[name]) for name in forth.aggregate)
    assert forth.shares == back.shares


def test_limits() -> None:
    """Nobody presumed corrupt: multi-krum, trimmed mean and Bulyan are the mean. Trimmed to the last: the median."""
    x = draw(16, 9)
    for rule in (MultiKrum(0), TrimmedMean(0), Bulyan(0)):
        np.testing.assert_allclose(run(rule, x), x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(TrimmedMean(4 / 9), x), run(Median(), x), rtol=1e-6)
    far = x.mean(0) + 1e6 * (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
    np.testing.assert_allclose(run(CentredClipping(tau=1e9, steps=1), far), far.mean(0), rtol=1e-4, atol=1)


@pytest.mark.parametrize(
    ("rule", "f", "within"),
    [
        (Krum(0.3), 3, 3.0),
        (MultiKrum(0.3), 3, 1.5),
        (Bulyan(0.1), 1, 1.5),
        (Median(), 3, 1.5),
        (TrimmedMean(0.3), 3, 1.5),
        (GeometricMedian(), 3, 1.5),
        (CentredClipping(), 3, 3.0),
        (FLTrust("s00"), 3, 3.0),
    ],
    ids=lambda r: type(r).__name__ if not isinstance(r, int | float) else "",
)
def test_a_minority_however_far_cannot_move_the_aggregate_far(rule: Any, f: int, within: float) -> None:
    x = np.random.default_rng(17).normal(size=(10, 40)) + 1
    center, radius = x[: 10 - f].mean(0), np.linalg.norm(x[: 10 - f] - x[: 10 - f].mean(0), axis=1).max()
    for far in (1e3, 1e6, 1e12):
        x[10 - f :] = far * np.linspace(-1, 1, f * 40).reshape(f, 40)
        assert np.linalg.norm(run(rule, x) - center) < within * radius
    assert np.linalg.norm(run(Average(), x) - center) > 1e6


def test_dos_alone_is_not_safe() -> None:
    """What its docstring says: one very long update still moves it, and colluders pass for usual."""
    x = np.random.default_rng(18).normal(size=(10, 40)) + 1
    honest, x[9] = x[:9].mean(0), 1e8
    assert np.linalg.norm(run(DOS(), x) - honest) > 100 * np.linalg.norm(honest)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 400)) * rng.uniform(0.5, 2, size=(10, 1)) + 0.3  # hospitals that differ
    x[7:] = rng.normal(size=400)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shares = DOS().aggregate(Updates.of(trees(x)), {}).shares
    assert shares is not None
    assert sum(shares[f"s0{i}"] for i in (7, 8, 9)) > 0.5


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(20, 10, 101)
    whole = {type(rule): run(rule, x) for rule in RULES}
    monkeypatch.setattr("polyclinic.methods.robust.rules.aggregation_rule.CHUNK", 7)
    for rule in RULES:
        np.testing.assert_allclose(run(rule, x), whole[type(rule)], rtol=1e-6, atol=1e-7)
    assert CHUNK > 7


@pytest.mark.parametrize(
    ("rule", "n", "says"),
    [
        (Krum(0.3), 4, "krum needs 5 updates to withstand 1 corrupt sites, and there are 4"),
        (Krum(0.45), 9, "needs 11 updates to withstand 4"),
        (MultiKrum(), 2, "multi-krum needs 3"),
        (Bulyan(0.2), 10, "bulyan needs 11 updates to withstand 2"),
        (TrimmedMean(0.5), 10, "below 0.5"),
        (Krum(-0.1), 10, "at least 0"),
        (Krum(float("nan")), 10, "at least 0"),
    ],
)
def test_too_few_sites_for_the_promise_are_refused(rule: Any, n: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(rule, draw(21, n))


def test_updates_that_do_not_belong_together_are_named() -> None:
    given = trees(draw(22, 5))
    given["s01"] = {**given["s01"], "b": given["s01"]["b"][:-1]}
    given["s03"] = {**given["s03"], "b": given["s03"]["b"].clone().index_fill(0, torch.tensor([4]), torch.nan)}
    assert list(faults(given)) == ["s01", "s03"]
    with pytest.raises(
        ValueError, match=r"s01: its update has other tensors than most \(b differs\); s03: b holds NaN"
    ):
        Updates.of(given)
    with pytest.raises(ValueError, match="at least one"):
        Updates.of({})


def test_standings_see_who_is_far_and_who_points_elsewhere() -> None:
    x = np.random.default_rng(23).normal(size=(10, 200)) + 1
    x[4], x[7] = 50 * x[4], -x[7]
    found = standings(Updates.of(trees(x)))
    assert {site for site, s in found.items() if s.outlying} == {"s04", "s07"}
    assert found["s04"].norm == pytest.approx(50, rel=0.2)
    assert found["s07"].cosine < -0.5 < 0.5 < found["s00"].cosine
    assert all(s.score == 0 for s in standings(Updates.of(trees(x[:3]))).values())
