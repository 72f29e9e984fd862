"""Columns of tables: cells as one text, and the same content or refusal however many rows are read at once."""

import tracemalloc
from pathlib import Path

import pytest

from polyclinic.data.examples import DataError
from polyclinic.data.sources.tabular_files import read_rows

TABLES: list[tuple[str, dict[str, list[str]] | str]] = [
    ("a,b\n1, 2 \n3,4\n", {"a": ["1", "3"], "b": ["2", "4"]}),
    ("a,b\n1,2\n,\n  , \n3,4\n,,,\n", {"a": ["1", "3"], "b": ["2", "4"]}),  # rows without content
    ("a,b,,\n1,2,,\n3,4\n5,6,\n", {"a": ["1", "3", "5"], "b": ["2", "4", "6"]}),  # columns without content
    ("a,b,\n1,2,\n3,4,,\n", {"a": ["1", "3"], "b": ["2", "4"]}),
    ("a,b,\n1,2,\n3,4,x\n5,6,\n", "column 3 has no name"),
    ("a,b,,\n1,2,,\n3,4,x,\n5,6,,\n", "column 3 has no name"),
    ("a,b,,\n1,2,,\n3,4,x\n5,6,,\n", "column 3 has no name"),
    ("a,b,,\n1,2,,\n3\n5,6,,\n7\n", "2 rows have another number of columns than the header's 2 (the first is row 3)"),
    ("a,b\n1,2\n\n3\n4,5,6\n", "2 rows have another number of columns than the header's 2 (the first is row 3)"),
    ("a,b\n1,2\n3,4,\n", "1 rows have another number of columns than the header's 2 (the first is row 3)"),
    ("a,b,a\n1,2,3\n4,5\n", "the column 'a' occurs twice"),
    (",a\n0,x\n1,y\n2,z\n", {"a": ["x", "y", "z"]}),  # row numbers of pandas
    (",a\n0,x\n1,y\n1,z\n", "column 1 has no name"),
    ("a,b\n", "has no rows"),
    ("", "is empty (0 bytes)"),
    ('a,b\n1,"2\n', "is not a sound CSV table (Error)"),
]


@pytest.mark.parametrize("chunk", [1, 2, 256])
@pytest.mark.parametrize(("text", "expected"), TABLES)
def test_a_table_is_read_in_parts(
    text: str, expected: dict[str, list[str]] | str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.data.sources.tabular_files.CHUNK", chunk)
    path = tmp_path / "table.csv"
    path.write_text(text)
    if isinstance(expected, dict):
        columns = read_rows(path)
        assert list(columns) == list(expected)
        assert columns == expected
    else:
        with pytest.raises(DataError) as caught:
            read_rows(path)
        assert str(caught.value) == f"{path.name}: {expected}"


def test_reading_takes_little_more_memory_than_the_text(tmp_path: Path) -> None:
    """Cells that are objects take about six times as much."""
    path = tmp_path / "table.csv"
    rows = "".join(f"{','.join(f'{i * j}.25' for j in range(60))}\n" for i in range(2_000))
    path.write_text(f"{','.join(f'x{j}' for j in range(60))}\n{rows}")
    tracemalloc.start()
    try:
        columns = read_rows(path)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert columns["x3"][1000] == "3000.25"
    assert size < 3 * len(rows)  # the text, and eight bytes for each cell
    assert peak < 10 * len(rows)
