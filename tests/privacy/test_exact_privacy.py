"""The ε that is printed is never below that of the worst pair of data sets, by accountants that share nothing with ours.

Each test runs the mechanism as a site does, with a budget, reads the ledger, and computes the ε of a pair of data sets
that is as far apart as the mechanism allows: in closed form, by dp-accounting called directly, by numerical integration,
or by counting outcomes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, signal, stats

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")
pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.execution import execute
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.data.examples import Examples
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD, Spend
from polyclinic.privacy import accounting
from polyclinic.privacy.accounting import Statement, epsilon, epsilon_rdp, statement
from polyclinic.privacy.budget_policy import Budget
from polyclinic.privacy.gaussian import STEPS, AdaptiveClip, Clip, Gaussian
from polyclinic.privacy.ledger import Ledger
from polyclinic.privacy.replacement_accounting import profile
from polyclinic.privacy.sparse_vector import SparseVector
from polyclinic.secure_aggregation import SecureSum
from polyclinic.secure_aggregation.in_memory import secure_merge
from polyclinic.secure_aggregation.session_keys import ProtocolError
from tests.support.transform_sending import Told

DELTA = 1e-3
SIZE = 4000


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses on a grid ten times as coarse, which is quicker and never below."""
    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "INTERVALS", {"pld": 1e-3, "coarse": 1e-3})
    yield
    accounting._epsilon.cache_clear()


