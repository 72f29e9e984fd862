"""An Excel workbook says what its CSV export says, or what text cannot say is refused with the cells."""

import re
import zipfile
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from polyclinic.data.quality.recognition import recognize
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.excel import read_sheet, sheets_of
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.tabular_files import read_columns, read_rows

openpyxl = pytest.importorskip("openpyxl", reason="needs the tables extra")

ROWS: list[list[Any]] = [["patient_id", "age", "label"], ["007", 61, "a"], ["008", 45.5, "b"]]


def book(path: Path, rows: list[list[Any]] = ROWS, change: Callable[[Any], object] = lambda sheet: None) -> Path:
    """Write a workbook of one sheet."""
    made = openpyxl.Workbook()
    for row in rows:
        made.active.append(row)
    change(made.active)
    made.save(path)
    return path


def edited(path: Path, part: str, change: Callable[[str], str]) -> Path:
    """Change the text of one part of a workbook."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts[part] = change(parts[part].decode()).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


SHEET = "xl/worksheets/sheet1.xml"


def test_values_are_the_text_that_excel_shows_in_csv(tmp_path: Path) -> None:
    def change(sheet: Any) -> None:
        sheet["A4"].number_format = "0000"
        sheet["H2"] = "=1/0"

    rows: list[list[Any]] = [
        ["id", "day", "time", "number", "flag", "error", "blank", "formula"],
        ["007", date(2026, 3, 1), datetime(2026, 3, 1, 14, 30), 2.0, True, "#N/A", None, None],
        [" 8 ", date(2026, 3, 2), datetime(2026, 3, 1), 0.1, False, "x", None, None],
        [9, None, None, -5, None, "NA", None, None],
    ]
    path = edited(
        book(tmp_path / "t.xlsx", rows, change), SHEET, lambda s: s.replace("<f>1/0</f><v />", "<f>1/0</f><v>4</v>")
    )
    columns = read_columns(path)
    assert columns == {
        "id": ["007", "8", "0009"],
        "day": ["2026-03-01", "2026-03-02", ""],
        "time": ["2026-03-01 14:30:00", "2026-03-01", ""],
        "number": ["2", "0.1", "-5"],
        "flag": ["TRUE", "FALSE", ""],
        "error": ["#N/A", "x", "NA"],
        "blank": ["", "", ""],
        "formula": ["4", "", ""],
    }


def test_a_formula_of_empty_text_is_empty(tmp_path: Path) -> None:
    path = book(tmp_path / "t.xlsx", [["a", "b"], ["x", '=IF(A2="x","","y")']])
    stored = edited(
        path, SHEET, lambda s: re.sub(r'<c r="B2"([^>]*)>(<f>.*?</f>)<v ?/>', r'<c r="B2" t="str">\2<v></v>', s)
    )
    assert read_columns(stored) == {"a": ["x"], "b": [""]}


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "formula without value": (lambda s: s.__setitem__("B2", "=1+1"), r"formulas without a stored value \(B2\)"),
    "merged": (lambda s: s.merge_cells("A2:A3"), r"merged cells \(A2:A3\): split them"),
    "hidden row": (lambda s: setattr(s.row_dimensions[3], "hidden", True), r"hidden rows or columns \(row 3\)"),
    "hidden column": (
        lambda s: setattr(s.column_dimensions["B"], "hidden", True),
        r"hidden rows or columns \(column B\)",
    ),
    "long number": (lambda s: s.__setitem__("A2", 1234567890123456), r"more than 15 digits \(A2\)"),
    "date among words": (
        lambda s: s.__setitem__("C2", date(2026, 2, 1)),
        r"some cells are dates and others are not \(C2\)",
    ),
    "title above": (lambda s: s.insert_rows(1), "column 1 has no name"),
    "two names": (lambda s: s.__setitem__("B1", "label"), "'label' occurs twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_text_cannot_say_is_refused_with_the_cells(tmp_path: Path, name: str) -> None:
    change, says = REFUSED[name]
    path = book(tmp_path / "t.xlsx", change=change)
    with pytest.raises(Unreadable, match=says):
        read_columns(path)
    with pytest.raises(Unreadable, match=says):
        check_folder(path)


def test_hidden_cells_beyond_the_table_do_not_matter(tmp_path: Path) -> None:
    def change(sheet: Any) -> None:
        sheet.row_dimensions[9].hidden = sheet.column_dimensions["F"].hidden = True

    assert read_columns(book(tmp_path / "t.xlsx", change=change))["patient_id"] == ["007", "008"]


def test_one_visible_sheet_with_content_is_the_table(tmp_path: Path) -> None:
    def change(sheet: Any) -> None:
        sheet.parent.create_sheet("empty")
        other = sheet.parent.create_sheet("secret")
        other.append(["patient_id", "label"])
        other.sheet_state = "hidden"
        sheet.title = "data"

    path = book(tmp_path / "t.xlsx", change=change)
    assert read_columns(path)["patient_id"] == ["007", "008"]
    assert sheets_of(path) == ["data"]
    with pytest.raises(DataError, match=r'no sheet "x". There are "data", "empty", "secret" \(hidden\)'):
        read_rows(path, sheet="x")
    (tmp_path / "t.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="has no sheets"):
        read_rows(tmp_path / "t.csv", sheet="x")


def test_several_sheets_are_a_question(tmp_path: Path) -> None:
    def change(sheet: Any) -> None:
        sheet.title = "read me"
        other = sheet.parent.create_sheet("patients")
        for i in range(24):
            other.append([f"p{i}", i, "ab"[i % 2]] if i else ["subject", "age", "diagnosis"])

    path = book(tmp_path / "t.xlsx", [["notes"], ["of the study"]], change)
    with pytest.raises(DataError, match=r'2 visible sheets with content: choose one with sheet = "..."'):
        read_rows(path)
    found = recognize(path, {"sheet": "patients"})
    assert found.options["sheet"] == "patients"
    assert found.options["label"] == "diagnosis"
    assert [q.key for q in recognize(path).questions] == ["sheet", "label"]
    source = FeatureTable(str(path), "diagnosis", sheet="patients")
    assert len(set(source.table().patients)) == 23
    assert check_folder(path).data["sheet"] == "read me"


def test_the_stated_size_of_a_sheet_is_not_believed(tmp_path: Path) -> None:
    path = book(tmp_path / "t.xlsx")
    edited(path, SHEET, lambda s: re.sub(r'<dimension ref="[^"]*"', '<dimension ref="A1:B2"', s))
    assert read_columns(path)["label"] == ["a", "b"]


HOSTILE: dict[str, tuple[Callable[[str], str], str]] = {
    "a cell far away": (lambda s: s.replace('r="C3"', 'r="ZZZZZZ3"'), "outside of the rows"),
    "a row far away": (lambda s: s.replace('<row r="3"', '<row r="999999999"'), "outside of the rows"),
    "entities": (lambda s: '<!DOCTYPE a [<!ENTITY b "cc">]>' + s.partition("?>")[2], "declares a document type"),
    "cut XML": (lambda s: s[: len(s) // 2], "not a sound Excel workbook"),
    "merged everything": (
        lambda s: s.replace("</sheetData>", '</sheetData><mergeCells><mergeCell ref="A1:XFD1048576"/></mergeCells>'),
        "merged cells",
    ),
    "linked everything": (
        lambda s: s.replace(
            "</sheetData>", '</sheetData><hyperlinks><hyperlink ref="A1:XFD1048576" location="x"/></hyperlinks>'
        ),
        "",
    ),
    "no such text": (lambda s: s.replace('t="n"', 't="s"').replace("<v>61<", "<v>999<"), "not a sound Excel workbook"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_workbooks_are_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    change, says = HOSTILE[name]
    path = edited(book(tmp_path / "t.xlsx"), SHEET, change)
    if says:
        with pytest.raises(Unreadable, match=says):
            read_columns(path)
    else:
        assert read_columns(path)["label"] == ["a", "b"]


def test_files_that_are_no_workbooks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    for data, says in (
        (b"", "is empty"),
        (b"a,b\n1,2\n", "not a sound Excel workbook"),
        (b"\xd0\xcf\x11\xe0" + b"\0" * 600, "encrypted, or an old Excel file"),
        (book(tmp_path / "s.xlsx").read_bytes()[:-200], "not a sound Excel workbook"),
    ):
        path.write_bytes(data)
        with pytest.raises(Unreadable, match=says):
            read_columns(path)
    with pytest.raises(Unreadable, match="the limits are 4096 and"):
        read_sheet(book(path), limits=Limits(text_bytes=2000))
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(Unreadable, match=r"not read \(.xls\): save it as .xlsx"):
        check_folder(tmp_path / "old.xls")


def test_a_table_that_cannot_be_read_is_named_by_the_check(tmp_path: Path) -> None:
    """Folders of images with a damaged table are not taken for folders of classes without a word."""
    from PIL import Image

    for i in range(4):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    book(tmp_path / "labels.xlsx", change=lambda s: s.merge_cells("A2:A3"))
    lines = "\n".join(check_folder(tmp_path).lines())
    assert "the table labels.xlsx is not used: has merged cells (A2:A3)" in lines
