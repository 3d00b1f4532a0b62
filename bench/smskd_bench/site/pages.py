"""Pages from templates; whatever a name holds, it is text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smskd_bench.report.columns import (
    FOOTNOTE,
    PM,
    SIGNS,
    human,
    verdict_note,
)
from smskd_bench.site.boards import SiteBoard
from smskd_bench.site.inline import script_json, visible
from smskd_bench.site.row_data import KEY_DIGITS, RowData
from smskd_bench.site.table import TableRow, short_verdict
from smskd_bench.stats.comparing import WORDS

KINDS = {
    "student": "Plain training, without a teacher",
    "single": "One method, one stage",
    "joint": "Several methods in one stage",
    "staged": "Stages one after another, without reference",
    "smskd": "Stages with the frozen student of the stage before as reference (smskd)",
}
"""Kinds of rows, in a sentence."""

TEMPLATES = Path(__file__).parent / "templates"


class Pages:
    """Renders the site's pages."""

    def __init__(self, version: str, boards: Sequence[tuple[str, str]]) -> None:
        self.environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_finalized,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters |= {
            "human": human,
            "signed": lambda value: _fixed(value, "+.2f"),
            "fixed": lambda value, digits=2: _fixed(value, f".{digits}f"),
            "script_json": lambda value: Markup(script_json(value)),  # escaped there
            "breaks": _breaks,
            "short_verdict": short_verdict,
        }
        self.environment.globals |= {
            "version": version,
            "boards": boards,
            "PM": PM,
            "KINDS": KINDS,
            "WORDS": WORDS,
            "SIGNS": SIGNS,
            "FOOTNOTE": FOOTNOTE,
        }

    def board(self, context: dict[str, Any]) -> str:
        """The page of one matrix."""
        rows = context["site"].board.rows
        pairs = dict.fromkeys(row.pair for row in rows)
        notes = dict.fromkeys(verdict_note([r for r in rows if r.pair == pair]) for pair in pairs)
        return self._render("board.html.j2", root="", notes=[n for n in notes if n], **context)

    def row(self, board: SiteBoard, row: TableRow, data: RowData) -> str:
        """The page of one row."""
        return self._render(
            "row.html.j2",
            root="../", site=board, shown=row, row=row.row, data=data, digits=KEY_DIGITS,
        )  # fmt: skip

    def overview(self, boards: Sequence[SiteBoard]) -> str:
        """The page that leads to the boards, where there are several."""
        return self._render("overview.html.j2", root="", all_boards=boards)

    def _render(self, template: str, **context: Any) -> str:
        return self.environment.get_template(template).render(**context)


def _finalized(value: object) -> object:
    """What is printed: None is nothing; text loses what cannot be seen."""
    if value is None:
        return ""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breaks(text: str) -> Markup:
    """A name that a narrow column breaks after its arrows, not within a word."""
    breakable = escape(visible(text)).replace("&gt;", Markup("&gt;<wbr>"))
    return Markup(breakable.replace("+", Markup("+<wbr>")))


def _fixed(value: float | None, form: str) -> str:
    """A number, never -0.00; a hyphen where there is none."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    return text.replace("-", "+", 1) if float(text) == 0 and "+" in form else text
