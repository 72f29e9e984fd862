"""How the columns of a table name image files: ``{id}.jpg``, ``*/images/{id}``, ``{slide}/x_{x}_y_{y}.png``.

A ``*`` is any part of one folder's or file's name.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from polyclinic.data.formats.parsing import is_missing

SAMPLE = 30
MOST_WAYS = 64
_PART = re.compile(r"[A-Za-z0-9]+")

T = TypeVar("T")
Columns = Mapping[str, Sequence[str]]


def by_column(columns: Columns, paths: Sequence[str], column: str) -> list[str]:
    """Return the patterns by which a column names one file in each row, the one that fits most rows first.

    Args:
        columns: The table.
        paths: The images below the table's folder.
        column: The column whose values occur in the files' names.
    """
    values = _some([value for value in dict.fromkeys(columns[column]) if not is_missing(value)])
    groups: dict[tuple[object, ...], dict[str, list[tuple[str, ...]]]] = defaultdict(lambda: defaultdict(list))
    for value in values:
        bounded = re.compile(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])")
        for path in paths:
            if value in path and bounded.search(path):
                parts = tuple(bounded.sub(lambda _: f"{{{column}}}", part) for part in Path(path).parts)
                fixed = tuple(part if "{" in part else "" for part in parts[:-1])
                groups[(*fixed, parts[-1])][value].append(parts)
    ranked = []
    for key, found in groups.items():
        alone = [own[0] for own in found.values() if len(own) == 1]
        if len(alone) >= 0.9 * len(values):
            pattern = "/".join(at[0] if len(set(at)) == 1 else "*" for at in zip(*alone, strict=True))
            ranked.append((-len(alone), len(key), pattern))
    return [pattern for *_, pattern in sorted(ranked)]


def identifiers(columns: Columns) -> list[str]:
    """Return the columns that may identify images: nearly all values differ, and have letters or leading zeros."""
    found = []
    for name, cells in columns.items():
        known = [cell for cell in cells if not is_missing(cell)]
        words = known and all(re.search(r"[A-Za-z]|^0", cell) and len(cell) > 2 for cell in known)
        if words and len(set(known)) >= 0.9 * len(known):
            found.append(name)
    return found


def by_columns(columns: Columns, paths: Sequence[str]) -> str:
    """Return the pattern in which several columns together name the file of each row; "" if there is none.

    Paths are compared word by word: where the words of different files differ, they are values of one column.
    """
    rows = _some(range(len(next(iter(columns.values())))))
    known = set(paths)
    shapes: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for path in _some(paths, 500):
        shapes[tuple(_PART.split(path))].append(_PART.findall(path))
    for separators, words in sorted(shapes.items(), key=lambda item: -len(item[1])):
        places = [sorted(set(at)) for at in zip(*words, strict=True)]
        choices = []
        for seen in places:
            fitting = [name for name, cells in columns.items() if set(seen) <= {*cells}]
            choices.append([seen[0]] if len(seen) == 1 else [f"{{{name}}}" for name in fitting])
        for chosen in itertools.islice(itertools.product(*choices), MOST_WAYS):
            pattern = separators[0] + "".join(a + b for a, b in zip(chosen, separators[1:], strict=True))
            if "{" in pattern and all(filled(pattern, columns, row) in known for row in rows):
                return pattern
    return ""


def filled(pattern: str, columns: Columns, row: int) -> str:
    """Return a pattern with the values of one row in place of the columns' names."""
    return re.sub(r"\{([^{}]+)\}", lambda match: columns[match.group(1)][row], pattern)


def _some(items: Sequence[T], most: int = SAMPLE) -> list[T]:
    """Return at most ``most`` items at even distances."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])
