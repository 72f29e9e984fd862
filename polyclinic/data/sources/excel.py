"""Reader of Excel workbooks (.xlsx, .xlsm) through openpyxl: one sheet as rows of text, as in Excel's own CSV export.

Format: ECMA-376, part 1, SpreadsheetML. Macros are not run, links to other files are not followed, and formulas are not
computed: their stored values are read. What a table of text cannot express (hidden rows and columns, merged cells,
formulas without a value, text that Excel turned into dates) is refused with the place of the cells.
"""

import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from polyclinic.data.formats.parsing import is_missing
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing, regular_file, size
from polyclinic.errors import MissingDependency

EXCEL = (".xlsx", ".xlsm")
OTHER_SHEETS = (".xls", ".xlsb", ".ods", ".numbers")
"""Suffixes of spreadsheets that are not read."""
MOST_CELLS = 10_000_000
MOST_ROWS = 2**20
"""Number of rows of a sheet in Excel."""
MOST_DIGITS = 15
"""Number of digits that Excel keeps of a number."""
MOST_PARTS = 4096
_OLE = b"\xd0\xcf\x11\xe0"
_OUTSIDE = "has cells outside of the rows and columns of Excel"
_CELL = re.compile(r"[A-Z]{1,3}\d{1,7}")


def read_sheet(path: Path, sheet: str = "", limits: Limits = LIMITS) -> list[list[str]]:
    """Return the rows of one sheet as text; all have the same length.

    Numbers are written in their shortest form, with the leading zeros that their format shows; dates as 2026-11-30;
    logical values as TRUE and FALSE; error values as Excel shows them, such as #N/A.

    Args:
        path: The workbook.
        sheet: The name of the sheet; if empty, the only visible one with content.
        limits: Limits on the file. Its parts, decompressed, must not exceed ``limits.text_bytes`` together.

    Raises:
        Unreadable: If the workbook is damaged or too large, has several tables and ``sheet`` names none, or contains
            cells that text cannot express.
        MissingDependency: If openpyxl is not installed.
    """
    with _opened(path, limits) as book:
        chosen = _chosen(path, book, sheet)
        survey = _survey(path, chosen)
        rows = _texts(path, chosen)
    height, width = len(rows), len(rows[0]) if rows else 0
    hidden = [f"row {row}" for row in survey.hidden_rows if row <= height]
    hidden += [f"column {_letters(first)}" for first in survey.hidden_columns if first <= width]
    problems = []
    if hidden:
        remedy = "show them if they belong to the table (clear its filter), or delete them"
        problems.append(f"hidden rows or columns ({_some(hidden)}): {remedy}")
    if survey.merged:
        problems.append(f"merged cells ({_some(survey.merged)}): split them and fill in every cell")
    if survey.formulas:
        remedy = "open it in Excel and save it, or save it as CSV"
        problems.append(f"formulas without a stored value ({_some(survey.formulas)}): {remedy}")
    if problems:
        raise Unreadable(path, "has " + "; and ".join(problems))
    return rows


def sheets_of(path: Path, limits: Limits = LIMITS) -> list[str]:
    """Return the names of the visible sheets with content, in order."""
    with _opened(path, limits) as book:
        return [sheet.title for sheet in _visible(book)]


@contextmanager
def _opened(path: Path, limits: Limits) -> Iterator[Any]:
    """Open a workbook for reading cell by cell, after checking its parts."""
    _require_sound(path, limits)
    try:
        import openpyxl
    except ImportError:
        raise MissingDependency("tables", f"{path.name} is an Excel workbook: reading it needs openpyxl") from None
    with refusing(path, "is not a sound Excel workbook"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # the stated size may be wrong; cells beyond it would be left out
            yield book
        finally:
            book.close()


def _require_sound(path: Path, limits: Limits) -> None:
    """Refuse what is not a workbook, and what decompresses to more than the limit."""
    regular_file(path, limits)
    with open(path, "rb") as file:
        if file.read(4) == _OLE:
            raise Unreadable(path, "is encrypted, or an old Excel file: save it as .xlsx without a password, or as CSV")
    with refusing(path, "is not a sound Excel workbook"), zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        total = sum(part.file_size for part in parts)
        if len(parts) > MOST_PARTS or total > limits.text_bytes:
            raise Unreadable(
                path,
                f"holds {len(parts)} parts of {size(total)} together; the limits are {MOST_PARTS} and "
                f"{size(limits.text_bytes)}: save the table as CSV",
            )
        if any(b"<!DOCTYPE" in archive.read(part) for part in parts if part.filename.endswith((".xml", ".rels"))):
            raise Unreadable(path, "declares a document type, as no Excel workbook does")


def _visible(book: Any) -> list[Any]:
    """Return the sheets that a person sees and that have content."""
    return [sheet for sheet in book.worksheets if sheet.sheet_state == "visible" and _has_content(sheet)]


def _has_content(sheet: Any) -> bool:
    return any(value is not None for row in itertools.islice(sheet.values, MOST_ROWS) for value in row)


def _chosen(path: Path, book: Any, name: str) -> Any:
    """Return the sheet called ``name``, or the only visible one with content."""
    known = book.worksheets
    found = [sheet for sheet in known if sheet.title == name] if name else _visible(book)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f'"{s.title}"' + (" (hidden)" if s.sheet_state != "visible" else "") for s in known)
    if name:
        raise Unreadable(path, f'has no sheet "{name}". There are {listed}')
    what = f"{len(found)} visible sheets with content" if found else "no visible sheet with content"
    raise Unreadable(path, f'has {what}: choose one with sheet = "...". There are {listed}')


