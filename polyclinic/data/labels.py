"""Conversion of labels to targets: classes, several labels, numbers, or times to an event. All sources use it.

Missing values are never a class or a number. Numbers are compared as numbers, so ``0`` and ``0.0`` are one class. Text
is compared in one Unicode form. Names that differ only in case, spaces or punctuation are refused until ``classes``
says whether they are one.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from polyclinic.data.formats.parsing import clean, is_missing, is_number, may_be_missing, plain, similar
from polyclinic.data.source import Task

MissingLabels = Literal["refuse", "drop"]
MOST_ROWS = 5
_COMMA = re.compile(r"[+-]?\d[\d.' ]*,\d+([.,]\d+)*")


@dataclass(frozen=True)
class Reading:
    """Rules for converting labels to targets.

    Attributes:
        classes: The classes in order; if empty, the sorted values.
        separator: Separator of several labels in one column, as in ``"Mass|Nodule"``; "" if each cell has one.
        nothing: Word for the absence of all labels.
        blank: Value of a missing cell among several labels, or None to refuse it.
        uncertain: Value of -1 among several labels, or None to refuse it.
        missing: Words that mean a missing value, in addition to those of ``parsing.MISSING``.
        renamed: Whether ``classes`` may be names for an equal number of different values, in their order.
    """

    classes: tuple[str, ...] = ()
    separator: str = ""
    nothing: str = ""
    blank: float | None = None
    uncertain: float | None = None
    missing: tuple[str, ...] = ()
    renamed: bool = False

    def read(
        self,
        columns: Mapping[str, Sequence[str]],
        task: Task,
        problems: list[str],
        places: Sequence[str] = (),
    ) -> tuple[list[int] | list[tuple[float, ...]], tuple[str, ...]]:
        """Return each row's target, and the classes. Append to ``problems`` what cannot be read.

        Args:
            columns: The columns of labels.
            task: Type of prediction.
            problems: List of problems.
            places: Name of each row in messages; "row 2" for the first, if not given.
        """
        (name, words), *more = columns.items()
        places = places or [f"row {i + 2}" for i in range(len(words))]
        if task == "classification":
            return self._classes(name, words, problems, places)
        if task == "multilabel" and not more and self.separator:
            return self._several(name, words, problems, places)
        several = task == "multilabel"
        numbers = [self._numbers(column, cells, several, problems, places) for column, cells in columns.items()]
        return list(zip(*numbers, strict=True)), (self.classes or tuple(columns)) if several else ()

    def unlabeled(self, columns: Mapping[str, Sequence[str]]) -> list[int]:
        """Return the positions of rows in which every label is missing."""
        return [i for i, cells in enumerate(zip(*columns.values(), strict=True)) if all(map(self._is_missing, cells))]

    def _is_missing(self, word: str) -> bool:
        return is_missing(word, self.missing) and clean(word) not in {*self.classes, self.nothing} - {""}

    def _refuse_missing(
        self, name: str, words: Sequence[str], problems: list[str], places: Sequence[str], drop: bool = True
    ) -> None:
        if lost := [i for i, word in enumerate(words) if self._is_missing(word)]:
            remedy = 'fill them in, or leave those rows out with missing_labels = "drop"' if drop else "fill them in"
            problems.append(f"{_rows(len(lost), 'without')} a {name} ({_some(lost, words, places)}): {remedy}")

    def _classes(
        self, name: str, words: Sequence[str], problems: list[str], places: Sequence[str]
    ) -> tuple[list[int], tuple[str, ...]]:
        self._refuse_missing(name, words, problems, places)
        known = [i for i, word in enumerate(words) if not self._is_missing(word)]
        texts = [plain(clean(word)) for word in words]
        if endless := [i for i in known if texts[i].lower().lstrip("+-") in ("inf", "infinity")]:
            problems.append(f"{_rows(len(endless), 'with')} an infinite {name} ({_some(endless, words, places)})")
        found = Counter(texts[i] for i in known)
        order = sorted(found, key=_order)
        if not self.classes:
            problems += _questions(name, found)
            number = {text: i for i, text in enumerate(order)}
            return [number.get(text, -1) for text in texts], tuple(order)
        number = self._declared(found)
        unknown = [text for text in order if text not in number]
        if unknown and self._names_values(order):
            number, unknown = {text: i for i, text in enumerate(order)}, []
        if unknown:
            rows = [i for i in known if texts[i] in set(unknown)]
            listed = ", ".join(f"{text!r} ({found[text]})" for text in unknown[:MOST_ROWS])
            more = f" and {len(unknown) - MOST_ROWS} more" if len(unknown) > MOST_ROWS else ""
            problems.append(
                f"{_rows(len(rows), 'with')} a {name} that is not among classes = {list(self.classes)}: {listed}{more}"
                f"; the first is {places[rows[0]]}"
            )
        return [number.get(text, -1) for text in texts], self.classes

    def _declared(self, found: Mapping[str, int]) -> dict[str, int]:
        """Return the class number of each value: its own name, or the one name that differs in spelling only."""
        exact = {plain(clean(name)): i for i, name in enumerate(self.classes)}
        spelled: dict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(self.classes):
            spelled[similar(name)].append(i)
        number = {}
        for text in found:
            near = spelled.get(similar(text), [])
            if text in exact:
                number[text] = exact[text]
            elif len(near) == 1 and not is_number(text):
                number[text] = near[0]
        return number

    def _names_values(self, values: Sequence[str]) -> bool:
        """Return whether ``classes`` are names for the values 0, 1, ..., or for as many numbers in order."""
        numbers = all(map(is_number, values)) and not any(map(is_number, self.classes))
        return numbers and self.renamed and len(values) == len(self.classes)

    def _several(
        self, name: str, words: Sequence[str], problems: list[str], places: Sequence[str]
    ) -> tuple[list[tuple[float, ...]], tuple[str, ...]]:
        self._refuse_missing(name, words, problems, places)
        rows = [] if self.classes else [w for w in words if not self._is_missing(w)]
        parts = Counter(part for word in rows for part in self._parts(word))
        classes = self.classes or tuple(sorted(parts, key=_order))
        problems += _questions(name, parts)
        exact = Reading(classes)
        sets = [self._parts(word) for word in words]
        number = exact._declared(dict.fromkeys({part for labels in sets for part in labels}, 1))
        if bad := [i for i, labels in enumerate(sets) if labels - number.keys() and not self._is_missing(words[i])]:
            problems.append(
                f"{_rows(len(bad), 'with')} a {name} that is not among classes ({_some(bad, words, places)})"
            )
        present = [{number[part] for part in labels if part in number} for labels in sets]
        return [tuple(float(i in labels) for i in range(len(classes))) for labels in present], classes

    def _parts(self, word: str) -> set[str]:
        return {plain(clean(part)) for part in word.split(self.separator)} - {self.nothing, ""}

    def _numbers(
        self, name: str, words: Sequence[str], several: bool, problems: list[str], places: Sequence[str]
    ) -> list[float]:
        """Return one column's numbers; of several labels, 0 to 1."""
        if not several or self.blank is None:
            self._refuse_missing(name, words, problems, places, drop=not several)
        values, no_number, outside = [], [], []
        for i, word in enumerate(words):
            value = 0.0
            if self._is_missing(word):
                value = self.blank if several and self.blank is not None else 0.0
            elif not is_number(clean(word)):
                no_number.append(i)
            else:
                value = float(clean(word))
                if several and value == -1 and self.uncertain is not None:
                    value = self.uncertain
                elif several and not 0 <= value <= 1:
                    outside.append(i)
            values.append(value)
        if no_number:
            problems.append(
                f"{_rows(len(no_number), 'with')} no number in {name} ({_some(no_number, words, places)})"
                f"{comma_hint(words[no_number[0]])}"
            )
        if outside:
            remedy = "; say what -1 means with uncertain = ..." if any(float(words[i]) == -1 for i in outside) else ""
            problems.append(
                f"{_rows(len(outside), 'with')} a {name} that is not 0 to 1 ({_some(outside, words, places)}){remedy}"
            )
        return values


