"""Tables on disk as columns of text: CSV (also gzipped), Excel and Parquet."""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, inflate, read_whole, refusing
from polyclinic.data.sources.excel import EXCEL, OTHER_SHEETS, read_sheet
from polyclinic.errors import MissingDependency

PARQUET = (".parquet", ".pq")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", *EXCEL, *PARQUET)
"""Suffixes of tables."""
SEPARATORS = ",;\t|"
GZIP = 31
csv.field_size_limit(2**20)


def read_rows(path: Path, limits: Limits = LIMITS, sheet: str = "") -> dict[str, list[str]]:
    """Return the columns of a table by name, as ``read_columns`` does.

    Raises:
        DataError: If it cannot be read, or its rows do not match its header.
    """
    try:
        return read_columns(path, limits, sheet)
    except Unreadable as error:
        raise DataError(str(error)) from None


def read_columns(path: Path, limits: Limits = LIMITS, sheet: str = "") -> dict[str, list[str]]:
    """Return the columns of a table by name. Missing is "".

    CSV is read in UTF-8, UTF-16 (with a byte order mark) or Windows-1252. The separator is a comma, semicolon, tab or
    bar, as in the header or in Excel's first line ``sep=;``. Rows and columns without any content, which Excel leaves
    at the end of a table, and the row numbers that pandas writes in a first column without a name, are left out.
    ``sheet`` names the sheet of an Excel workbook (``excel.read_sheet``).

    Raises:
        Unreadable: If it cannot be read, or its rows do not match its header.
    """
    suffix = path.suffix.lower()
    if suffix in OTHER_SHEETS:
        raise Unreadable(path, f"is a spreadsheet of a format that is not read ({suffix}): save it as .xlsx or as CSV")
    if sheet and suffix not in EXCEL:
        raise Unreadable(path, f'has no sheets, and sheet = "{sheet}" names one: leave it out')
    if suffix in PARQUET:
        columns = _parquet(path, limits)
    elif suffix in EXCEL:
        rows = read_sheet(path, sheet, limits)
        columns = _named(path, rows[0] if rows else [], rows[1:])
    else:
        columns = _named(path, *_csv(path, limits))
    if not columns or not next(iter(columns.values())):
        raise Unreadable(path, "has no rows")
    return columns


def _text_of(path: Path, data: bytes) -> str:
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        with refusing(path, "is not sound text in UTF-16"):
            return data.decode("utf-16")
    if b"\0" in data[:4096]:
        raise Unreadable(path, "is not a text file; save it as CSV in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        with refusing(path, "is not text in UTF-8, UTF-16 or Windows-1252; save it as CSV in UTF-8"):
            return data.decode("cp1252")


def _csv(path: Path, limits: Limits) -> tuple[list[str], list[list[str]]]:
    """Return the header and the other rows of a CSV file."""
    data = read_whole(path, limits)
    if data[:2] == b"\x1f\x8b":
        data = inflate(path, data, limits.text_bytes, GZIP)
    text = _text_of(path, data)
    first, _, rest = text.partition("\n")
    if stated := re.fullmatch(r"\"?sep=(.)\"?\r?", first, re.IGNORECASE):
        separator, text = stated.group(1), rest
    else:
        separator = max(SEPARATORS, key=first.count)
    with refusing(path, "is not a sound CSV table"):
        header, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    return header, lines


def _named(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return rows as columns by name, without what has no content."""
    header = [name.strip() for name in header]
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    while header and not header[-1] and all(len(line) < len(header) or not line[-1].strip() for line in lines):
        header, width = header[:-1], len(header) - 1
        lines = [line[:width] for line in lines]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise Unreadable(path, f"the column {twice[0]!r} occurs twice")
    if bad := [i for i, line in enumerate(lines, start=2) if len(line) != len(header)]:
        raise Unreadable(
            path,
            f"{len(bad)} rows have another number of columns than the header's {len(header)} "
            f"(the first is row {bad[0]})",
        )
    columns = [[line[i].strip() for line in lines] for i in range(len(header))]
    numbered = header[:1] in ([""], ["Unnamed: 0"]) and all(cell.isdigit() for cell in columns[0])
    if numbered and len(set(columns[0])) == len(lines):
        header, columns = header[1:], columns[1:]
    if "" in header:
        raise Unreadable(path, f"column {header.index('') + 1} has no name")
    return dict(zip(header, columns, strict=True))


def _parquet(path: Path, limits: Limits) -> dict[str, list[str]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency("tables", f"{path.name} is a Parquet file: reading it needs pyarrow") from None
    with refusing(path, "is not a sound Parquet table"):
        footer = parquet.read_metadata(path)
        if sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)) > limits.decoded_bytes:
            raise Unreadable(path, "holds a table larger than the limit")
        table = parquet.read_table(path)
        return {name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names}


def _text(value: object) -> str:
    return "" if value is None else str(value)
