"""The sparse vector technique with its noise replaced: the scales for which it is proven, and what it may share."""

import hashlib
import math
from typing import Any

import pytest
import torch

from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.metering import Spend, Use, audited
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.learning.training.dp_sgd import metered
from polyclinic.privacy import sparse_vector
from polyclinic.privacy.sparse_vector import SparseVector, UncalibratedNoise, laplace

X = torch.tensor([0.5, -0.9, 0.05, 3.0, -4.0, 0.0, 0.2, -0.31, 0.3, 0.1])


class Noise:
    """In place of ``laplace``: gives what it was set to by the number of values, and writes down the scales."""

    def __init__(self, **values: float) -> None:
        self.asked: list[tuple[int, float]] = []
        self.values = values

    def __call__(self, size: int, scale: float, rng: Any) -> torch.Tensor:
        self.asked.append((size, scale))
        return torch.full((size,), self.values.get({1: "one", 10: "all"}.get(size, "chosen"), 0.0), dtype=torch.float64)


def shared(transform: Any, total: Tree) -> Tree:
    sent, memory = transform.encode(WeightedMean(total, 2.0), {}, {"kept": {}}, Site("bern"), 0)
    assert memory == {"kept": {}}
    assert sent.weight == 2.0
    return sent.total


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    made = Noise()
    monkeypatch.setattr(sparse_vector, "laplace", made)
    return made


@pytest.mark.parametrize("fraction", [0.2, 0.29, 0.4])
def test_the_scales_are_those_of_the_proof(fraction: float, noise: Noise) -> None:
    """Lyu, Su and Li, algorithm 7 with Δ = γ: Δ/ε₁, 2cΔ/ε₂ for c answers, and cΔ/ε₃ for their values."""
    transform = SparseVector(fraction, 0.5, 0.01, 0.3, 0.7, 1.1)
    with metered() as spent:
        shared(transform, {"w": X})
    c = int(fraction * 10)
    asked: list[tuple[int, Any]] = sorted(noise.asked)
    assert asked == [
        (1, pytest.approx(0.5 / 0.3)),
        (c, pytest.approx(c * 0.5 / 1.1)),
        (10, pytest.approx(2 * c * 0.5 / 0.7)),
    ]
    paid: list[tuple[float, Any]] = [(spend.multiplier, spend.pure) for spend in spent]
    assert paid == [(0.0, pytest.approx(2.1))]
    assert transform.epsilon == pytest.approx(0.3 + 0.7 + 1.1)


def test_without_noise_the_large_ones_are_shared_cut_to_the_bound(noise: Noise) -> None:
    """Sizes count, not signs; one that equals the threshold is large."""
    found = shared(SparseVector(1.0, 1.0, 0.3), {"a": X[:4].reshape(2, 2), "b": X[4:]})
    expected = torch.tensor([0.5, -0.9, 0, 1.0, -1.0, 0, 0, -0.31, 0.3, 0])
    assert torch.allclose(torch.cat([found["a"].flatten(), found["b"]]), expected, atol=1e-5)
    assert found["a"].shape == (2, 2)
    assert found["a"].dtype == torch.float32
    exactly = shared(SparseVector(1.0, 1.0, 0.25), {"w": torch.tensor([0.25, 0.125, -0.25])})["w"]
    assert exactly.tolist() == pytest.approx([0.25, 0.0, -0.25], rel=1e-5)


def test_no_more_than_the_fraction_is_shared_whichever_are_large(noise: Noise) -> None:
    seen = set()
    for _ in range(60):
        found = shared(SparseVector(0.39, 1.0, 0.3), {"w": X})["w"]
        chosen = found.nonzero().flatten().tolist()
        assert len(chosen) == 3
        assert set(chosen) <= {0, 1, 3, 4, 7, 8}
        seen |= set(chosen)
    assert seen == {0, 1, 3, 4, 7, 8}, "in random order, so that none of them is favored"


