"""Examples: indexing, joining, withholding, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.data.examples import WITHHELD, DataError, Examples, concat


def some(n: int = 4, dtype: torch.dtype = torch.float32) -> Examples:
    """``n`` images of 2 x 3 pixels that count upwards."""
    inputs = torch.arange(n * 6).reshape(n, 1, 2, 3).to(dtype)
    return Examples(
        inputs, torch.arange(n) % 2, tuple(f"p{i // 2}" for i in range(n)), tuple(f"e{i}" for i in range(n))
    )


def test_bytes_are_scaled_when_asked_for_and_stay_bytes_in_memory() -> None:
    """255 is 1, 0 is 0, and what is stored does not change."""
    inputs = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1)
    examples = Examples(inputs, torch.zeros(3, dtype=torch.int64), ("a", "b", "c"), ("a", "b", "c"))
    x, y = examples[torch.tensor([2, 0, 1])]
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert y.dtype == torch.int64
    assert examples.inputs.tolist() == [[0], [51], [255]]


def test_masks_kept_as_bytes_come_out_as_classes() -> None:
    """A mask's values are classes, never scaled."""
    masks = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    x, y = Examples(torch.zeros(1, 1, 2, 2), masks, ("p",), ("e",))[torch.tensor([0])]
    assert y.dtype == torch.int64
    assert y.tolist() == [[[0, 1], [2, 255]]]
    assert x.shape == (1, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_hashes_are_those_of_the_numbers_whatever_their_layout(dtype: torch.dtype) -> None:
    """A column is contiguous with any last stride, as a table of one feature may have it."""
    column = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)[:1].T
    names = ("a", "b", "c")
    hashes = [
        Examples(x, torch.zeros(3, dtype=torch.int64), names, names).input_hashes()
        for x in (column, torch.tensor([[1], [2], [3]], dtype=dtype))
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3
    empty = torch.zeros(0, 1, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    assert Examples(*empty, (), ()).input_hashes() == []


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_a_subset_indexes_like_the_whole(where: list[int]) -> None:
    """subset(i)[j] = whole[i[j]], with its names and patients."""
    whole, index = some(8), torch.tensor(where)
    part = whole.subset(index)
    for got, expected in zip(part[torch.arange(len(where))], whole[index], strict=True):
        assert torch.equal(got, expected)
    assert part.ids == tuple(f"e{i}" for i in where)
    assert part.patients == tuple(f"p{i // 2}" for i in where)


def test_a_mask_of_truth_values_selects_too() -> None:
    """The two ways of naming a part agree."""
    assert some().subset(torch.tensor([True, False, False, True])).ids == ("e0", "e3")


def test_cutting_and_joining_is_nothing() -> None:
    """concat of the parts is the whole, and joining one part changes nothing."""
    whole = some(6)
    joined = concat([whole.subset(torch.arange(2)), whole.subset(torch.arange(2, 6))])
    assert torch.equal(joined.inputs, whole.inputs)
    assert torch.equal(joined.targets, whole.targets)
    assert (joined.ids, joined.patients) == (whole.ids, whole.patients)


def test_withheld_targets_say_nothing() -> None:
    """Classes become -1 and numbers NaN; inputs stay; the original keeps its labels."""
    whole = some()
    hidden = whole.unlabeled()
    assert set(hidden.targets.tolist()) == {WITHHELD}
    assert torch.equal(hidden.inputs, whole.inputs)
    assert whole.targets.tolist() == [0, 1, 0, 1]
    numbers = Examples(torch.zeros(2, 1), torch.ones(2, 1), ("a", "b"), ("a", "b"))
    assert bool(numbers.unlabeled().targets.isnan().all())
    masks = Examples(torch.zeros(1, 1, 2), torch.ones(1, 2, dtype=torch.uint8), ("a",), ("a",))
    assert masks.unlabeled()[torch.tensor([0])][1].tolist() == [[-1, -1]]


def test_what_cannot_be_examples_is_refused_in_a_sentence() -> None:
    """Sizes that differ, kinds we do not know, NaN, nothing to join, shapes that differ."""
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="2 inputs, 2 targets, 1 patients and 2 ids"):
        Examples(torch.zeros(2, 1), y, ("a",), ("a", "b"))
    with pytest.raises(DataError, match="float64: make them float32"):
        Examples(torch.zeros(2, 1, dtype=torch.float64), y, ("a", "b"), ("a", "b"))
    with pytest.raises(DataError, match="the first axis counts examples"):
        Examples(torch.zeros(2), y, ("a", "b"), ("a", "b"))
    with pytest.raises(DataError, match=r"targets are torch\.bool"):
        Examples(torch.zeros(2, 1), y.bool(), ("a", "b"), ("a", "b"))
    for bad in (float("nan"), float("inf")):
        inputs = torch.zeros(2, 1, 4, 4)
        inputs[1, 0, 2, 2] = bad
        with pytest.raises(DataError, match=r"1 of 2 inputs contain NaN or infinite values \(b\)"):
            Examples(inputs, y, ("a", "b"), ("a", "b"))
    with pytest.raises(DataError, match="every part is missing"):
        concat([])
    with pytest.raises(DataError, match="inputs differ"):
        concat([some(), Examples(torch.zeros(2, 3), y, ("a", "b"), ("a", "b"))])
    assert len(some().subset(torch.tensor([], dtype=torch.int64))) == 0
