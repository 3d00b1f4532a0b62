"""Writes the tables of all result files into ``docs/speed.md``, between two markers.

    python -m benchmarks.report

What should be there and has no result is shown as not measured. The same results always give the
same text; ``--check`` only tells whether the page is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from benchmarks.cells import Document
from benchmarks.command import run
from benchmarks.expected import expected_tables
from benchmarks.grid_page import GRID
from benchmarks.record import RESULTS, ROOT, group_table, table
from smskd.errors import DataError

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- speed tables: begin -->", "<!-- speed tables: end -->"

ELSEWHERE = frozenset({GRID, "edge", "simulate"})
"""Results that have a page of their own."""

Results = Mapping[tuple[str, str], Document]


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the page is not up to date.")
def main(check: bool) -> None:
    """Bring the page up to date."""
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old, render(read_results(RESULTS)))
    if check:
        click.echo("up to date" if new == old else f"{PAGE.name} is not up to date")
        raise SystemExit(new != old)
    PAGE.write_text(new, encoding="utf-8")


def read_results(folder: Path) -> Results:
    """All result files of a folder by (benchmark, device).

    Raises:
        DataError: a file is not a result.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            results[result["benchmark"], result["device"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result file: {error!r}", "measure again") from error
    return results


def render(results: Results) -> str:
    """Markdown of every table that should be there, then of those nobody listed."""
    parts, shown = [], set()
    for benchmark, device, groups in expected_tables():
        shown.add((benchmark, device))
        parts.append(_heading(benchmark, device))
        result = results.get((benchmark, device))
        done = {group["title"] for group in result["groups"]} if result else set()
        missing = [group.document() for group in groups if group.title not in done]
        parts += [table(result).rstrip()] if result else []
        parts += [group_table(group) for group in missing]
    for key in sorted(key for key in set(results) - shown if key[0] not in ELSEWHERE):
        parts += [_heading(*key), table(results[key]).rstrip()]
    return "\n\n".join(parts)


def filled(page: str, tables: str) -> str:
    """The page with other tables.

    Raises:
        DataError: the markers are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"the page lacks {BEGIN} or {END}", "put them where the tables belong")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def missing_rows(results: Results) -> Iterable[tuple[str, str, str, str]]:
    """(benchmark, device, table, contestant) of what should be measured and is not."""
    for benchmark, device, groups in expected_tables():
        found = {
            (group["title"], row["name"])
            for group in results.get((benchmark, device), {"groups": []})["groups"]
            for row in group["rows"]
            if "not_measured" not in row
        }
        for group in groups:
            names = [name for name in group.expected if (group.title, name) not in found]
            yield from ((benchmark, device, group.title, name) for name in names)


def _heading(benchmark: str, device: str) -> str:
    return f"### `{benchmark}` on {'a GPU' if device == 'cuda' else 'a CPU'}"


if __name__ == "__main__":
    run(main)