def closed_form(mu: float, delta: float = DELTA) -> float:
    """ε at ``delta`` of normal noise whose means are ``mu`` deviations apart (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(eps: float) -> float:
        return float(stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))) - delta

    return float(optimize.brentq(excess, 0, 2000)) if excess(0) > 0 else 0.0


def stated(path: Path, unit: str, act: Callable[[Budget], None], delta: float = DELTA) -> Statement:
    """What a ledger for every ``unit`` says after ``act`` has released something."""
    ledger = Ledger(path / f"{unit}.jsonl")
    ledger.begin(site="a", data="d", unit=unit, epsilon=1e6, delta=delta)
    act(Budget(ledger))
    return ledger.spent()


def released(
    transforms: tuple[Transform, ...], values: Callable[[str, int], Tree], budget: Budget | None = None
) -> Tree:
    """What one site sends of ``values``."""
    method = send_through(Told(values, {}), *transforms)
    request = method.request(method.init(values("a", 0)))
    assert request is not None
    reply, _ = execute(method, request, {}, Site("a"), *([budget] if budget else []))
    return reply.mean("sent").total


def pointing(sign: float, size: float = 100.0) -> Callable[[str, int], Tree]:
    return lambda site, round: {"w": torch.full((SIZE,), sign * size)}


# Whole replies: Clip and Gaussian ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "other"), [("site", 0.0), ("patient", -1.0), ("record", -1.0)])
def test_clipped_updates_with_noise(tmp_path: Path, unit: str, other: float) -> None:
    """A site is there or sends zeros; a patient or a record inside it turns the clipped update round."""
    bound, z, times = 0.7, 1.3, 6
    here, there = (released((Clip(bound),), pointing(sign)) for sign in (1.0, other))
    apart = tree.norm(tree.sub(here, there))
    assert apart == pytest.approx(bound * (1 if unit == "site" else 2), rel=1e-4)
    noise: list[torch.Tensor] = []

    def act(budget: Budget) -> None:
        for _ in range(times):
            noise.append(released((Clip(bound), Gaussian(z)), pointing(0.0), budget)["m/update/w"])

    said = stated(tmp_path, unit, act)
    deviation = float(torch.cat(noise).double().std())
    assert deviation == pytest.approx(z * bound, rel=6 / math.sqrt(2 * SIZE * times))
    true = closed_form(apart * math.sqrt(times) / (z * bound))
    assert true <= said.epsilon <= true * 1.002, "never below, and no more than computing takes"
    relation = dp_accounting.NeighboringRelation
    theirs = PLDAccountant(relation.ADD_OR_REMOVE_ONE if unit == "site" else relation.REPLACE_ONE, 1e-3)
    theirs.compose(dp_accounting.GaussianDpEvent(z), times)
    if unit == "site":
        assert said.epsilon == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-6)
    halved = privacy_loss_distribution.from_gaussian_mechanism(
        z / math.sqrt(times), 2.0, value_discretization_interval=1e-3
    )
    if unit != "site":
        assert said.epsilon == pytest.approx(halved.get_epsilon_for_delta(DELTA), abs=1e-3)
        assert said.epsilon > closed_form(math.sqrt(times) / z) * 1.5, "as a site it would be far too small"
    assert said.epsilon_rdp >= said.epsilon
    assert f"for every {unit}" in str(said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_rounding_carries_a_clipped_update_beyond_its_bound(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    for bound in (1.0, 0.1, 3.7):
        value = (torch.randn(SIZE, generator=rng) * 9).to(dtype)
        sent = WeightedMean({"m/update/w": value}, 1.0)
        clipped, _ = Clip(bound).encode(sent, Clip(bound).describe({}), {}, Site("a"), 0)
        assert clipped.total["m/update/w"].dtype == dtype
        assert float(clipped.total["m/update/w"].double().norm()) <= bound


@pytest.mark.parametrize(("count", "bound"), [(1000, 1e-6), (1_000_000, 1e-4), (1_000_000, 1e-2), (10, 1e-8)])
def test_numbers_too_small_for_their_precision_do_not_carry_an_update_beyond_its_bound(
    count: int, bound: float
) -> None:
    """In half precision, a clipped number of half the smallest one is rounded to the smallest one, or to 0."""
    for value in (torch.full((count,), 0.5), torch.randn(count, generator=torch.Generator().manual_seed(0))):
        sent = WeightedMean({"m/update/w": value.half()}, 1.0)
        clipped, _ = Clip(bound).encode(sent, Clip(bound).describe({}), {}, Site("a"), 0)
        assert float(clipped.total["m/update/w"].double().norm()) <= bound


@pytest.mark.parametrize("unit", ["site", "patient"])
def test_adaptive_clipping(tmp_path: Path, unit: str) -> None:
    """The worst pair moves the update and the count at once: by C and 1/2 if a site is absent, by 2C and 1 inside it."""
    start, z, times = 2.0, 0.9, 3
    settled = AdaptiveClip(start).resolve((Gaussian(z),))
    assert isinstance(settled, AdaptiveClip)
    values: list[Tree] = []

    def act(budget: Budget) -> None:
        values.extend(released((AdaptiveClip(start), Gaussian(z)), pointing(0.0), budget) for _ in range(times))

    said = stated(tmp_path, unit, act)
    zeros = {"m/update/w": torch.zeros(SIZE), "m/~clip/below": torch.zeros(SIZE)}
    noisy, _ = Gaussian(z).encode(WeightedMean(zeros, 1.0), settled.describe(settled.init({})), {}, Site("a"), 0)
    on_update, on_count = (float(noisy.total[name].double().std()) for name in zeros)
    assert float(values[0]["m/update/w"].double().std()) == pytest.approx(on_update, rel=0.1)
    far = 1 if unit == "site" else 2
    mu = math.sqrt(times * ((far * start / on_update) ** 2 + (far * 0.5 / on_count) ** 2))
    assert said.epsilon == pytest.approx(closed_form(mu), rel=0.06), "up to what 4000 numbers tell of a deviation"
    assert said.epsilon >= closed_form(far * math.sqrt(times) / z)


@pytest.mark.parametrize(
    "lie",
    [
        {"~0/clip": {"bound": torch.tensor(1e-6, dtype=torch.float64)}},
        {"~0/clip": {"bound": torch.tensor(2.0, dtype=torch.float64)}},
        {"~0/clip": {"bound": torch.tensor(1.0, dtype=torch.float64), "count_noise": torch.tensor(0.4)}},
        {"~0/clip": {"bound": torch.tensor(math.nan, dtype=torch.float64)}},
    ],
)
def test_a_server_that_names_another_bound_gets_no_reply(lie: dict[str, Tree]) -> None:
    """Noise is calibrated to the note of the bound, and what is clipped to another bound it does not hide."""
    method = send_through(Told(pointing(1.0), {}), Clip(1.0), Gaussian(1.0))
    request = method.request(method.init(pointing(1.0)("a", 0)))
    assert request is not None
    with pytest.raises(ValueError, match=r"has the bound .*1 was approved"):
        method.site_update(_with(request, lie), {}, Site("a"))


def _with(request: Any, trees: Trees) -> Any:
    return replace(request, trees={**request.trees, **trees})


def test_a_server_cannot_put_a_bound_in_the_place_of_a_transform_that_has_none() -> None:
    """Under ``Gaussian``'s own number, it would come after ``Clip`` had looked."""
    method = send_through(Told(pointing(1.0), {}), Clip(1.0), Gaussian(1.0))
    request = method.request(method.init(pointing(1.0)("a", 0)))
    small = {"~1/clip": {"bound": torch.tensor(1e-6, dtype=torch.float64)}}
    reply, _ = method.site_update(_with(request, small), {}, Site("a"))
    assert float(reply.mean("sent").total["m/update/w"].double().std()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("bound", "count_noise"),
    [(1.0, 0.0), (1.0, 5.0), (0.0, None), (1e-30, None), (1e30, None), (math.nan, None), (math.inf, None)],
)
def test_a_server_that_lies_to_adaptive_clipping_gets_no_reply(bound: float, count_noise: float | None) -> None:
    method = send_through(Told(pointing(1.0), {}), AdaptiveClip(1.0), Gaussian(1.0))
    request = method.request(method.init(pointing(1.0)("a", 0)))
    assert request is not None
    own = request.trees["~0/clip"]["count_noise"]
    count = own if count_noise is None else torch.tensor(count_noise, dtype=torch.float64)
    lie = {"~0/clip": {"bound": torch.tensor(bound, dtype=torch.float64), "count_noise": count}}
    with pytest.raises(ValueError, match=r"has the bound .* were approved"):
        method.site_update(_with(request, lie), {}, Site("a"))


