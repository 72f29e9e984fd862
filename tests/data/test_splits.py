"""Splits: by patient, in the shares asked for, evenly within classes, whatever the order of rows."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.examples import DataError, Examples
from polyclinic.data.quality.exact_duplicates import duplicates
from polyclinic.data.source import Table
from polyclinic.data.splits import official, rng_for, split_patients, strata

shares = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)).map(lambda s: tuple(n / sum(s) for n in s))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=120), shares, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_shares_hold_over_all_and_within_each_class(labels: list[int], wanted: tuple[float, ...], seed: int) -> None:
    """Everyone has one role; each role's size is within two patients of its share; so it is within each class."""
    groups = {f"p{i}": label for i, label in enumerate(labels)}
    roles = split_patients(groups, wanted, rng_for(seed))
    assert roles.keys() == groups.keys()
    counts = Counter(roles.values())
    for role, share in zip(("train", "val", "test"), wanted, strict=True):
        assert abs(counts[role] - share * len(groups)) <= 2
        for label in set(labels):
            here = [p for p in groups if groups[p] == label]
            assert abs(sum(roles[p] == role for p in here) - share * len(here)) <= 3
        assert share > 0 or counts[role] == 0
        assert counts[role] or not share or len(groups) < sum(s > 0 for s in wanted)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    """Same seed, other order: the same. Other seed: another."""
    groups = {f"p{i}": i % 2 for i in range(50)}
    turned = dict(reversed(groups.items()))
    assert split_patients(groups, (0.6, 0.2, 0.2), rng_for(1)) == split_patients(turned, (0.6, 0.2, 0.2), rng_for(1))
    assert split_patients(groups, (0.6, 0.2, 0.2), rng_for(1)) != split_patients(groups, (0.6, 0.2, 0.2), rng_for(2))


def table(patients: str, labels: object, **columns: tuple[str, ...]) -> Table:
    """One row per letter."""
    return Table(
        tuple(f"{i}" for i in range(len(patients))), tuple(patients), np.array(labels) if labels else None, columns
    )


def test_strata_of_each_kind_of_label() -> None:
    """Classes by majority (the rarer of equals), label patterns, quantiles of numbers, one group for masks."""
    assert strata(table("aabbc", [0, 0, 0, 1, 1])) == {"a": 0, "b": 1, "c": 1}
    several = strata(table("aab", [[0.0, 1], [1, 0], [1, 1]]))
    assert several["a"] == several["b"]
    numbers = strata(table("abcdefghij", [[float(i)] for i in range(10)]))
    assert [numbers[p] for p in "abcdefghij"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert set(strata(table("abc", None)).values()) == {0}


def test_official_splits_are_kept_or_refused() -> None:
    """Common spellings; a patient in two; an unknown word; no column."""
    good = table("aab", [0, 0, 1], split=("Training", "train", "TEST"))
    assert official(good) == {"a": "train", "b": "test"}
    with pytest.raises(DataError, match=r"1 patients are in two of the official splits \(a\)"):
        official(table("aab", [0, 0, 1], split=("train", "test", "test")))
    with pytest.raises(DataError, match="contains 'fold1'"):
        official(table("ab", [0, 1], split=("train", "fold1")))
    with pytest.raises(DataError, match="has no official split"):
        official(table("ab", [0, 1]))


def test_duplicates_are_found_wherever_they_are() -> None:
    """Equal bytes at two sites and in two roles; different bytes are not."""
    a, b = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    ids = torch.zeros(2, dtype=torch.int64)
    one = Examples(torch.stack([a, b]), ids, ("p", "q"), ("e0", "e1"))
    two = Examples(torch.stack([a, b + 1]), ids, ("r", "s"), ("e2", "e3"))
    (found,) = duplicates({"x": {"train": one}, "y": {"test": two}})
    assert found.ids == ("e0", "e2")
    assert found.places == (("x", "train"), ("y", "test"))
    assert found.across_roles
    assert found.across_sites
    assert len(set(one.input_hashes())) == 2
    assert duplicates({"x": {"train": one}}) == ()
