"""A page with a part that a benchmark writes, between two comments; the rest is written by hand."""

from __future__ import annotations

from pathlib import Path

from smskd.errors import ConfigError


def rewrite(page: Path, name: str, text: str) -> None:
    """Replace the part called ``name`` of a page.

    Raises:
        ConfigError: the page has no such part.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ConfigError(f"{page} has no place for the tables", f"add {begin} and {end} to it")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def grid(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first hold numbers."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