# Training: DP-SGD -------------------------------------------------------------------------------------------------------

TASK = Classification(Network("mlp", (6,), 2, (("depth", 0),)))


def ward(patients: int, flipped: bool = False) -> Examples:
    """Two records a patient; the first patient's have either label."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2 * patients, 6, generator=rng)
    y = torch.zeros(2 * patients, dtype=torch.int64)
    x[:2], y[:2] = 1.0, int(flipped)
    names = tuple(f"p{i // 2}" for i in range(2 * patients))
    return Examples(x, y, names, tuple(map(str, range(2 * patients))))


def test_private_training_for_patients(tmp_path: Path) -> None:
    q, steps, sigma = 4 / 16, 12, 1.1
    local = DPSGD(batch_size=4, steps=steps, noise=sigma, bound=0.5)

    def act(budget: Budget) -> None:
        from polyclinic.methods.optimization.fedavg import FedAvg

        method = FedAvg(TASK, local)
        execute(method, method.request(method.init(TASK.first())), {}, Site("a", {"train": ward(16)}), budget)

    said = stated(tmp_path, "patient", act)
    assert said.spends == (Spend(sigma, q, steps, "patient"),)
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    ).self_compose(steps)
    assert said.epsilon == pytest.approx(theirs.get_epsilon_for_delta(DELTA), abs=1e-6)
    assert said.epsilon >= composed(pair(1.0, None, sigma, q), steps) - 1e-9
    assert said.epsilon >= composed(pair(None, 1.0, sigma, q), steps) - 1e-9


def test_a_record_turns_its_patients_clipped_gradient_round() -> None:
    """So a record is replaced at a distance of 2C, which DP-SGD for patients must be charged for."""
    start, ends = TASK.first(), []
    for flipped in (False, True):
        local = DPSGD(batch_size=1, steps=1, lr=1.0, noise=2.0**-10, bound=0.05)
        ends.append(local.fit(TASK, start, Site("a", {"train": ward(1, flipped)}), 0))
    apart = tree.norm(tree.sub(*ends))
    assert apart == pytest.approx(0.1, rel=0.01)


Densities = tuple[np.ndarray, np.ndarray]
WIDTH = 14.0


def pair(mean: float | None, other: float | None, sigma: float, q: float) -> Densities:
    """Probabilities, on cells of a line, of a sampled gradient sum with a unit's gradient ``mean``, and ``other``.

    None is a unit that is not there. In units of C; the noise has standard deviation ``sigma``.
    """
    edges = np.linspace(-WIDTH * sigma, WIDTH * sigma, 40_001)

    def cells(at: float | None) -> np.ndarray:
        plain = np.diff(stats.norm.cdf(edges, scale=sigma))
        return plain if at is None else (1 - q) * plain + q * np.diff(stats.norm.cdf(edges, at, sigma))

    return cells(mean), cells(other)


def composed(densities: Densities, steps: int, delta: float = DELTA, interval: float = 5e-4) -> float:
    """A lower bound on ε of ``steps`` steps: losses are rounded down, so nothing is counted that is not there."""
    p, other = densities
    seen = (p > 1e-300) & (other > 1e-300)
    p, other = p[seen], other[seen]
    loss = np.floor(np.log(p / other) / interval).astype(int)
    low = loss.min()
    one = np.bincount(loss - low, weights=p)
    total, at = one, low
    for _ in range(steps - 1):
        total, at = signal.fftconvolve(total, one), at + low
    losses = (np.arange(len(total)) + at) * interval
    total = np.maximum(total, 0.0)

    def excess(eps: float) -> float:
        above = losses > eps
        return float((total[above] * -np.expm1(eps - losses[above])).sum()) - delta

    return float(optimize.brentq(excess, 0, losses[-1])) if excess(0.0) > 0 else 0.0


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.25, 1), (2.0, 0.3, 8), (1.1, 0.05, 20), (0.8, 0.9, 3)])
def test_private_training_for_patients_counts_for_records(tmp_path: Path, sigma: float, q: float, steps: int) -> None:
    """A record moves its patient's clipped gradient from one vector to another: at worst to the opposite one."""
    spend = Spend(sigma, q, steps, "patient")
    said = statement([spend], DELTA, "record")
    for other in (-1.0, -0.5, 0.0, None):
        assert said.epsilon >= composed(pair(1.0, other, sigma, q), steps) - 1e-9
        assert said.epsilon >= composed(pair(other, 1.0, sigma, q), steps) - 1e-9
    worst = composed(pair(1.0, -1.0, sigma, q), steps)
    assert worst > 1.05 * epsilon([spend], DELTA), "so the ε for patients is too small for records"
    if steps == 1:  # Balle, Barthe and Gaboardi: removal at 2C bounds a single step
        single = privacy_loss_distribution.from_gaussian_mechanism(
            sigma / 2, sampling_prob=q, value_discretization_interval=1e-3
        )
        assert said.epsilon == pytest.approx(single.get_epsilon_for_delta(DELTA), abs=2e-3)
    assert said.epsilon <= epsilon([spend._replace(rate=1.0, multiplier=sigma / 2)], DELTA) + 1e-3
    assert epsilon_rdp([spend], DELTA, "record") >= said.epsilon - 2e-3
    assert said.guarantee.adjacency == "replace, add or remove one record inside a patient that takes part"


