"""Building blocks of a page: sections of paragraphs, tables and figures. The template renders only these."""

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
    """Text of a table cell, and its raw value for the CSV file."""

    text: str
    value: Any = None


Row = Mapping[str, Cell | str]


def words(**headings: str) -> list[Column]:
    """Return columns of text: ``words(site="Site")``."""
    return [Column(key, heading, False) for key, heading in headings.items()]


def numbers(**headings: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(key, heading) for key, heading in headings.items()]


@dataclass(frozen=True)
class Table:
    """A table on the page, which is also written as a CSV file.

    Attributes:
        name: Name of the CSV file.
        caption: Caption.
        columns: Columns from left to right; the first names the row.
        rows: Cells by column key. A plain string is both text and value.
        note: Text below the table: how the numbers were computed.
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
        """Return the text of a cell."""
        cell = row.get(key, "–")
        return cell if isinstance(cell, str) else cell.text

    def csv(self) -> str:
        """Return the raw values as comma-separated lines under the column keys."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([c.key for c in self.columns])
        for row in self.rows:
            cells = [row.get(c.key, "") for c in self.columns]
            writer.writerow(["" if v is None else v for v in (c if isinstance(c, str) else c.value for c in cells)])
        return out.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure with its caption. Its numbers are in a table of the same section."""

    svg: str
    caption: str | Markup
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True)
class Pair:
    """Two figures, next to each other on a wide page."""

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
    """Preformatted text, in a box that scrolls."""

    title: str
    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader can unfold; unfolded in print."""

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
    """Return every table in ``blocks``, including folded ones, in order."""
    found = []
    for block in blocks:
        if isinstance(block, Table):
            found.append(block)
        elif isinstance(block, Folded):
            found += tables_of(block.blocks)
    return found