@dataclass
class _Survey:
    """Content of a sheet other than values: numbers of hidden rows and columns, from 1, and names of cells."""

    hidden_rows: list[int] = field(default_factory=list)
    hidden_columns: list[int] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    formulas: list[str] = field(default_factory=list)


def _survey(path: Path, sheet: Any) -> _Survey:
    """Return what openpyxl does not state of a sheet that is read cell by cell."""
    found = _Survey()
    with zipfile.ZipFile(path) as archive, archive.open(sheet._worksheet_path) as part:
        for _, element in ElementTree.iterparse(part):
            tag = element.tag.rpartition("}")[2]
            hidden = element.get("hidden") in ("1", "true")
            if tag == "row" and int(element.get("r", "1")) > MOST_ROWS:
                raise Unreadable(path, _OUTSIDE)
            if tag == "row" and hidden:
                found.hidden_rows.append(int(element.get("r", "1")))
            elif tag == "col" and hidden:
                found.hidden_columns.append(int(element.get("min", "1")))
            elif tag == "mergeCell":
                found.merged.append(str(element.get("ref")))
            elif tag == "c":
                place, parts = element.get("r", "a cell"), {child.tag.rpartition("}")[2]: child for child in element}
                if "r" in element.keys() and not _CELL.fullmatch(place):  # noqa: SIM118 - an element is no mapping
                    raise Unreadable(path, _OUTSIDE)
                stored = parts["v"].text if "v" in parts else None
                if "f" in parts and not stored and element.get("t") != "str":
                    found.formulas.append(place)
            if tag in ("row", "c"):
                element.clear()
    return found


def _texts(path: Path, sheet: Any) -> list[list[str]]:
    """Return the text of each cell. Refuse numbers of too many digits, and dates among other values."""
    rows: list[list[str]] = []
    dates: dict[int, list[int]] = {}
    cut: list[str] = []
    count = 0
    for cells in sheet.rows:
        count += 1 + len(cells)
        if count > MOST_CELLS:
            raise Unreadable(path, f"has more than {MOST_CELLS:,} cells: save the table as CSV")
        for column, cell in enumerate(cells):
            if isinstance(cell.value, date):
                dates.setdefault(column, []).append(len(rows))
            elif isinstance(cell.value, int | float) and abs(cell.value) >= 10**MOST_DIGITS:
                cut.append(_place(len(rows), column))
        rows.append([_text(cell) for cell in cells])
    width = max((column + 1 for row in rows for column, text in enumerate(row) if text), default=0)
    rows = [row[:width] + [""] * (width - len(row)) for row in rows]
    while rows and not any(rows[-1]):
        rows.pop()
    if cut:
        raise Unreadable(
            path,
            f"has numbers of more than {MOST_DIGITS} digits ({_some(cut)}), of which Excel keeps {MOST_DIGITS}: store "
            "identifiers as text",
        )
    mixed = []
    for column, dated in dates.items():
        known = {*dated}
        others = [row for row in range(1, len(rows)) if row not in known and not is_missing(rows[row][column])]
        mixed += [_place(row, column) for row in min(dated, others, key=len)] if others else []
    if mixed:
        raise Unreadable(
            path,
            f"has columns in which some cells are dates and others are not ({_some(mixed)}): Excel turns text such as "
            "1-2 into dates; correct the cells, or store the column as text",
        )
    return rows


def _text(cell: Any) -> str:
    """Return a cell's value as text."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        if not float(value).is_integer():
            return repr(value)
        zeros = str(cell.number_format)
        return f"{int(value):0{len(zeros) if set(zeros) == {'0'} else 1}d}"
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(" ", "seconds")
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _place(row: int, column: int) -> str:
    """Return the name of a cell: ``"B3"`` for row 2 and column 1, counted from 0."""
    return f"{_letters(column + 1)}{row + 1}"


def _letters(column: int) -> str:
    """Return the letters of a column, counted from 1."""
    from openpyxl.utils import get_column_letter

    return str(get_column_letter(column))


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