@pytest.mark.parametrize("q", [0.02, 0.5, 0.999])
def test_the_profile_of_a_replaced_unit_is_the_convex_combination_of_the_theorem(q: float) -> None:
    """q · H_α(N(0), N(2C)) against the numeric hockey-stick divergence of (1 - q) N(0) + q N(2C) and N(0)."""
    sigma = 1.5
    p, other = pair(2.0, None, sigma, q)
    eps = np.array([0.0, 0.1, 0.7, 2.0])
    numeric = [float(np.maximum(p - math.exp(e) * other, 0.0).sum()) for e in eps]
    assert profile(eps, sigma / 2, q) == pytest.approx(numeric, abs=1e-6)


# Sparse vector ----------------------------------------------------------------------------------------------------------

GAMMA, TAU = 1.0, 0.3


def sparse(first: float, second: float, third: float) -> SparseVector:
    return SparseVector(0.5, GAMMA, TAU, first, second, third)


@lru_cache
def outcomes(x: tuple[float, float], e: SparseVector) -> np.ndarray:
    """P(first is sent), P(second is sent), P(none is), by integrating over the noisy threshold; c = 1 of two."""
    rho = np.linspace(-40, 40, 16_001) * GAMMA / e.epsilon_threshold
    weight = stats.laplace.pdf(rho, scale=GAMMA / e.epsilon_threshold) * (rho[1] - rho[0])
    a, b = (stats.laplace.sf(TAU + rho - abs(v), scale=2 * GAMMA / e.epsilon_queries) for v in x)
    first = weight @ (0.5 * a + 0.5 * (1 - b) * a)
    second = weight @ (0.5 * b + 0.5 * (1 - a) * b)
    return np.array([first, second, weight @ ((1 - a) * (1 - b))])


