"""Tables on disk as columns of text: CSV (also gzipped) and Parquet."""

import csv
import io
from pathlib import Path

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, inflate, read_whole, refusing
from polyclinic.errors import MissingDependency

SEPARATORS = ",;\t|"
GZIP = 31
csv.field_size_limit(2**20)


def read_rows(path: Path, limits: Limits = LIMITS) -> dict[str, list[str]]:
    """Return the columns of a table by name. The header determines the separator: comma, semicolon, tab or bar. Missing
    is "".

    Raises:
        DataError: If it cannot be read, or its rows do not match its header.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            columns = _parquet(path, limits)
        else:
            columns = _csv(path, limits)
    except Unreadable as error:
        raise DataError(str(error)) from None
    if not columns or not next(iter(columns.values())):
        raise DataError(f"{path.name} has no rows")
    return columns


def _csv(path: Path, limits: Limits) -> dict[str, list[str]]:
    data = read_whole(path, limits)
    if data[:2] == b"\x1f\x8b":
        data = inflate(path, data, limits.text_bytes, GZIP)
    with refusing(path, "is not text in UTF-8"):
        text = data.decode("utf-8-sig")
    first = text.partition("\n")[0]
    separator = max(SEPARATORS, key=first.count)
    with refusing(path, "is not a sound CSV table"):
        header, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header = [name.strip() for name in header]
    lines = [line for line in lines if line]
    problems = []
    if twice := sorted({name for name in header if header.count(name) > 1}):
        problems.append(f"{path.name}: the column {twice[0]!r} occurs twice")
    if bad := [i for i, line in enumerate(lines, start=2) if len(line) != len(header)]:
        problems.append(
            f"{path.name}: {len(bad)} rows have another number of columns than the header's {len(header)} "
            f"(the first is row {bad[0]})"
        )
    if problems:
        raise DataError(problems)
    return {name: [line[i].strip() for line in lines] for i, name in enumerate(header)}


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
