"""Which column of a table names the patient, the site, the split, the label, the image and the mask.

All sources and the data check use these functions, so that they agree on every table. A column that a study names is
found whatever its case. A role that the study does not name is filled by the first column whose name is usual for it;
``"none"`` says that no column has the role.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from polyclinic.data.formats.parsing import clean, is_missing, is_number, plain

Role = Literal["patient", "site", "split", "label", "image", "mask"]
NONE = "none"

USUAL: Mapping[Role, tuple[str, ...]] = {
    "patient": (
        *("patient", "patient_id", "patient_name", "patient_number", "subject", "subject_id", "sub_id", "participant"),
        *(
            "participant_id",
            "person",
            "person_id",
            "pid",
            "ptid",
            "mrn",
            "case",
            "case_id",
            "individual",
            "id",
            "lesion_id",
        ),
    ),
    "site": (
        *("site", "site_id", "hospital", "hospital_id", "centre", "centre_id", "center", "center_id"),
        *("institution", "institution_id", "institute", "clinic", "clinic_id", "scanner", "scanner_id", "dataset"),
    ),
    "split": ("split", "set", "subset", "partition", "fold"),
    "label": ("label", "labels", "class", "diagnosis", "dx", "target", "group", "category", "finding_labels", "y"),
    "image": (
        *("path", "image", "image_path", "file", "filename", "file_path", "filepath", "file_name", "image_name", "img"),
        *("img_path", "image_file", "image_id", "image_index", "scan"),
    ),
    "mask": ("mask", "mask_path", "segmentation", "segmentation_path", "seg", "mask_file", "annotation"),
}
"""Usual names of the columns of each role, the most specific first. Case and separators do not matter."""
SPLITS = {
    **dict.fromkeys(("train", "training", "tr", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "ts", "tst"), "test"),
}
"""Names of an official split's parts."""


def key_of(name: str) -> str:
    """Return a column's name without case, spaces, ``_``, ``-`` and ``.``: ``"Patient ID"`` is ``"patientid"``."""
    return re.sub(r"[\s_.\-]+", "", name.casefold())


def usual_columns(columns: Mapping[str, Sequence[str]], role: Role) -> list[str]:
    """Return the columns whose names are usual for a role, the most specific first.

    A column is an official split only if all its values name a part of one. A column of one or two values for ten rows
    or more, such as case and control, does not name patients.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in columns:
        by_key[key_of(name)].append(name)
    found = [name for usual in USUAL[role] for name in by_key.get(key_of(usual), ())]
    if role == "split":
        found = [c for c in found if columns[c] and all(value.strip().lower() in SPLITS for value in columns[c])]
    if role == "patient":
        found = [c for c in found if len(columns[c]) < 10 or len(set(columns[c])) > 2]
    return list(dict.fromkeys(found))


def named_column(columns: Iterable[str], name: str) -> str | None:
    """Return the column called ``name``, or the only one that differs from it in case or separators."""
    names = list(columns)
    if name in names:
        return name
    near = [column for column in names if key_of(column) == key_of(name)]
    return near[0] if len(near) == 1 else None


def column_of(columns: Mapping[str, Sequence[str]], role: Role, given: str, problems: list[str]) -> str:
    """Return the column of a role: the one that ``given`` names, or, if it is "", the first usual one.

    Returns "" if there is none, or if ``given`` is ``"none"``. Appends to ``problems`` if ``given`` is not a column.
    """
    if given == "":
        return next(iter(usual_columns(columns, role)), "")
    column = named_column(columns, given)
    if column is None and given != NONE:
        problems.append(no_column(columns, given, role))
    return column or ""


def no_column(columns: Iterable[str], name: str, role: str = "") -> str:
    """Return the sentence that a column does not exist, with a suggestion."""
    names = list(columns)
    near = difflib.get_close_matches(name, names, 1, 0.6)
    remedy = f"did you mean {near[0]!r}?" if near else f"There are {', '.join(names[:40]) or 'none'}"
    return f"has no column {name!r}{f' for the {role}' if role else ''}. {remedy[0].upper()}{remedy[1:]}"


def detected(roles: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a note on the columns that were chosen by their names; ``roles`` gives what is stated and what is used."""
    by_name = [f'{role} = "{column}"' for role, (given, column) in roles.items() if not given and column]
    return [f"Columns chosen by their names: {', '.join(by_name)}."] if by_name else []


def identifying(columns: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the columns that name patients, sites or an official split by their names; they are no features."""
    return {name for role in ("patient", "site", "split") for name in usual_columns(columns, role)}  # type: ignore[arg-type]


def matched(ids: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the entry of ``known`` for each id: the equal one, or the only one that differs in leading zeros.

    Spreadsheets remove leading zeros: "1" then means "001". Ids without a match are absent.
    """
    known = list(known)
    exact = set(known)
    wanted = list(dict.fromkeys(ids))
    stripped, asking = defaultdict(list), defaultdict(list)
    for name in known:
        stripped[_without_zeros(name)].append(name)
    for name in wanted:
        asking[_without_zeros(name)].append(name)
    out = {}
    for name in wanted:
        near = stripped.get(_without_zeros(name), [])
        if name in exact:
            out[name] = name
        elif len(near) == 1 and len(asking[_without_zeros(name)]) == 1:
            out[name] = near[0]
    return out


def _without_zeros(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", name.removeprefix("sub-"))


SPELLINGS = "spelled in several ways"
ROUNDED = "that a spreadsheet has rounded"


def same_patients(values: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the patient of each row, under one spelling, and notes.

    Ids that differ only in case, separators, leading zeros or a decimal zero are one patient: if they were two, one
    person could be in training and test data. The spelling is the first in alphabetical order.
    """
    first: dict[tuple[str, str], str] = {}
    several = set[tuple[str, str]]()
    keys = [_patient_key(value) for value in values]
    for key, value in zip(keys, values, strict=True):
        if (known := first.setdefault(key, value)) != value:
            several.add(key)
            first[key] = min(known, value)
    notes = []
    if several:
        notes.append(
            f"{len(several)} patients are {SPELLINGS} (case, separators, leading zeros, decimals); each counts as one."
        )
    if rounded := sum(re.fullmatch(r"\d(\.\d+)?[eE]\+\d+", value) is not None for value in {*values}):
        notes.append(f"{rounded} patients have a number {ROUNDED}, such as 1.2E+11: different ones may have the same.")
    return tuple(first[key] for key in keys), notes


def _patient_key(value: str) -> tuple[str, str]:
    text = unicodedata.normalize("NFKC", clean(value)).casefold()
    if is_number(text):
        return "number", plain(text)
    return "text", _without_zeros(re.sub(r"[\s_./-]+", "-", text))


def missing_at(values: Sequence[str]) -> list[int]:
    """Return the positions of values that are missing, such as "" and "NA"."""
    return [i for i, value in enumerate(values) if is_missing(value)]
