"""Factors of least rank: they keep the wanted share of the squared singular values, and one rank less does not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.low_rank import factors, rising
from tests.support.known import known


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.3, 0.99), st.sampled_from([torch.float32, torch.float64]))
def test_the_rank_is_the_least_that_keeps_the_energy(seed: int, energy: float, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    leaf = torch.randn(12, 3, 4, generator=rng) @ torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.1]))
    leaf = leaf.to(dtype)
    matrix = leaf.reshape(12, 12).double()
    squares = torch.linalg.svdvals(matrix).square()
    found = factors(leaf, energy)
    if found is None:
        assert squares[:5].sum() < energy * squares.sum()  # rank 6 of a 12 x 12 matrix saves nothing
        return
    us, v = found
    rank = us.shape[1]
    assert us.shape == (12, rank)
    assert v.shape == (rank, 12)
    assert us.dtype == v.dtype == dtype
    assert v.is_contiguous()
    assert rank < 6
    lost = (us.double() @ v.double() - matrix).square().sum()
    assert torch.isclose(lost, squares[rank:].sum(), rtol=1e-3, atol=1e-4)
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: rank - 1].sum() < energy * squares.sum()


def test_what_gains_nothing_is_not_factored() -> None:
    assert factors(torch.ones(9), 0.5) is None
    assert factors(torch.tensor(1.0), 0.5) is None
    assert factors(torch.ones(2, 2), 0.5) is None, "rank 1 has as many numbers as the matrix"
    us, v = known(factors(torch.ones(2, 3), 0.5))
    assert torch.allclose(us @ v, torch.ones(2, 3))
    assert factors(torch.eye(3, 40), 1.0) is None, "all ranks save nothing"


def test_the_share_rises_in_equal_steps_to_its_end() -> None:
    values = [rising(0.2, 0.8, 3, round) for round in range(5)]
    assert values == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8])