def test_one_is_shared_however_small_the_fraction(noise: Noise) -> None:
    assert int((shared(SparseVector(1e-6, 1.0, 0.3), {"w": X})["w"] != 0).sum()) == 1
    assert float(shared(SparseVector(1e-6, 1.0, 0.0), {"w": torch.tensor([0.7])})["w"]) == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"one": 0.55}, 3),
        ({"one": -0.2}, 8),
        ({"all": 0.2}, 8),
        ({"all": -0.55}, 3),
        ({"one": 0.3, "all": 0.3}, 6),
        ({"one": 9.0}, 0),
    ],
)
def test_the_thresholds_noise_raises_it_and_the_queries_noise_is_added_to_sizes(
    values: dict[str, float], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_vector, "laplace", Noise(**values))
    found = shared(SparseVector(1.0 - 1e-9, 1.0, 0.3), {"w": X})["w"]
    assert int((found != 0).sum()) == count


@pytest.mark.parametrize(("added", "expected"), [(0.25, 0.75), (-0.3, 0.2), (9.0, 1.0), (-9.0, -1.0)])
def test_answers_have_noise_and_stay_within_the_bound(
    added: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_vector, "laplace", Noise(chosen=added))
    found = shared(SparseVector(0.5, 1.0, 0.1), {"w": torch.full((10,), 0.5)})["w"]
    assert found[found != 0].tolist() == pytest.approx([expected] * 5, rel=1e-5)


@pytest.mark.parametrize(("bound", "epsilon"), [(1.0, 1.0), (1e-3, 0.3), (8.0, 5.0)])
def test_answers_lie_on_a_grid_of_a_millionth_of_their_noise(bound: float, epsilon: float, noise: Noise) -> None:
    """Digits below would tell which of the numbers the noise could have been."""
    x = torch.linspace(0.1, 0.9, 10, dtype=torch.float64) * bound
    found = shared(SparseVector(0.5, bound, 0.0, epsilon_answers=epsilon), {"w": x})["w"]
    grid = 2.0 ** (math.floor(math.log2(5 * bound / epsilon)) - 20)
    assert torch.equal((found / grid).round() * grid, found)
    chosen = found != 0
    assert int(chosen.sum()) == 5
    assert bool(((found - x)[chosen].abs() <= grid / 2).all())
    assert not torch.equal(found[chosen], x[chosen])


def test_integers_are_refused_by_name_but_empty_ones_pass(noise: Noise) -> None:
    """The first in name order is named, and nothing is paid for what is not sent."""
    with (
        metered() as spent,
        pytest.raises(ValueError, match=r"SparseVector cannot protect integers, and m contains torch\.int32"),
    ):
        shared(SparseVector(), {"w": X, "n": torch.ones(1, dtype=torch.int64), "m": torch.ones(2, dtype=torch.int32)})
    assert not spent
    found = shared(
        SparseVector(1.0, 1.0, 0.3), {"w": X.half(), "none": torch.zeros(0, dtype=torch.int64), "v": X.double()}
    )
    assert {name: leaf.dtype for name, leaf in found.items()} == {
        "w": torch.float16,
        "none": torch.int64,
        "v": torch.float64,
    }


def test_left_to_itself_a_tenth_is_shared_at_an_epsilon_of_3() -> None:
    usual = SparseVector()
    assert (usual.fraction, usual.bound, usual.threshold, usual.epsilon) == (0.1, 1e-3, 1e-4, 3.0)
    assert (usual.epsilon_threshold, usual.epsilon_queries, usual.epsilon_answers) == (1.0, 1.0, 1.0)
    assert UncalibratedNoise().scale == 0.01


def test_what_cannot_be_hidden_is_refused(noise: Noise) -> None:
    with metered() as spent:
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match="contains NaN or infinity"):
                shared(SparseVector(), {"a": X, "w": torch.tensor([1.0, bad])})
        with pytest.raises(ValueError, match=r"norm.running_var is a variance"):
            shared(SparseVector(), {"a": X, "norm.running_var": X.abs()})
    assert not spent


@pytest.mark.parametrize(
    "transform",
    [
        SparseVector(),
        SparseVector(1.0),
        SparseVector(threshold=0.0),
        SparseVector(1e-9),
        SparseVector(0.1, 1e-6, 1.0, 1e-3, 1e-3, 1e-3),
        UncalibratedNoise(),
        UncalibratedNoise(0.0),
        UncalibratedNoise(5.0),
    ],
)
def test_these_are_right(transform: Any) -> None:
    assert transform.validate((), ()) == []