@dataclass(frozen=True)
class SurvivalReading:
    """Rules for converting a time and an event to a target.

    Attributes:
        event_codes: The values that mean that the event happened at the time; "1" if empty.
        censored_codes: The values that mean that the patient was last seen at the time, without the event; "0" if
            empty.
        missing: Words that mean a missing value.
    """

    event_codes: tuple[str, ...] = ()
    censored_codes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def read(
        self,
        time: tuple[str, Sequence[str]],
        event: tuple[str, Sequence[str]],
        problems: list[str],
        places: Sequence[str],
    ) -> list[tuple[float, ...]]:
        """Return each row's time and event, 1 or 0. Append to ``problems`` what cannot be read.

        Args:
            time: Name and cells of the column of times.
            event: Name and cells of the column of events.
            problems: List of problems.
            places: Name of each row in messages.
        """
        reading = Reading(missing=self.missing)
        times = reading._numbers(*time, False, problems, places)
        reading._refuse_missing(*event, problems, places)
        lost = {*self.unlabeled(time[1], event[1])}
        if bad := [i for i, t in enumerate(times) if t <= 0 and i not in lost and is_number(clean(time[1][i]))]:
            problems.append(
                f"{_rows(len(bad), 'with')} a {time[0]} of 0 or less ({_some(bad, time[1], places)}): a time to an "
                "event is above 0; correct these rows, or remove them from the table"
            )
        codes = dict.fromkeys(map(_code, self.censored_codes or ("0",)), 0.0)
        codes |= dict.fromkeys(map(_code, self.event_codes or ("1",)), 1.0)
        known = [(i, _code(word)) for i, word in enumerate(event[1]) if i not in lost]
        if unknown := Counter(code for _, code in known if code not in codes):
            listed = ", ".join(f"{code!r} ({n})" for code, n in unknown.most_common(MOST_ROWS))
            problems.append(
                f"{_rows(sum(unknown.values()), 'with')} an unknown {event[0]}: {listed}. Events are 1, and 0 if "
                'censored; name other values with event_codes = ["2"] and censored_codes = ["1"]'
            )
        return [(t, codes.get(_code(word), 0.0)) for t, word in zip(times, event[1], strict=True)]

    def unlabeled(self, times: Sequence[str], events: Sequence[str]) -> list[int]:
        """Return the positions of rows in which the time or the event is missing."""
        return [
            i
            for i, cells in enumerate(zip(times, events, strict=True))
            if any(is_missing(c, self.missing) for c in cells)
        ]


