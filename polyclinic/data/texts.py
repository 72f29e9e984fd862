"""Sequences of short texts, such as the cells of a column or the names of examples, in little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import overload

MOST = 2**32
"""Characters from which on an end takes 8 bytes instead of 4."""


class Texts(Sequence[str]):
    """Texts as one text and the ends of its parts.

    A part is an object only while it is used. A list of all parts takes several times the memory, which Python does not
    return to the system when they are freed.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._pieces: list[str] = []
        self._ends = array("I", [0])
        self._joined = ""
        self.extend(texts)

    def extend(self, texts: Iterable[str]) -> None:
        """Append ``texts``."""
        texts = list(texts)
        piece = "".join(texts)
        if self._ends.typecode == "I" and self._ends[-1] + len(piece) >= MOST:
            self._ends = array("Q", self._ends)
        self._ends.extend(accumulate(map(len, texts), initial=self._ends.pop()))
        self._pieces.append(piece)

    @property
    def _text(self) -> str:
        if self._pieces:
            self._joined, self._pieces = "".join([self._joined, *self._pieces]), []
        return self._joined

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return list(self)[i]
        count = len(self._ends) - 1
        if not -count <= i < count:
            raise IndexError(i)
        i %= count
        return self._text[self._ends[i] : self._ends[i + 1]]

    def __iter__(self) -> Iterator[str]:
        text, start = self._text, 0
        for end in islice(self._ends, 1, None):
            yield text[start:end]
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


def taken(texts: Sequence[str], places: Iterable[int]) -> Sequence[str]:
    """Return the texts at ``places``, in that order and as compact as ``texts``."""
    chosen = (texts[i] for i in places)
    return Texts(chosen) if isinstance(texts, Texts) else tuple(chosen)


def joined(parts: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the texts of all ``parts``, in order and as compact as those of the first."""
    texts = (text for part in parts for text in part)
    return Texts(texts) if isinstance(parts[0], Texts) else tuple(texts)
