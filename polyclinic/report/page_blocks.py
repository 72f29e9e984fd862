"""What a page is made of: sections of paragraphs, tables and pictures. The template knows these and nothing else."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Column:
    """A column: its key in the rows, its heading, and whether its cells are numbers."""

    key: str
    heading: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and the raw value that the CSV file gets."""

    text: str
    value: Any = None


Row = Mapping[str, Cell | str]


def words(**headings: str) -> list[Column]:
    """Columns of text: ``words(site="Site")``."""
    return [Column(key, heading, False) for key, heading in headings.items()]


def numbers(**headings: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(key, heading) for key, heading in headings.items()]


@dataclass(frozen=True)
class Table:
    """A table on the page, and a file beside it.

    Attributes:
        name: Of the CSV file.
        caption: What it shows.
        columns: From left to right; the first names the row.
        rows: Cells by column key. A plain string is both text and value.
        note: Below the table: how the numbers came about.
        marks: Row number to a class: ``chosen``, ``external``, ``warn``.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str | Markup = ""
    marks: Mapping[int, str] = field(default_factory=dict)
    kind: Literal["table"] = "table"

    def text(self, row: Row, key: str) -> str:
        """What stands in a cell."""
        cell = row.get(key, "–")
        return cell if isinstance(cell, str) else cell.text

    def csv(self) -> str:
        """The raw values, as comma-separated lines under the column keys."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([c.key for c in self.columns])
        for row in self.rows:
            cells = [row.get(c.key, "") for c in self.columns]
            writer.writerow(["" if v is None else v for v in (c if isinstance(c, str) else c.value for c in cells)])
        return out.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure with its caption. The numbers it shows stand in a table of the same section."""

    svg: str
    caption: str | Markup
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True)
class Pair:
    """Two pictures side by side where there is room."""

    pictures: Sequence[Picture]
    kind: Literal["pair"] = "pair"


@dataclass(frozen=True)
class Text:
    """A paragraph. Plain text is escaped; ``Markup`` is not."""

    text: str | Markup
    style: str = ""
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Code:
    """Text as it is, in a box that scrolls."""

    title: str
    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Folded:
    """Blocks behind a heading that opens; open in print."""

    title: str
    blocks: Sequence[Any]
    kind: Literal["folded"] = "folded"


@dataclass(frozen=True)
class Section:
    """A numbered part of the page."""

    id: str
    title: str
    blocks: Sequence[Any]


def tables_of(blocks: Sequence[Any]) -> list[Table]:
    """Every table in ``blocks``, folded ones too, in order."""
    found = []
    for block in blocks:
        if isinstance(block, Table):
            found.append(block)
        elif isinstance(block, Folded):
            found += tables_of(block.blocks)
    return found