@pytest.mark.parametrize(
    "transform",
    [
        SparseVector(0.0),
        SparseVector(-0.1),
        SparseVector(1.001),
        SparseVector(math.nan),
        SparseVector(bound=0.0),
        SparseVector(bound=-1.0),
        SparseVector(threshold=-1e-9),
        SparseVector(bound=math.nan),
        SparseVector(epsilon_threshold=0.0),
        SparseVector(epsilon_queries=0.0),
        SparseVector(bound=math.inf),
        SparseVector(threshold=math.inf),
        SparseVector(threshold=math.nan),
        SparseVector(epsilon_answers=math.inf),
        SparseVector(epsilon_threshold=math.nan),
        SparseVector(epsilon_answers=-1.0),
        UncalibratedNoise(-1e-9),
        UncalibratedNoise(math.inf),
        UncalibratedNoise(math.nan),
    ],
)
def test_these_are_wrong(transform: Any) -> None:
    assert len(transform.validate((), ())) == 1


def test_every_problem_is_told() -> None:
    said = SparseVector(0.0, 0.0, 0.0, 0.0).validate((), ())
    assert [text.split(" must")[0] for text in said] == [
        "SparseVector: fraction",
        "SparseVector: bound",
        "SparseVector: each epsilon",
    ]
    assert SparseVector.uniform
    assert SparseVector.private
    assert not getattr(UncalibratedNoise, "private", False), "it must never count as privacy"


def test_laplace_is_the_inverse_of_its_distribution() -> None:
    """F⁻¹(u) = −s · sign(u − ½) · ln(1 − 2 |u − ½|), of numbers that are known."""
    data = bytes(range(1, 81))
    u = SecretRng(lambda n: data[:n]).uniform(10)
    found = laplace(10, 3.0, SecretRng(lambda n: data[:n]))
    for drawn, at in zip(found.tolist(), u.tolist(), strict=True):
        expected = 3 * math.log(2 * at) if at < 0.5 else -3 * math.log(2 * (1 - at))
        assert drawn == pytest.approx(expected)
    assert found.dtype == torch.float64
    assert laplace(0, 1.0, SecretRng()).shape == (0,)


def test_all_noise_comes_from_the_sites_secret_bytes() -> None:
    """The same bytes give the same reply, and others another, whatever the study's seed."""

    def sent(key: bytes, seed: int) -> torch.Tensor:
        count = iter(range(100))
        site = Site("bern", seed=seed, entropy=lambda n: hashlib.shake_128(key + bytes([next(count)])).digest(n))
        return SparseVector(0.5, 1.0, 0.0).encode(WeightedMean({"w": X}, 1.0), {}, {}, site, 0)[0].total["w"]

    assert torch.equal(sent(b"a", 0), sent(b"a", 1))
    assert not torch.equal(sent(b"a", 0), sent(b"b", 0))


def test_an_auditor_sees_that_no_normal_noise_is_counted_on() -> None:
    seen = []

    def keep(use: Use, noise: Any) -> Tree:
        seen.append((use.spend, dict(use.deviations), use.bound))
        return use.value

    with audited(keep):
        found = shared(SparseVector(bound=0.25), {"w": X})["w"]
    assert torch.equal(found, X.clamp(-0.25, 0.25))
    assert seen == [(Spend(0.0, pure=3.0), {}, 0.25)]


class Ones(SecretRng):
    """Normal noise that is always 1."""

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float64)


def test_uncalibrated_noise_is_the_scale_times_the_deviation_of_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "secret_rng", lambda site: Ones())
    total = {
        "w": torch.tensor([[1.0, 3.0], [1.0, 3.0]]),
        "two": torch.tensor([0.0, 8.0]),
        "one": torch.tensor([9.0]),
        "n": torch.tensor([1, 5]),
        "none": torch.zeros(0),
    }
    found = shared(UncalibratedNoise(0.5), total)
    assert found["w"].tolist() == [[1.5, 3.5], [1.5, 3.5]]
    assert found["two"].tolist() == [2.0, 10.0]
    for name in ("one", "n", "none"):
        assert torch.equal(found[name], total[name])
    assert found["w"].dtype == torch.float32
    with metered() as spent:
        shared(UncalibratedNoise(0.5), total)
    assert not spent
