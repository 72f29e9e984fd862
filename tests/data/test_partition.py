"""Made-up sites: every patient once, in the proportions that were asked for, with a sentence that says so."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.examples import DataError
from polyclinic.data.partition import PARTITIONS, Dirichlet, Divided, Iid, Pathological, Quantity
from polyclinic.data.splits import rng_for

GROUPS = {f"p{i:03d}": i % 3 for i in range(300)}


@pytest.mark.parametrize("partition", [Iid(5), Dirichlet(5, 0.5), Quantity(5), Pathological(5, 2)])
def test_everyone_goes_to_one_site(partition: Iid | Dirichlet | Quantity | Pathological) -> None:
    """All patients, all sites, the same for the same dice and another for others, whatever the order of rows."""
    dealt = partition.deal(GROUPS, rng_for(0))
    assert dealt.keys() == GROUPS.keys()
    assert set(dealt.values()) == set(range(5))
    assert partition.deal(dict(reversed(GROUPS.items())), rng_for(0)) == dealt
    assert partition.deal(GROUPS, rng_for(1)) != dealt
    assert min(Counter(dealt.values()).values()) >= partition.least
    assert partition.badge.startswith("Simulated sites: ")
    assert PARTITIONS[partition.name] is type(partition)


def proportions(dealt: dict[str, int], count: int) -> np.ndarray:
    """The share of each class at each site. Shape [count, 3]."""
    table = np.zeros((count, 3))
    for patient, site in dealt.items():
        table[site, GROUPS[patient]] += 1
    return table / table.sum(axis=1, keepdims=True)


@given(st.integers(2, 10))
@settings(max_examples=9, deadline=None)
def test_iid_sites_are_equal(count: int) -> None:
    """In size to one patient, in classes to one patient of each."""
    dealt = Iid(count).deal(GROUPS, rng_for(3))
    sizes = Counter(dealt.values())
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert np.abs(proportions(dealt, count) - 1 / 3).max() < 0.1


def test_large_alpha_is_even_and_small_alpha_is_skewed() -> None:
    """Dirichlet: alpha to infinity is iid, alpha to 0 gives each class to one site."""
    even = proportions(Dirichlet(4, 1e6).deal(GROUPS, rng_for(0)), 4)
    assert np.abs(even - 1 / 3).max() < 0.02
    dealt = Dirichlet(3, 0.01, least=1).deal(GROUPS, rng_for(4))
    for label in range(3):
        assert max(Counter(site for p, site in dealt.items() if GROUPS[p] == label).values()) >= 95  # of 100


def test_quantity_differs_in_size_and_not_in_classes() -> None:
    """Sizes spread widely; no site is below the least; the largest sites have all classes evenly."""
    dealt = Quantity(4, 0.5).deal(GROUPS, rng_for(0))
    sizes = Counter(dealt.values())
    assert max(sizes.values()) > 3 * min(sizes.values())
    largest = sizes.most_common(1)[0][0]
    assert np.abs(proportions(dealt, 4)[largest] - 1 / 3).max() < 0.12


def test_pathological_sites_see_only_some_classes() -> None:
    """Exactly k classes each, and every class somewhere."""
    for classes in (1, 2, 3):
        dealt = Pathological(6, classes).deal(GROUPS, rng_for(0))
        seen = {site: {GROUPS[p] for p, s in dealt.items() if s == site} for site in range(6)}
        assert {len(labels) for labels in seen.values()} == {classes}
        assert set().union(*seen.values()) == {0, 1, 2}


def test_impossible_deals_are_refused_in_a_sentence() -> None:
    """Too few patients, bad numbers, classes that do not exist or do not fit, a least that no draw meets."""
    few = {"a": 0, "b": 1}
    for partition in (Iid(3), Dirichlet(2, 0.5), Quantity(2), Pathological(3)):
        with pytest.raises(DataError, match="2 patients are too few"):
            partition.deal(few, rng_for(0))
    for bad in (Dirichlet(2, 0.0), Quantity(2, -1.0), Dirichlet(2, float("nan"))):
        with pytest.raises(DataError, match="must be more than 0"):
            bad.deal(GROUPS, rng_for(0))
    with pytest.raises(DataError, match="choose 1 to 3"):
        Pathological(2, 4).deal(GROUPS, rng_for(0))
    with pytest.raises(DataError, match="cannot hold 3 classes"):
        Pathological(2, 1).deal(GROUPS, rng_for(0))
    with pytest.raises(DataError, match="in 200 draws"):
        Dirichlet(20, 0.01).deal(GROUPS, rng_for(0))
    with pytest.raises(DataError, match="at least one site"):
        Iid(0).deal(GROUPS, rng_for(0))


def test_a_hospital_is_dealt_to_several_sites() -> None:
    """Evenly, each patient once, under the hospital's name; a hospital that is not named stays whole."""
    divided = Divided({"lyon": 3})
    dealt = divided.deal("lyon", GROUPS, rng_for(0))
    sizes = Counter(dealt.values())
    assert dealt.keys() == GROUPS.keys()
    assert sizes == {"lyon-1": 100, "lyon-2": 100, "lyon-3": 100}
    assert set(divided.deal("oslo", GROUPS, rng_for(0)).values()) == {"oslo"}
    assert "(lyon to 3)" in divided.badge
    with pytest.raises(DataError, match=r"parts\.lyon = 0"):
        Divided({"lyon": 0}).deal("lyon", GROUPS, rng_for(0))
