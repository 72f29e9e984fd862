"""Holm's correction by hand, and its laws."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.statistics.multiple_tests import holm


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_holm_only_makes_p_larger_and_keeps_the_order(p: Any) -> None:
    adjusted = holm(p)
    assert all(a >= q - 1e-12 and a <= 1 for a, q in zip(adjusted, p, strict=True))
    assert all(adjusted[i] <= adjusted[j] + 1e-12 for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])
    assert max(adjusted) <= min(1, len(p) * max(p)) + 1e-12
