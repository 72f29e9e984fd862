"""Sums are sums: merging does not depend on order or grouping, and is to the bit what + gives."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean, merge
from polyclinic.testing import close, equal


def some_tree(seed: int, scale: float = 1.0) -> tree.Tree:
    rng = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {
        "generator": rng,
        "dtype": torch.float64,
    }  # in single precision, sums of what cancels differ visibly
    return {"w": torch.randn(3, 2, **kind) * scale, "b": torch.randn(4, **kind) * scale}


seeds = st.integers(0, 10_000)


@given(seeds, seeds)
def test_arithmetic(i: int, j: int) -> None:
    a, b = some_tree(i), some_tree(j)
    assert close(tree.sub(tree.add(a, b), b), a)
    assert equal(tree.unflatten(tree.flatten(a), a), a)
    assert np.isclose(tree.norm(a), np.linalg.norm(tree.flatten(a).double().numpy()))
    assert np.isclose(tree.dot(a, b), float(tree.flatten(a).double() @ tree.flatten(b).double()))
    assert equal(tree.under("x", {**tree.prefixed("x", a), **tree.prefixed("xy", b)}), a)
    assert equal(tree.lerp(a, b, 0.0), a)
    assert equal(tree.lerp(a, b, 1.0), b)


def test_a_shift_by_another_shape_or_type_is_scaled() -> None:
    a = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    for step in (torch.ones(1), torch.ones(2, 2, dtype=torch.float64)):
        assert torch.equal(tree.shift(a, {"w": step}, 3.0)["w"].float(), torch.full((2, 2), 4.0))
        assert torch.equal(tree.shift(a, {"w": step})["w"].float(), torch.full((2, 2), 2.0))


def test_cosine_of_an_angle() -> None:
    a, b = {"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"w": torch.tensor([4.0]), "b": torch.tensor([3.0])}
    assert tree.cosine(a, b) == pytest.approx(24 / 25)
    assert tree.cosine(a, tree.scale(a, -2)) == pytest.approx(-1)
    assert tree.cosine(a, tree.zeros(a)) == 0


def test_trees_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in \['b'\]"):
        tree.add({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown leaves"):
        tree.shift({"a": torch.ones(1)}, {"c": torch.ones(1)})


@given(st.lists(st.tuples(seeds, st.floats(0.5, 100)), min_size=1, max_size=6), st.integers(0, 5))
def test_merging_in_place_is_to_the_bit_what_plus_gives(given_: list[tuple[int, float]], cut: int) -> None:
    replies = [
        Reply(
            {
                "m": WeightedMean.of(some_tree(s), w),
                "l": ElementwiseMean.of(some_tree(s), some_tree(s + 1)),
                "g": PerSite({f"{i}": some_tree(s)}),
            }
        )
        for i, (s, w) in enumerate(given_)
    ]
    copies = [Reply(dict(r.parts)) for r in replies]
    merged = merge(replies)
    total = replies[0]
    for reply in replies[1:]:
        total = total + reply
    assert equal(merged, total)
    assert equal(replies, copies)
    assert close(merge(replies[:cut]) + merge(replies[cut:]), merged)
    assert close(merge(reversed(replies)), merged)


def test_a_mean_is_the_weighted_mean() -> None:
    values, weights = [some_tree(i) for i in range(3)], [1.0, 2.0, 5.0]
    mean = merge(Reply({"m": WeightedMean.of(v, w)}) for v, w in zip(values, weights, strict=True)).mean("m").value
    expected = np.average([v["w"].numpy() for v in values], axis=0, weights=weights)
    assert np.allclose(mean["w"], expected, atol=1e-6)
    with pytest.raises(ZeroDivisionError):
        _ = WeightedMean({}, 0.0).value


def test_a_mean_is_applied_if_there_is_one() -> None:
    params, change = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -1.0])}
    assert close(
        Reply({"update": WeightedMean.of(change, 3.0)}).applied("update", params), {"w": torch.tensor([1.5, 1.0])}
    )
    assert Reply().applied("update", params) is params
    assert Reply({"update": WeightedMean.of(change, 0.0)}).applied("update", params) is params


def test_a_discount_counts_less() -> None:
    a, b = Reply({"m": WeightedMean.of(some_tree(0))}), Reply({"m": WeightedMean.of(some_tree(1))})
    assert close((a * 3 + b).mean("m").value, (a + a + a + b).mean("m").value)


def test_gathering_twice_from_one_site_is_refused() -> None:
    one = Reply({"g": PerSite({"site": some_tree(0)})})
    with pytest.raises(ValueError, match="two contributions from the same site"):
        merge([one, one])


def test_a_wrong_name_says_what_there_is() -> None:
    with pytest.raises(KeyError, match=r"no WeightedMean named 'updat' in the reply, which has \['update'\]"):
        Reply({"update": WeightedMean.of(some_tree(0))}).mean("updat")


@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([3e38, -3e38, float("inf"), float("-inf"), float("nan")]), max_size=9
    ),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_finite_looks_at_every_number_where_a_sum_cannot_tell(values: list[float], dtype: torch.dtype) -> None:
    leaf = torch.tensor(values, dtype=dtype)
    assert tree.finite_leaf(leaf) == bool(torch.isfinite(leaf).all())


def test_the_sum_of_trees_without_leaves_has_none() -> None:
    assert tree.sum_of([{}, {}, {}]) == ({}, True)
