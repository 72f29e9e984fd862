"""Tables on disk as columns of text: CSV (also gzipped), Excel and Parquet."""

import codecs
import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, inflate, read_whole, refusing
from polyclinic.data.sources.excel import EXCEL, OTHER_SHEETS, read_sheet
from polyclinic.data.texts import Texts
from polyclinic.errors import MissingDependency

PARQUET = (".parquet", ".pq")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", *EXCEL, *PARQUET)
"""Suffixes of tables."""
SEPARATORS = ",;\t|"
GZIP = 31
CHUNK = 64
"""Rows that are in memory as separate cells while a table is read."""
csv.field_size_limit(2**20)


def read_rows(path: Path, limits: Limits = LIMITS, sheet: str = "") -> dict[str, Sequence[str]]:
    """Return the columns of a table by name, as ``read_columns`` does.

    Raises:
        DataError: If it cannot be read, or its rows do not match its header.
    """
    try:
        return read_columns(path, limits, sheet)
    except Unreadable as error:
        raise DataError(str(error)) from None


def read_columns(path: Path, limits: Limits = LIMITS, sheet: str = "") -> dict[str, Sequence[str]]:
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
        columns = _csv(path, limits)
    if not columns or not next(iter(columns.values())):
        raise Unreadable(path, "has no rows")
    return dict(columns)


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


def _csv(path: Path, limits: Limits) -> dict[str, Texts]:
    """Return the columns of a CSV file."""
    data = read_whole(path, limits)
    if data[:2] == b"\x1f\x8b":
        data = inflate(path, data, limits.text_bytes, GZIP)
    text = _text_of(path, data)
    del data
    first, _, rest = text.partition("\n")
    if stated := re.fullmatch(r"\"?sep=(.)\"?\r?", first, re.IGNORECASE):
        separator, text = stated.group(1), rest
    else:
        separator = max(SEPARATORS, key=first.count)
    del rest
    with refusing(path, "is not a sound CSV table"):
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        if (header := next(lines, None)) is None:
            raise ValueError("no header")
        return _named(path, header, lines)


def _named(path: Path, header: Sequence[str], lines: Iterable[Sequence[str]]) -> dict[str, Texts]:
    """Return rows as columns by name, without what has no content."""
    header = [name.strip() for name in header]
    spare = next(
        (i for i, name in enumerate(reversed(header)) if name), len(header)
    )  # columns without a name at the end
    columns, widths, count = [Texts() for _ in header], dict[int, tuple[int, int]](), 0
    rows = (line for line in lines if any(map(str.strip, line)))
    while chunk := list(islice(rows, CHUNK)):
        for line in chunk:
            many, row = widths.get(len(line), (0, count + 2))
            widths[len(line)] = many + 1, row
            count += 1
            if spare:
                spare = _spare(line, len(header), spare)
        for column, cells in zip(columns, zip_longest(*chunk, fillvalue=""), strict=False):
            column.extend(map(str.strip, cells))
    width = len(header) - spare
    header, columns = header[:width], columns[:width]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise Unreadable(path, f"the column {twice[0]!r} occurs twice")
    bad = [of for size, of in widths.items() if (size < width if spare else size != width)]
    if bad:
        raise Unreadable(
            path,
            f"{sum(many for many, _ in bad)} rows have another number of columns than the header's {width} "
            f"(the first is row {min(row for _, row in bad)})",
        )
    numbered = header[:1] in ([""], ["Unnamed: 0"]) and all(cell.isdigit() for cell in columns[0])
    if numbered and len(set(columns[0])) == count:
        header, columns = header[1:], columns[1:]
    if "" in header:
        raise Unreadable(path, f"column {header.index('') + 1} has no name")
    return dict(zip(header, columns, strict=True))


def _spare(line: Sequence[str], width: int, most: int) -> int:
    """Return how many of the last ``most`` columns of a header of ``width`` have no content in ``line``."""
    found = 0
    while found < most and (len(line) < width - found or not line[-1].strip()):
        found += 1
        line = line[: width - found]
    return found


def _parquet(path: Path, limits: Limits) -> dict[str, Texts]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency("tables", f"{path.name} is a Parquet file: reading it needs pyarrow") from None
    with refusing(path, "is not a sound Parquet table"):
        footer = parquet.read_metadata(path)
        if sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)) > limits.decoded_bytes:
            raise Unreadable(path, "holds a table larger than the limit")
        table = parquet.read_table(path)
        return {
            name: Texts(_text(value) for chunk in table[name].chunks for value in chunk.to_pylist())
            for name in table.column_names
        }


def _text(value: object) -> str:
    return "" if value is None else str(value)
