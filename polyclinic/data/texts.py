"""Sequences of short texts, such as the cells of a column or the names of examples, in little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, overload

import numpy as np

BLOCK = 1024
"""Texts that are objects at a time while they are appended."""
MOST = 2**32
"""Bytes from which on an end takes 8 bytes instead of 4."""


class Texts(Sequence[str]):
    """Texts as the bytes of one text (UTF-8) and the ends of its parts.

    A part is an object only while it is used. A list of all parts takes several times the memory, which Python does not
    return to the system when they are freed.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("I", [0])
        self.extend(texts)
        self._bytes, self._ends = self._bytes[:], self._ends[:]  # without the space for growth

    def extend(self, texts: Iterable[str]) -> None:
        """Append ``texts``."""
        rest = iter(texts)
        while parts := [text.encode("utf-8", "surrogatepass") for text in islice(rest, BLOCK)]:
            self._bytes += b"".join(parts)
            if self._ends.typecode == "I" and len(self._bytes) >= MOST:
                self._ends = array("Q", self._ends)
            self._ends.extend(accumulate(map(len, parts), initial=self._ends.pop()))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            places = range(len(self))[i]
            return list(self._between(places.start, places.stop) if places.step == 1 else map(self.__getitem__, places))
        count = len(self._ends) - 1
        if not -count <= i < count:
            raise IndexError(i)
        i %= count
        return str(self._bytes[self._ends[i] : self._ends[i + 1]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return self._between(0, len(self))

    def _between(self, first: int, last: int) -> Iterator[str]:
        start = self._ends[first]
        for end in self._ends[first + 1 : last + 1]:
            yield str(self._bytes[start:end], "utf-8", "surrogatepass")
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


class Positions:
    """Positions of texts in a sequence, in 16 bytes for each text.

    The texts are found by their hashes in sorted order and are compared then, so that equal hashes do no harm.

    Args:
        texts: The sequence. Of equal texts, one is found.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        hashes = _hashes(texts)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def of(self, texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Return the position of each of ``texts``.

        Raises:
            KeyError: If one is not in the sequence.
        """
        first = np.searchsorted(self._hashes, _hashes(texts))
        return np.fromiter(map(self._position, first, texts), np.int64, len(texts))

    def _position(self, first: int, text: str) -> int:
        """Return the position of ``text``, whose hash is at ``first`` if it is in the sequence."""
        for place in range(first, len(self._order)):
            if self._texts[self._order[place]] == text:
                return int(self._order[place])
            if self._hashes[place] != hash(text):
                break
        raise KeyError(text)


def _hashes(texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.fromiter(map(hash, texts), np.int64, len(texts))


def taken(texts: Sequence[str], places: Iterable[int]) -> Sequence[str]:
    """Return the texts at ``places``, in that order and as compact as ``texts``."""
    chosen = (texts[i] for i in places)
    return Texts(chosen) if isinstance(texts, Texts) else tuple(chosen)


def joined(parts: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the texts of all ``parts``, in order and as compact as one of them."""
    texts = (text for part in parts for text in part)
    return Texts(texts) if any(isinstance(part, Texts) for part in parts) else tuple(texts)