def loss(x: tuple[float, float], other: tuple[float, float], e: SparseVector) -> float:
    """The largest |log likelihood ratio| of all outcomes: which coordinate, and its answer with Lap(cΔ/ε₃)."""
    signed = np.log(outcomes(x, e) / outcomes(other, e))
    answers = np.array([abs(x[0] - other[0]), abs(x[1] - other[1]), 0.0]) * e.epsilon_answers / GAMMA
    return float(np.max(np.abs(signed) + answers))


GRID = [-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0]


@pytest.mark.parametrize("how", [(1.0, 1.0, 1.0), (0.3, 0.3, 2.0), (2.0, 0.5, 0.5), (0.5, 2.0, 0.5)])
def test_sparse_sharing(tmp_path: Path, how: tuple[float, float, float]) -> None:
    """ε₁ + ε₂ + ε₃ for a site that is there or not, and twice that for a record inside it."""
    e = sparse(*how)
    points = list(itertools.product(GRID, GRID))
    for_site = max(loss(x, (0.0, 0.0), e) for x in points)
    for_patient = max(loss(x, other, e) for x in points[::3] for other in points)
    said = {
        unit: stated(tmp_path, unit, lambda b: (released((e,), lambda s, r: {"w": torch.zeros(2)}, b), None)[1]).epsilon
        for unit in ("site", "patient", "record")
    }
    assert said["site"] == pytest.approx(sum(how))
    assert said["patient"] == said["record"] == pytest.approx(2 * sum(how))
    assert for_site <= said["site"]
    assert for_patient <= said["patient"]
    if how[2] > how[0] + how[1]:
        assert for_patient > said["site"], "so a patient is not protected as a site is"


