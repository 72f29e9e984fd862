"""Pools: no target of an unlabeled example gets out, and nothing is lost or repeated."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.core.site import Site
from polyclinic.learning.tasks.example_pool import (
    Chained,
    ChainedViews,
    Untargeted,
    UntargetedViews,
    all_inputs,
    endless,
    size,
    unlabeled,
)
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows


def rows(n: Any, begin: Any = 0) -> Any:
    return Rows(torch.arange(begin, begin + n).float()[:, None], torch.zeros(n, dtype=torch.long))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_a_chain_is_its_parts_in_order(sizes: Any, seed: int) -> None:
    parts, begin = [], 0
    for n in sizes:
        parts.append(rows(n, begin))
        begin += n
    chain = Chained(tuple(parts))
    assert len(chain) == begin
    if begin:
        index = torch.randint(begin, (9,), generator=torch.Generator().manual_seed(seed))
        inputs, where = chain[index]
        assert torch.equal(inputs[:, 0].long(), index)
        assert torch.equal(where, index)


def test_targets_are_not_there() -> None:
    data = {role: Rows(torch.randn(n, 3), torch.full((n,), 7)) for role, n in (("train", 4), ("unlabeled", 5))}
    for pool in (unlabeled(data), all_inputs(data)):
        _, y = pool[torch.arange(len(pool))]
        assert torch.equal(y, torch.arange(len(pool)))
    assert (len(unlabeled(data)), len(all_inputs(data))) == (5, 9)


def test_missing_and_empty_roles_count_as_nothing() -> None:
    assert size({}, "train") == len(unlabeled({})) == len(all_inputs({})) == 0
    assert len(all_inputs({"train": rows(0), "unlabeled": rows(3)})) == 3
    with pytest.raises(IndexError, match="no example"):
        all_inputs({})[torch.tensor([0])]


def test_an_endless_stream_goes_through_everything_again_and_again() -> None:
    local, rng = LocalTraining(batch_size=4), Site("a").rng("x")
    stream = endless(local, Untargeted(rows(8)), rng)
    seen = torch.cat([next(stream)[0][:, 0] for _ in range(6)]).long()
    assert torch.equal(seen.bincount(), torch.full((8,), 3))
    assert list(endless(local, Untargeted(()), rng)) == []


class Views:
    """Images on disk: the random view of example i is filled with i and shows whether it was forced."""

    patch = (2, 2)
    shape = (1, 2, 2)

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (index + self.first).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), index

    def draw(
        self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, *size), float(i + self.first) + 100 * forced), torch.zeros(size)


def test_random_views_are_drawn_without_their_targets_and_never_forced() -> None:
    """Also of a chain of parts; a forced view would show where the mask is."""
    rng = torch.Generator()
    free = unlabeled({"unlabeled": Views(3)})
    assert isinstance(free, UntargetedViews)
    assert free.patch == (2, 2)
    x, y = free.draw(2, rng, True, (3, 3))
    assert torch.equal(x, torch.full((1, 3, 3), 2.0))
    assert int(y) == 2
    chain = all_inputs({"train": Views(3), "unlabeled": Views(2, 10)})
    assert isinstance(chain, ChainedViews)
    drawn = [chain.draw(i, rng, True, (2, 2)) for i in range(5)]
    assert [float(x[0, 0, 0]) for x, _ in drawn] == [0, 1, 2, 10, 11]
    assert [int(y) for _, y in drawn] == [0, 1, 2, 3, 4]
    assert chain.shape == (1, 2, 2)
    with pytest.raises(IndexError, match="there are 5 examples"):
        chain.draw(5, rng, False, (2, 2))
    assert not hasattr(all_inputs({"train": rows(4)}), "draw")
    assert not hasattr(unlabeled({"unlabeled": rows(4)}), "draw")
