"""Clipping, noise, secure sums and what they cost: the limits, the laws, and the refusals."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from polyclinic.compression.topk import TopK
from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.learning.training.dp_sgd import Spend, metered
from polyclinic.privacy.gaussian import AdaptiveClip, Clip, Gaussian
from polyclinic.privacy.sparse_vector import SparseVector, UncalibratedNoise, laplace
from polyclinic.secure_aggregation import SecureSum, terms
from tests.support.transform_sending import Told, close, constant, random_values, run

VALUES = random_values()
WIDE = random_values(scale=0.3)
SIZE = sum(leaf.numel() for leaf in VALUES("a", 0).values())


def one(values: Any, *transforms: Transform, rounds: int = 1, **more: Any) -> Any:
    return run(values, *transforms, sites=("a",), rounds=rounds, **more)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e3), st.integers(0, 5))
def test_clipping_bounds_the_norm_and_keeps_the_direction(bound: float, round: int) -> None:
    sent = WeightedMean(VALUES("a", round), 1.0)
    clipped, _ = Clip(bound).encode(sent, Clip(bound).describe({}), {}, Site("a"), 0)
    assert tree.norm(clipped.total) <= min(bound, tree.norm(sent.total) * (1 + 1e-9))
    assert tree.cosine(clipped.total, sent.total) == pytest.approx(1, abs=1e-5)


def test_without_reach_clipping_is_nothing() -> None:
    ours, plain = run(VALUES, Clip(1e9)), run(VALUES)
    assert all(torch.equal(ours.last[k], plain.last[k]) for k in plain.last)


def test_parts_are_clipped_together_and_integers_never_hidden() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        one(lambda site, round: {"w": torch.tensor([math.nan, 1.0])}, Clip(1.0))
    sent = WeightedMean({"m/a/w": torch.ones(2, dtype=torch.int32)}, 1.0)
    notes = Clip(1.0).describe({})
    with pytest.raises(ValueError, match="Gaussian cannot protect integers"):
        Gaussian(1.0).encode(sent, notes, {}, Site("a"), 0)


@pytest.mark.parametrize(
    "transforms", [(Clip(1.0), Gaussian(1.0)), (SparseVector(),), (TopK(0.5), Clip(1.0), Gaussian(1.0))], ids=str
)
def test_variances_are_not_hidden_in_noise(transforms: Any) -> None:
    with pytest.raises(ValueError, match=r"running_var.* noise would make negative: .* norm = .group."):
        one(lambda site, round: {"norm.running_var": torch.ones(3)}, *transforms)


@pytest.mark.parametrize("share", [1, 4])
def test_noise_has_the_stated_depth_in_the_sum(share: int) -> None:
    """Of `share` sites, each adds its part; together it is as much as one alone would add."""
    sites, bound, z = tuple(f"s{i}" for i in range(4)), 0.5, 2.0
    zeros = lambda site, round: tree.zeros(VALUES(site, 0))  # noqa: E731
    transforms = (Clip(bound), Gaussian(z, share), *([SecureSum(threshold=4)] if share > 1 else []))
    ran = run(zeros, *transforms, sites=sites, rounds=20)
    sums = torch.cat([tree.flatten(s.inner.last) * 4 for s in ran.states]).double()
    expected = z * bound * (1 if share == 4 else 2)
    assert float(sums.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(sums)))
    assert scipy_stats.kstest((sums / expected).numpy(), "norm").pvalue > 1e-6


def test_noise_comes_from_the_operating_system() -> None:
    notes, sent = Clip(1.0).describe({}), WeightedMean(VALUES("a", 0), 1.0)
    (first, _), (second, _) = (Gaussian(1.0).encode(sent, notes, {}, Site("a", seed=3), 0) for _ in range(2))
    assert not any(torch.equal(first.total[k], second.total[k]) for k in first.total)


def test_the_bound_finds_the_median_norm() -> None:
    """Andrew et al., figure 1 in small: from 100 times below, to about the median, and nearer without noise."""
    sizes = {f"s{i:02}": 0.5 + i / 9 for i in range(10)}  # the median is 1

    def values(site: str, round: int) -> Tree:
        v = VALUES(site, round)
        return tree.scale(v, sizes[site] / tree.norm(v))

    for clip, tolerance in ((AdaptiveClip(0.01), 0.08), (AdaptiveClip(0.01, count_noise=0.5), 0.2)):
        ran = run(values, clip, *([Gaussian(0.1)] if clip.count_noise else []), sites=tuple(sizes), rounds=65)
        bounds = [float(s.transforms[0]["clip"]["bound"]) for s in ran.states]
        assert abs(sum(bounds[-15:]) / 15 - 1) < tolerance
        assert bounds[0] == pytest.approx(0.01 * math.exp(0.2 * 0.5), rel=0.1)
    assert close(
        run(values, AdaptiveClip(9.0, rate=0.0), sites=tuple(sizes)).last, run(values, sites=tuple(sizes)).last
    )


def test_where_every_site_is_clipped_the_bound_opens_at_its_rate_and_directions_count() -> None:
    """No site is below the bound: it opens by exp(η γ) a round, and what is sent has its length meanwhile."""
    start = 1e-6
    ran = run(VALUES, AdaptiveClip(start), rounds=4)
    bounds = [start, *(float(s.transforms[0]["clip"]["bound"]) for s in ran.states)]
    assert bounds == pytest.approx([start * math.exp(0.1 * k) for k in range(5)])
    fixed = run(VALUES, Clip(start))
    sent = [VALUES(site, 0) for site in "abc"]
    wanted = [tree.scale(v, start / tree.norm(v) / 3) for v in sent]
    assert close(fixed.last, tree.add(tree.add(wanted[0], wanted[1]), wanted[2]))
    assert tree.norm(fixed.last) <= start


def test_the_count_takes_its_share_of_the_noise() -> None:
    """(z_Δ)⁻² + (2 σ_b)⁻² = z⁻²; left to itself the noise on everything else is 5 % larger."""
    settled = AdaptiveClip(1.0).resolve((Gaussian(0.8),))
    assert isinstance(settled, AdaptiveClip)
    assert settled.count_noise is not None
    z = (0.8**-2 - (2 * settled.count_noise) ** -2) ** -0.5
    assert z == pytest.approx(0.8 * 1.05)
    zeros = {"m/update/w": torch.zeros(20_000), "m/~clip/below": torch.zeros(20_000)}
    noisy, _ = Gaussian(0.8).encode(WeightedMean(zeros, 1.0), settled.describe(settled.init({})), {}, Site("a"), 0)
    assert float(noisy.total["m/update/w"].std()) == pytest.approx(z, rel=0.03)
    assert float(noisy.total["m/~clip/below"].std()) == pytest.approx(settled.count_noise, rel=0.03)


@pytest.mark.parametrize(
    ("transforms", "why"),
    [
        ((Gaussian(1.0),), "Gaussian must come directly after Clip"),
        ((Clip(1.0), TopK(0.5, shared=True), Gaussian(1.0)), "Gaussian must come directly after Clip"),
        ((Clip(0.0),), "bound must be a number above 0"),
        ((Clip(math.inf),), "bound must be a number above 0"),
        ((Clip(1.0), Gaussian(0.0)), "claim no privacy"),
        ((Clip(1.0), Gaussian(1.0, share=3)), "must be followed by SecureSum"),
        ((Clip(1.0), Gaussian(1.0, share=5), SecureSum()), r"write SecureSum\(threshold=5\)"),
        ((Clip(1.0), Gaussian(1.0, share=0)), "share is a number of sites"),
        ((AdaptiveClip(0.0),), "start must be"),
        ((AdaptiveClip(1.0, quantile=1.0),), "quantile must be between"),
        ((AdaptiveClip(1.0, count_noise=0.4), Gaussian(1.0)), "count_noise must be above 0.5"),
        ((TopK(0.5, shared=False), Clip(1.0)), "Clip must come before TopK"),
        ((SecureSum(), Clip(1.0)), "SecureSum must come last"),
        ((SecureSum(limit=2000.0),), "can wrap around"),
        ((SecureSum(bits=40),), "bits from 0 to 30"),
        ((SecureSum(threshold=2),), "threshold must be at least 3"),
        ((TopK(0.5, shared=False), SecureSum()), "the output of TopK cannot be summed"),
        ((SparseVector(fraction=0.0, bound=0.0, epsilon_answers=0.0),), "fraction .*; .*bound .*; .*each epsilon"),
        ((UncalibratedNoise(-1.0),), "scale must not be below 0"),
    ],
)
def test_wrong_pipelines_are_refused_in_a_sentence(transforms: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        run(VALUES, *transforms)


def test_weights_would_tell_how_many_examples_a_site_has() -> None:
    for late in (True, False):
        with pytest.raises(ValueError, match="the number of examples of a site is private"):
            run(VALUES, Clip(1.0), weights={"a": 7.0}, uniform=late)


def test_the_sum_in_the_ring_is_the_sum() -> None:
    ours, plain = run(WIDE, SecureSum()), run(WIDE)
    assert close(ours.last, plain.last, 2.0**-22)
    assert ours.weight == plain.weight == 3
    assert all(leaf.dtype == torch.int32 for leaf in ours.replies[0]["a"].mean("sent").total.values())
    assert ours.replies[0]["a"].nbytes == 4 * (SIZE + 1)


def test_weights_are_summed_in_secret_too() -> None:
    weights = {"a": 12.0, "b": 600.0, "c": 77.0}
    ours, plain = run(WIDE, SecureSum(heaviest=600), weights=weights), run(WIDE, weights=weights)
    assert close(ours.last, plain.last, 1e-4)
    assert ours.weight == pytest.approx(sum(weights.values()), rel=1e-6)
    assert {r.mean("sent").weight for r in ours.replies[0].values()} == {1.0}, "no weight travels in the clear"
    with pytest.raises(ValueError, match=r"a has weight 12\. Set heaviest to the examples of the largest site"):
        run(WIDE, SecureSum(), weights=weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(4, 20), st.integers(0, 10**6))
def test_numbers_survive_the_ring_at_its_very_limit(sites: int, bits: int, seed: int) -> None:
    transform = SecureSum(limit=(2**31 - 1 - sites) / sites / 2**bits - 1, bits=bits)
    assert transform.capacity >= sites
    sign = 1 if seed % 2 else -1
    leaf = torch.full((3,), sign * transform.limit * 0.999999)
    coded, _ = transform.encode(WeightedMean({"m/w": leaf}, 1.0), {}, {}, Site("a"), 0)
    total = coded
    for _ in range(sites - 1):
        total = total + coded
    value, _ = transform.decode(total, {})
    assert torch.allclose(value.total["m/w"], leaf * sites, rtol=1e-6, atol=sites * 2.0**-bits)


@pytest.mark.parametrize("number", [8.001, -9.0, math.nan, math.inf])
def test_a_number_beyond_the_limit_is_refused_before_anything_is_sent(number: float) -> None:
    with pytest.raises(ValueError, match="Nothing was sent"):
        one(lambda site, round: {"w": torch.tensor([0.0, number])}, SecureSum())


def test_secure_sums_are_asked_for_and_not_discounted() -> None:
    method = send_through(Told(WIDE, {}), Clip(1.0), SecureSum(threshold=5))
    request = method.request(method.init(VALUES("a", 0)))
    assert request is not None
    assert request.secure
    assert terms(request) == (5, 63)
    plain = send_through(Told(WIDE, {}), Clip(1.0))
    assert terms(plain.request(plain.init(VALUES("a", 0)))) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be discounted"):
        run(WIDE, SecureSum(), merge=lambda replies: replies["a"] * 0.5 + replies["b"])
    with pytest.raises(ValueError, match="is not a value of SecureSum"):
        SecureSum().decode(WeightedMean({"m/w": torch.ones(2)}, 1.0), {})


def test_shared_noise_that_did_not_arrive_is_noticed() -> None:
    some = lambda replies: replies["a"] + replies["b"]  # noqa: E731
    with pytest.raises(ValueError, match="contains the noise of 2 sites, but 3 are required"):
        run(WIDE, Clip(1.0), Gaussian(1.0, share=3), SecureSum(threshold=3), merge=some)


def test_what_a_release_costs_is_metered() -> None:
    with metered() as spent:
        one(VALUES, Clip(1.0), Gaussian(0.8), rounds=2)
        one(VALUES, SparseVector())
        one(VALUES, UncalibratedNoise(1.0))
    assert spent == [Spend(0.8), Spend(0.8), Spend(0.0, pure=3.0)]


def test_uncalibrated_noise_is_in_proportion_to_each_tensor() -> None:
    big = lambda site, round: {"w": torch.linspace(-3, 3, 30_000), "one": torch.ones(1)}  # noqa: E731
    ours, plain = one(big, UncalibratedNoise(0.5)), one(big)
    noise = ours.last["w"] - plain.last["w"]
    assert float(noise.std() / plain.last["w"].std()) == pytest.approx(0.5, rel=0.03)
    assert torch.equal(ours.last["one"], plain.last["one"])
    assert close(one(VALUES, UncalibratedNoise(0.0)).last, one(VALUES).last)


def test_laplace_is_laplace() -> None:
    drawn = laplace(20_000, 3.0, SecretRng())
    assert scipy_stats.kstest(drawn.numpy(), scipy_stats.laplace(scale=3.0).cdf).pvalue > 1e-6


def test_sparse_sharing_without_privacy_shares_the_large_ones_exactly() -> None:
    v = one(VALUES).last
    certain = SparseVector(1.0, 1.0, 0.5, 1e9, 1e9, 1e9)
    ours = one(VALUES, certain).last
    for name, leaf in v.items():
        clipped = leaf.clamp(-1, 1)
        assert torch.allclose(ours[name], torch.where(clipped.abs() >= 0.5, clipped, 0.0), atol=1e-4), name


def test_sparse_sharing_shares_no_more_than_its_fraction_and_within_its_bound() -> None:
    ours = tree.flatten(one(VALUES, SparseVector(0.1, 0.5, 0.0)).last)
    assert 0 < int((ours != 0).sum()) <= int(0.1 * SIZE) + 1
    assert float(ours.abs().max()) <= 0.5
    assert SparseVector().epsilon == 3.0
    ring = run(VALUES, SparseVector(0.1, 0.5, 0.0), SecureSum())  # zeros add up
    assert tree.finite(ring.last)


def test_repeated_rounds_keep_their_promises() -> None:
    """The whole sentence of the design page: sparse, clipped, noised, summed in secret."""
    transforms = (TopK(0.25), Clip(1.0), Gaussian(0.001), SecureSum())
    ran = run(constant(VALUES), *transforms, rounds=20)
    assert ran.weight == 3
    sent = ran.replies[-1]["a"]
    assert isinstance(sent, Reply)
    assert sent.nbytes < 0.3 * 4 * SIZE
    clear = run(constant(VALUES), TopK(0.25, shared=True), Clip(1.0), rounds=20)
    assert tree.cosine(ran.total, clear.total) > 0.99
