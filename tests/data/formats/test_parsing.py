"""Cells of tables as numbers."""

import pytest

from polyclinic.data.formats import parsing
from polyclinic.data.formats.parsing import numbers_of
from polyclinic.data.texts import Texts


@pytest.mark.parametrize("kind", [list, Texts])
def test_numbers_of_several_blocks(kind: type[list[str] | Texts]) -> None:
    words = [f"{i / 7:.6f}" for i in range(2 * parsing.BLOCK + 3)]
    found = numbers_of(kind(words))
    assert found is not None
    assert found.tolist() == [float(word) for word in words]


@pytest.mark.parametrize("bad", ["", "x", "nan", "1e999", "-inf", "1_0", "0x1", "1,5"])
@pytest.mark.parametrize("place", [0, parsing.BLOCK, 2 * parsing.BLOCK + 2])
def test_a_word_that_is_no_finite_number_is_found_in_every_block(bad: str, place: int) -> None:
    words = ["1"] * (2 * parsing.BLOCK + 3)
    words[place] = bad
    assert numbers_of(words) is None


def test_no_words_are_no_numbers() -> None:
    found = numbers_of([])
    assert found is not None
    assert len(found) == 0
