"""Parsing of table cells: numbers, missing values and text."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

MISSING = frozenset(
    {"", "na", "n/a", "#n/a", "#na", "#n/a n/a", "<na>", "nan", "-nan", "nat", "null", "none", "?"}
    | {"#null!", "#value!", "#ref!", "#div/0!", "#num!", "#name?", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"}
)
"""Words that mean a missing value, in lower case, as pandas, R, Excel and databases write them."""
BLOCK = 1024
"""Words that are in memory as separate objects while numbers are read."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_DOUBTFUL = frozenset(
    {"", "-", "--", "---", "na", "nil", "void", "unk", "unknown", "missing", "empty", "undefined", "tbd", "pending"}
    | {"notavailable", "notapplicable", "notreported", "notknown", "notdone", "nodata", "novalue"}
)


def clean(word: str) -> str:
    """Return a cell's text in Unicode form NFC, without invisible characters and without space at its ends."""
    if word.isascii():
        return word.strip()
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", word)).strip()


def may_be_missing(word: str) -> bool:
    """Return whether a word that is no usual word for a missing value may mean one, such as "-" and "unknown"."""
    return not is_missing(word) and similar(clean(word)) in _DOUBTFUL


def is_missing(word: str, also: Sequence[str] = ()) -> bool:
    """Return whether ``word`` means a missing value. Words and numbers in ``also`` do, too: "-9" is also -9.0."""
    text = clean(word)
    return text.lower() in MISSING or (bool(also) and plain(text) in {plain(other) for other in also})


def plain(word: str) -> str:
    """Return a number in its shortest form, so that 4 and 4.0 are one category; other text unchanged."""
    if not is_number(word):
        return word
    value = float(word)
    return f"{value + 0:.0f}" if value.is_integer() else repr(value)


def is_number(word: str) -> bool:
    """Return whether ``word`` is a finite number."""
    return _NUMBER.fullmatch(word) is not None and math.isfinite(float(word))


def numbers_of(words: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float64]] | None":
    """Return the numbers that ``words`` are; None if one of them is not a finite number."""
    numbers = np.empty(len(words))
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        if not all(map(_NUMBER.fullmatch, block)):
            return None
        numbers[start : start + BLOCK] = list(map(float, block))
    return numbers if np.isfinite(numbers).all() else None


def similar(word: str) -> str:
    """Return a key that is equal for words that differ in case, width, accents' encoding, spaces or punctuation only.

    Signs are kept: "+" and "-" are two words, as in "HER2+" and "HER2-".
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", word))
    return re.sub(r"[\s_./]+|(?<=\w)-(?=\w)", "", text.casefold())
