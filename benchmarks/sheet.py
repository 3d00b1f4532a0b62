"""A table of results with columns of its own, where nothing is timed in turns.

One of the kinds of tables of :mod:`benchmarks.record`. A row is a mapping of numbers; a
column says how one cell of it is written. What a row does not hold is shown as ``-``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cells import NOT_MEASURED, NOT_RUN, Document, Row

SHEET = "sheet"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: Its head.
        cell: Format string over the row: ``{seconds:,.0f}``, ``{against[a b][mean]:+.2f}``.
        text: Whether it is set to the left.
    """

    title: str
    cell: str
    text: bool = False


@dataclass
class Sheet:
    """One table.

    Attributes:
        title: What the work was.
        first: Head of the column of names.
        columns: After the names.
        expected: Names of the rows in the table's order.
        wanted: By name, what is known of a row without any measurement: its goal.
        rows: By name, what was measured.
        missing: By name, why it was not.
        notes: Everything else that was found, kept in the file.
    """

    title: str
    first: str
    columns: Sequence[Column]
    expected: Sequence[str]
    wanted: Mapping[str, Row] = field(default_factory=dict)
    rows: Mapping[str, Row] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> Document:
        """As it is stored."""
        return {
            "kind": SHEET,
            "title": self.title,
            "first": self.first,
            "columns": [asdict(column) for column in self.columns],
            "notes": dict(self.notes),
            "rows": [self._row(name) for name in self.expected],
        }

    def _row(self, name: str) -> Row:
        row = {"name": name, **self.wanted.get(name, {})}
        if name in self.rows:
            return row | self.rows[name]
        return row | {"not_measured": self.missing.get(name, NOT_RUN)}


def sheet_table(group: Document) -> str:
    """One sheet as a Markdown table under its title."""
    columns = group["columns"]
    heads = [group["first"], *(column["title"] for column in columns)]
    lines = ["---", *("---" if column["text"] else "---:" for column in columns)]
    head = [f"**{group['title']}**", "", _joined(heads), _joined(lines)]
    return "\n".join([*head, *(_line(row, columns) for row in group["rows"])])


def _line(row: Row, columns: Sequence[Document]) -> str:
    cells = [_cell(column["cell"], row) for column in columns]
    if "not_measured" in row:
        cells = [NOT_MEASURED, *cells[1:-1], row["not_measured"]]
    return _joined([row["name"], *cells])


def _cell(form: str, row: Row) -> str:
    try:
        return form.format(**row)
    except (KeyError, TypeError):  # a part of it is not there, or is None
        return "-"


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
