"""Fieller's interval of a ratio of means."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from polyclinic.statistics.paired_tests import corrected_t
from polyclinic.statistics.ratios import ratio_of_means
from polyclinic.statistics.undefined import Undefined


def pairs(rng: np.random.Generator, n: int, means: tuple[float, float], correlation: float) -> np.ndarray:
    """Correlated normal pairs [2, n] of standard deviation 1."""
    return rng.multivariate_normal(means, [[1.0, correlation], [correlation, 1.0]], n).T


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", [4, 8, 20])
def test_coverage_is_that_of_the_level(ratio: float, n: int) -> None:
    """2,000 studies whose denominator is far from 0, so that every interval is bounded."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        found = ratio_of_means(*pairs(rng, n, (12 * ratio, 12.0), 0.5))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= ratio <= found.high
    assert 0.935 <= hits / 2000 <= 0.965  # three standard errors


def test_coverage_with_a_denominator_near_0() -> None:
    """With a denominator of one standard error the unbounded sets, which are not given as intervals, complete 95 %."""
    rng, n, ratio, hits, unbounded = np.random.default_rng(1), 8, 0.5, 0, 0
    for _ in range(2000):
        x, y = pairs(rng, n, (ratio * 2 / n**0.5, 2 / n**0.5), 0.0)
        found = ratio_of_means(x, y)
        if found.low is None or found.high is None:
            unbounded += 1
            d = x - ratio * y
            hits += abs(d.mean()) <= 2.3646243 * d.std(ddof=1) / n**0.5  # t(7)
        else:
            hits += found.low <= ratio <= found.high
    assert unbounded > 500
    assert 0.935 <= hits / 2000 <= 0.965


def test_limits_are_where_the_test_of_that_ratio_has_p_of_5_percent() -> None:
    rng = np.random.default_rng(2)
    x, y = pairs(rng, 6, (3.0, 8.0), 0.3)
    independent, splits = ratio_of_means(x, y), ratio_of_means(x, y, test=0.25, train=0.6)
    for limit in (splits.low, splits.high):
        assert limit is not None
        assert corrected_t(x - limit * y, 0.25, 0.6).p == pytest.approx(0.05)
    for limit in (independent.low, independent.high):
        assert limit is not None
        assert corrected_t(x - limit * y, 1e-12, 1.0).p == pytest.approx(0.05)
    assert independent.value == splits.value == pytest.approx(x.mean() / y.mean())
    assert splits.high - splits.low > independent.high - independent.low  # type: ignore[operator]


def test_an_exact_denominator_gives_students_interval() -> None:
    x = np.array([1.0, 2.0, 4.0, 4.5, 3.0, 2.5])
    found = ratio_of_means(x.tolist(), [2.0] * 6)
    assert (found.low, found.high) == pytest.approx(ttest_1samp(x / 2, 0.0).confidence_interval(0.95))
    assert found.value == pytest.approx(x.mean() / 2)


def test_no_interval_without_a_denominator() -> None:
    found = ratio_of_means([1.0, 2.0, 3.0], [1.0, -1.0, 0.5])
    assert (found.low, found.high) == (None, None)
    assert found.value == pytest.approx(12.0)
    assert "not shown to differ from 0" in found.why
    with pytest.raises(Undefined, match="two repetitions"):
        ratio_of_means([1.0], [1.0])
    with pytest.raises(Undefined, match="is 0"):
        ratio_of_means([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="no pairs"):
        ratio_of_means([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        ratio_of_means([1.0, 2.0], [1.0, 2.0], test=0.3, train=0.0)
