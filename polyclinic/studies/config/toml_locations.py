"""Where in a TOML file a value stands, so that a problem can name its line."""

import re
from collections.abc import Sequence

_TABLE = re.compile(r"^\s*\[(?P<array>\[)?\s*(?P<name>[^\[\]]+?)\s*\]?\]\s*(#.*)?$")
_KEY = re.compile(
    r"^\s*(?P<key>(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*="
)


def line_of(text: str, path: Sequence[str | int]) -> int:
    """The line, from 1, on which the value at ``path`` stands, or on which the nearest table around it begins."""
    lines = places(text)
    for end in range(len(path), 0, -1):
        if (found := lines.get(tuple(path[:end]))) is not None:
            return found
    return 1


def places(text: str) -> dict[tuple[str | int, ...], int]:
    """Every key and table of ``text`` by its path, with its line. Values within inline tables count as their table."""
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        if quote:  # inside a string of several lines
            quote = "" if quote in line else quote
            continue
        if match := _TABLE.match(line):
            name = _split(match["name"])
            table = _resolve(name, counts)
            if match["array"]:
                index = counts.get(table, 0)
                counts[table] = index + 1
                table = (*table, index)
            found.setdefault(table, number)
        elif match := _KEY.match(line):
            found.setdefault((*table, *_split(match["key"])), number)
            for mark in ('"""', "'''"):
                if line.count(mark) == 1:
                    quote = mark
    return found


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _resolve(name: tuple[str, ...], counts: dict[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    """``name`` with, after every array of tables on the way, the number of its latest element."""
    path: tuple[str | int, ...] = ()
    for i, part in enumerate(name):
        path = (*path, part)
        if i < len(name) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path