def test_sparse_sharing_draws_as_its_proof_says() -> None:
    """The outcomes of the real transform, counted, against the integral; and fresh noise on what is answered."""
    e, x, times = sparse(8.0, 4.0, 4.0), (0.9, -0.2), 1500
    counts, answers = np.zeros(3), []
    for _ in range(times):
        sent = e.encode(WeightedMean({"w": torch.tensor(x)}, 1.0), {}, {}, Site("a"), 0)[0].total["w"]
        where = sent.nonzero().flatten().tolist()
        assert len(where) <= 1, "c = 1 of two coordinates"
        counts[where[0] if where else 2] += 1
        if where == [0]:
            answers.append(float(sent[0]))
    wanted = outcomes(x, e) * times
    assert stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue > 1e-6
    noise = np.array(answers) - x[0]
    assert np.abs(np.array(answers)).max() <= GAMMA, "clamped, which is post-processing"
    free = noise[np.abs(np.array(answers)) < GAMMA]
    below, above = (-GAMMA - x[0], GAMMA - x[0])
    law = stats.laplace(scale=GAMMA / 4.0)
    share = (law.cdf(free) - law.cdf(below)) / (law.cdf(above) - law.cdf(below))
    assert stats.kstest(share, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("leaf", [torch.ones(2, dtype=torch.int64), torch.tensor([True, False])])
def test_sparse_sharing_hides_no_integers_so_sends_none(leaf: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="SparseVector cannot protect integers, and n contains"):
        sparse(1.0, 1.0, 1.0).encode(WeightedMean({"w": torch.zeros(2), "n": leaf}, 1.0), {}, {}, Site("a"), 0)


def test_answers_lie_on_a_grid_which_hides_the_noises_own_digits() -> None:
    e = SparseVector(1.0, 1.0, 0.0, 1.0, 1.0, 64.0)
    sent = e.encode(WeightedMean({"w": torch.full((64,), 0.01, dtype=torch.float64)}, 1.0), {}, {}, Site("a"), 0)[
        0
    ].total["w"]
    grid = 2.0**-20
    inside = sent[(sent != 0) & (sent.abs() < 1)]
    assert torch.equal(inside / grid, (inside / grid).round())
    assert len(inside) > 0


# Noise that sites share under a secure sum ------------------------------------------------------------------------------


def shared(share: int, sites: int, lost: dict[str, str], threshold: int, z: float = 1.5) -> tuple[torch.Tensor, int]:
    """The numbers of a secure sum of zeros, with its noise; and how many sites are in it."""
    transforms = (Clip(1.0), Gaussian(z, share=share), SecureSum(limit=32.0, bits=20, threshold=threshold))
    zeros = pointing(0.0)
    method = send_through(Told(zeros, {}), *transforms)
    request = method.request(method.init(zeros("a", 0)))
    assert request is not None
    replies = {f"s{i}": method.site_update(request, {}, Site(f"s{i}"))[0] for i in range(sites)}
    total, alive = secure_merge(replies, threshold=threshold, lost=lost)
    decoded, _ = method.transforms[-1].decode(total.mean("sent"), {})
    method.transforms[1].decode(decoded, {})
    return decoded.total["m/update/w"].double(), len(alive)


@pytest.mark.parametrize(
    "lost", [{}, {"s0": "share"}, {"s0": "mask", "s4": "advertise"}, {"s1": "mask", "s2": "reveal"}]
)
def test_lost_sites_leave_the_noise_that_is_counted_on(tmp_path: Path, lost: dict[str, str]) -> None:
    """Of six sites, four are counted on: between four and six in the sum, its noise has at least the stated deviation."""
    z = 1.5
    noise, alive = shared(4, 6, lost, 4, z)
    assert 4 <= alive <= 6
    deviation = float(noise.std())
    assert deviation == pytest.approx(z * math.sqrt(alive / 4), rel=6 / math.sqrt(2 * SIZE))

    def act(budget: Budget) -> None:
        released((Clip(1.0), Gaussian(z, share=4), SecureSum(threshold=4)), pointing(0.0), budget)

    said = stated(tmp_path, "site", act)
    assert said.spends == (Spend(z, share=4),)
    assert said.epsilon >= closed_form(1 / (z * math.sqrt(alive / 4)))
    assert "each sum holds the noise of at least 4 sites that keep it secret" in str(said)


def test_fewer_sites_than_are_counted_on_give_no_sum() -> None:
    with pytest.raises(ProtocolError):
        shared(4, 6, {"s0": "mask", "s1": "mask", "s2": "share"}, 4)


def test_sites_that_work_with_the_server_take_their_noise_with_them() -> None:
    """k of the counted sites subtract what they added; what is left has the noise of share - k, as is printed."""
    z, share, k = 1.5, 4, 2
    notes, zeros = Clip(1.0).describe({}), WeightedMean({"w": torch.zeros(SIZE)}, 1.0)
    parts = [Gaussian(z, share=share).encode(zeros, notes, {}, Site(f"s{i}"), 0)[0].total["w"] for i in range(share)]
    left = torch.stack(parts).double().sum(0) - torch.stack(parts[:k]).double().sum(0)
    assert float(left.std()) == pytest.approx(z * math.sqrt((share - k) / share), rel=6 / math.sqrt(2 * SIZE))
    said = str(statement([Spend(z, share=share)], DELTA))
    assert "with k of them working with the server the noise is that of 4 - k" in said


# The grid of the secure sum ---------------------------------------------------------------------------------------------


def rounded_sum(values: list[float], deviation: float) -> dict[int, float]:
    """The law of Σ round(x_i + N(0, deviation²)), all in steps of the grid."""
    wide = int(10 * deviation + 3)
    total, low = np.ones(1), 0
    for x in values:
        ks = np.arange(math.floor(x) - wide, math.floor(x) + wide + 2)
        total = np.convolve(total, np.diff(stats.norm.cdf(np.append(ks - 0.5, ks[-1] + 0.5), x, deviation)))
        low += int(ks[0])
    return {low + i: float(p) for i, p in enumerate(total)}


def divergence(p: dict[int, float], other: dict[int, float], eps: float) -> float:
    return sum(max(0.0, v - math.exp(eps) * other.get(k, 0.0)) for k, v in p.items())


def grid_delta(share: int, part: float, mu: float, rest: list[float]) -> float:
    """δ, at the ε that is printed for 1e-3, of a site that is there or not: at mu deviations, its part ``part`` steps."""
    bound = mu * part * math.sqrt(share)
    here, absent = rounded_sum([bound, *rest], part), rounded_sum([0.0, *rest], part)
    eps = epsilon([Spend(1 / mu)], DELTA)
    return max(divergence(here, absent, eps), divergence(absent, here, eps))


@pytest.mark.parametrize("share", [2, 5, 16])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_noise_that_spans_the_grid_hides_as_if_there_were_none(share: int, offset: float) -> None:
    """Exactly, in one number: at the limit of four steps a sum of rounded parts is as private as is printed."""
    rest = [offset + 0.37 * i for i in range(share - 1)]
    assert grid_delta(share, STEPS, 1.5, rest) <= DELTA * (1 + 1e-9)


def test_noise_below_the_grid_hides_next_to_nothing() -> None:
    """Others' parts round to 0, so that the sum is one site's number: δ is 0.8 where 0.001 is printed."""
    assert grid_delta(16, 0.1, 1.5, [0.0] * 15) > 0.5
    assert STEPS == 4


def through(bits: int, z: float = 1.0, share: int = 4, heaviest: float = 1.0, clip: Transform | None = None) -> Any:
    """A pipeline with noise in ``share`` parts, before a grid of ``bits``."""
    last = SecureSum(limit=64.0, bits=bits, heaviest=heaviest, threshold=max(3, share))
    return send_through(Told(pointing(0.0), {}), clip or Clip(1.0), Gaussian(z, share=share), last)


def test_a_grid_too_coarse_for_a_part_of_the_noise_is_refused_when_it_is_built() -> None:
    """z C / sqrt(share) = 1/2 is four steps of 2^-3, and two of 2^-2."""
    assert through(3).transforms[1].step == 0.125
    pipelines: tuple[Callable[[], Any], ...] = (
        lambda: through(2),
        lambda: through(3, z=0.999),
        lambda: through(3, share=5),
        lambda: through(3, heaviest=1.01),
        lambda: through(3, clip=Clip(0.999)),
    )
    for pipeline in pipelines:
        with pytest.raises(
            ValueError,
            match=r"deviation 0\.\d+, and SecureSum rounds to steps of .*At least 4 steps are "
            r"needed: raise SecureSum's bits \(and lower its limit\)",
        ):
            pipeline()
    assert through(0, z=1e-3, share=1), "a site that adds all noise rounds what is hidden already"
    with pytest.raises(ValueError, match="step follows from SecureSum, so omit it"):
        send_through(Told(pointing(0.0), {}), Clip(1.0), Gaussian(1.0, 4, 1e-9), SecureSum(threshold=4))


@pytest.mark.parametrize(("bound", "works"), [(1.0, True), (0.94, False)])
def test_a_bound_that_moves_is_checked_at_the_site(bound: float, works: bool) -> None:
    """1.05 z C / sqrt(4) is four steps at C = 0.952; the count's own noise, 1.64 / 2, is far above."""
    method = through(3, clip=AdaptiveClip(1.0))
    request = method.request(method.init(pointing(0.0)("a", 0)))
    moved = {"~0/clip": {**request.trees["~0/clip"], "bound": torch.tensor(bound, dtype=torch.float64)}}
    if works:
        assert method.site_update(_with(request, moved), {}, Site("a"))[0].parts
        return
    with pytest.raises(ValueError, match=r"rounds to steps of 0\.125, so the sum would not have"):
        method.site_update(_with(request, moved), {}, Site("a"))


def test_the_counts_part_of_the_noise_must_span_the_grid_too() -> None:
    """0.6 / 2 are 2.4 steps of 1/8, though the noise on the update, in proportion to its bound of 9, is far above."""
    for count_noise, works in ((0.6, False), (0.99, False), (1.0, True)):
        method = through(3, clip=AdaptiveClip(9.0, count_noise=count_noise))
        request = method.request(method.init(pointing(0.0)("a", 0)))
        if works:
            assert method.site_update(request, {}, Site("a"))[0].parts
            continue
        with pytest.raises(ValueError, match="and SecureSum rounds") as refusal:
            method.site_update(request, {}, Site("a"))
        assert f"has standard deviation {count_noise / 2:.3g}," in str(refusal.value)


def test_secret_uniform_numbers_feed_the_noise() -> None:
    """Noise comes from the operating system's bytes, so the same bytes give the same reply, and others another."""
    notes, zeros = Clip(1.0).describe({}), WeightedMean({"w": torch.zeros(8)}, 1.0)

    def sent(byte: int) -> torch.Tensor:
        site = Site("a", entropy=lambda n: bytes((byte + i) % 256 for i in range(n)))
        return Gaussian(1.0).encode(zeros, notes, {}, site, 0)[0].total["w"]

    assert torch.equal(sent(3), sent(3))
    assert not torch.equal(sent(3), sent(9))
    assert isinstance(Site("a").secret_rng(), SecretRng)
