"""Conversion of table cells to targets: classes, several labels, or numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from polyclinic.data.source import Task


@dataclass(frozen=True)
class Reading:
    """Rules for converting cells to targets.

    Attributes:
        classes: The classes in order; if empty, the sorted values.
        separator: Separator of several labels in one column, as in ``"Mass|Nodule"``; "" if each cell has one.
        nothing: Word for the absence of all labels.
        blank: Value of an empty cell among several labels, or None to refuse it.
        uncertain: Value of -1 among several labels, or None to refuse it.
    """

    classes: tuple[str, ...] = ()
    separator: str = ""
    nothing: str = ""
    blank: float | None = None
    uncertain: float | None = None

    def read(
        self, columns: dict[str, list[str]], task: Task, problems: list[str]
    ) -> tuple[list[int] | list[tuple[float, ...]], tuple[str, ...]]:
        """Return each row's target, and the classes. Append to ``problems`` what cannot be read."""
        (name, words), *more = columns.items()
        if task == "classification":
            return self._classes(name, words, problems)
        if task == "multilabel" and not more:
            return self._several(name, words, problems)
        rows: list[tuple[float, ...]] = []
        for i, cells in enumerate(zip(*columns.values(), strict=True)):
            try:
                rows.append(tuple(self._number(cell) for cell in cells))
            except ValueError:
                problems.append(f"row {i + 2} has no number in {' or '.join(columns)}")
                rows.append(())
        return rows, self.classes or (tuple(columns) if task == "multilabel" else ())

    def _classes(self, name: str, words: Sequence[str], problems: list[str]) -> tuple[list[int], tuple[str, ...]]:
        classes = self.classes or tuple(sorted(set(words) - {""}, key=_order))
        if bad := [i for i, word in enumerate(words) if word not in classes]:
            problems.append(
                f"{len(bad)} rows have a {name} that is empty or not among classes (the first is row "
                f"{bad[0] + 2}: {words[bad[0]]!r})"
            )
        return [classes.index(w) if w in classes else -1 for w in words], classes

    def _several(
        self, name: str, words: Sequence[str], problems: list[str]
    ) -> tuple[list[tuple[float, ...]], tuple[str, ...]]:
        sets = [{w.strip() for w in cell.split(self.separator)} - {self.nothing, ""} for cell in words]
        classes = self.classes or tuple(sorted(set[str]().union(*sets)))
        if bad := [i for i, labels in enumerate(sets) if labels - set(classes)]:
            problems.append(
                f"{len(bad)} rows have a {name} that is not among classes (the first is row {bad[0] + 2}: "
                f"{words[bad[0]]!r})"
            )
        return [tuple(float(c in labels) for c in classes) for labels in sets], classes

    def _number(self, cell: str) -> float:
        if not cell and self.blank is not None:
            return self.blank
        value = float(cell)
        return self.uncertain if value == -1 and self.uncertain is not None else value


def _order(word: str) -> tuple[float, str]:
    """Sort key: numbers by value, then words alphabetically."""
    try:
        return float(word), word
    except ValueError:
        return float("inf"), word
