"""Sequences of texts in little memory."""

import sys

import pytest

from polyclinic.data import texts
from polyclinic.data.texts import Texts, joined, taken

WORDS = ["a", "", "ü€", "long " * 9, "", "1.5"]


@pytest.mark.parametrize("most", [0, 20, 2**32])
def test_texts_are_a_sequence_of_text(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST", most)  # ends of 8 bytes from the start, from the second part on, and never
    cells = Texts(WORDS[:2])
    assert list(cells) == WORDS[:2]  # read before the others are appended
    cells.extend(iter(WORDS[2:]))
    assert cells._ends.itemsize == (4 if most == 2**32 else 8)
    assert (len(cells), list(cells), cells[1:4]) == (6, WORDS, WORDS[1:4])
    assert [cells[i] for i in range(-6, 6)] == WORDS * 2
    for i in (6, -7):
        with pytest.raises(IndexError):
            cells[i]
    assert cells == WORDS
    assert tuple(WORDS) == cells
    assert cells == Texts(WORDS)
    assert cells != WORDS[:-1]
    assert Texts(["ab", ""]) != Texts(["a", "b"])
    assert repr(cells) == repr(WORDS)
    assert "1.5" in cells
    assert list(Texts()) == []


def test_what_is_taken_and_joined_is_as_compact_as_what_it_comes_from() -> None:
    for kind in (Texts, tuple):
        words = kind(WORDS)
        assert list(taken(words, iter([5, 0, 0]))) == ["1.5", "a", "a"]
        assert list(joined([words, WORDS[2:3]])) == [*WORDS, "ü€"]
        assert {type(taken(words, [])), type(joined([words, WORDS]))} == {kind}


def test_a_name_takes_four_bytes_more_than_its_characters() -> None:
    names = Texts(f"patient-{i:05}" for i in range(10_000))
    assert names[9_999] == "patient-09999"  # the pieces are one text now
    assert sys.getsizeof(names._joined) + sys.getsizeof(names._ends) < 10_000 * (13 + 4) * 1.1