def _code(word: str) -> str:
    return plain(clean(word)).casefold()


UNITS = "The median time is"
FACTOR, FEWEST_TIMES = 7.0, 10
"""Ratio of median times of sites from which units may differ (a week has 7 days), and rows that a site needs."""


def event_problems(event: str, label: str | Sequence[str], codes: Sequence[str], regression: bool) -> list[str]:
    """Return what is wrong with the keys of survival labels.

    Args:
        event: The column of events; "" for other labels.
        label: The column of times.
        codes: Values that mean an event, or none.
        regression: Whether the label is a number.
    """
    problems = []
    if event and (regression or not isinstance(label, str) or not label):
        problems.append(
            "event = is for survival analysis: name the column of times with label, and leave regression out"
        )
    if not event and codes:
        problems.append("event_codes and censored_codes need event = the column that they are values of")
    return problems


def survival_notes(targets: Sequence[tuple[float, ...]], sites: Sequence[str]) -> list[str]:
    """Return sentences on times that may have different units at different sites, and on data without an event.

    Args:
        targets: Time and event of each row.
        sites: The site of each row; empty if it is not known.
    """
    notes = []
    if targets and not any(event for _, event in targets):
        notes.append("No row has an event: all are censored, so nothing can be learned from these data alone.")
    by_site: dict[str, list[float]] = defaultdict(list)
    for (time, _), site in zip(targets, sites, strict=False):
        by_site[site].append(time)
    medians = {site: median(found) for site, found in by_site.items() if len(found) >= FEWEST_TIMES and site}
    least, most = min(medians, key=medians.__getitem__, default=""), max(medians, key=medians.__getitem__, default="")
    if medians and medians[most] >= FACTOR * medians[least]:
        notes.append(
            f"{UNITS} {medians[least]:g} at {least} and {medians[most]:g} at {most}: check that all sites use one "
            "unit, such as days."
        )
    return notes


def comma_hint(word: str) -> str:
    """Return what to do about a number with a decimal comma or with separators of thousands; "" for other words."""
    return ": write numbers with a decimal point and without other separators" if _COMMA.fullmatch(word) else ""


def _rows(count: int, joint: str) -> str:
    return f"{count} row{'s' * (count != 1)} {joint}"


def _some(rows: Sequence[int], words: Sequence[str], places: Sequence[str]) -> str:
    """Return the first rows with their values."""
    some = [f"{places[i]}: {words[i]!r}" if words[i] else places[i] for i in rows[:MOST_ROWS]]
    more = [f"{len(rows) - MOST_ROWS} more"] if len(rows) > MOST_ROWS else []
    return ", ".join([*some, *more])


def _questions(name: str, found: Mapping[str, int]) -> list[str]:
    """Return one problem for each name that may mean a missing value, and for each group that may be one class."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text in sorted(found):
        groups[similar(text)].append(text)
    doubtful = [text for text in sorted(found) if may_be_missing(text) and not (set(text) == {"-"} and "+" in found)]
    problems = [
        f"{name} has {text!r} ({found[text]}), which may mean a missing value: leave those examples out, or list it "
        "with the other classes in classes = [...] if it is a class"
        for text in doubtful
    ]
    return problems + [
        f"{name} has {' and '.join(f'{text!r} ({found[text]})' for text in group)}, which differ only in case, spaces "
        f'or punctuation: list one of them in classes = ["{group[0]}", ...] to read them as one class, or all to keep '
        "them apart"
        for key, group in groups.items()
        if len(group) > 1 and key and not all(map(is_number, group))
    ]


def _order(word: str) -> tuple[float, str]:
    """Sort key: numbers by value, then words alphabetically."""
    return (float(word), word) if is_number(word) else (float("inf"), word)
