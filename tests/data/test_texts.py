"""Sequences of texts in little memory."""

import sys

import pytest

from polyclinic.data import texts
from polyclinic.data.texts import Positions, Texts, joined, taken

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
    assert names[9_999] == "patient-09999"
    assert sys.getsizeof(names._bytes) + sys.getsizeof(names._ends) < 10_000 * (13 + 4) + 500


def test_texts_of_several_blocks_are_cut_anywhere() -> None:
    words = [f"é{i}" for i in range(3 * texts.BLOCK + 7)]
    cells = Texts(words[:5])
    cells.extend(words[5:])
    assert list(cells) == words
    for cut in (slice(1000, 2100), slice(-9, None), slice(None, None, 700), slice(50, 40), slice(3000, 20, -501)):
        assert cells[cut] == words[cut]


def test_a_text_that_is_no_sound_unicode_is_kept() -> None:
    assert list(Texts(["a\udc80"])) == ["a\udc80"]


@pytest.mark.parametrize("kind", [Texts, tuple])
def test_positions_are_found(kind: type[Texts | tuple[str, ...]]) -> None:
    words = [f"row {i * 7919 % 1009}" for i in range(1009)]
    found = Positions(kind(words))
    assert found.of(words[::-3]).tolist() == list(range(1009))[::-3]
    assert found.of([]).tolist() == []
    for place in (found, Positions(kind([]))):
        with pytest.raises(KeyError, match="row 2000"):
            place.of(["row 2000"])


def test_texts_with_equal_hashes_are_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "hash", lambda text: len(text), raising=False)
    words = ["b", "a", "cc", "c", "dd"]
    found = Positions(words)
    assert [words[i] for i in found.of(["a", "b", "c", "cc", "dd"])] == ["a", "b", "c", "cc", "dd"]
    for unknown in ("e", "ee", "eee", ""):
        with pytest.raises(KeyError):
            found.of([unknown])
