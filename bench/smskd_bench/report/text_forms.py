"""Leaderboard rows as Markdown, CSV, JSON or LaTeX text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby

from smskd_bench.report import escaping
from smskd_bench.report.columns import FOOTNOTE, heading, telling, verdict_note
from smskd_bench.report.comparisons import Versus
from smskd_bench.report.exported import shown_export
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.report.view import Placed


def _by_pair(placed: Sequence[Placed]) -> list[tuple[str, list[Placed]]]:
    return [(pair, list(found)) for pair, found in groupby(placed, key=lambda p: p.row.pair)]


def _markdown(placed: Sequence[Placed], notes: Sequence[str]) -> str:
    lines: list[str] = []
    for pair, found in _by_pair(placed):
        rows = [p.row for p in found]
        columns = telling(rows)
        lines += [f"**{escaping.markdown(heading(pair, rows))}**", ""]
        lines.append("| # | " + " | ".join(name for name, _, _ in columns) + " |")
        sides = " | ".join("---:" if side == "right" else "---" for _, side, _ in columns)
        lines.append(f"| ---: | {sides} |")
        for p in found:
            cells = " | ".join(escaping.markdown(cell(p.row)) for _, _, cell in columns)
            lines.append(f"| {p.rank} | {cells} |")
        lines.append("")
        if note := verdict_note(rows):
            lines += [note, ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes), FOOTNOTE, ""])


def _latex(placed: Sequence[Placed], notes: Sequence[str]) -> str:
    """One booktabs table a pair; the best row in bold."""
    lines = ["% needs \\usepackage{booktabs}"]
    for pair, found in _by_pair(placed):
        rows = [p.row for p in found]
        columns = telling(rows)
        sides = "".join("r" if side == "right" else "l" for _, side, _ in columns)
        heads = " & ".join(escaping.latex(name) for name, _, _ in columns)
        lines += ["\\begin{table}", f"\\caption{{{escaping.latex(heading(pair, rows))}}}"]
        lines += [
            f"\\begin{{tabular}}{{r{sides}}}",
            "\\toprule",
            f"\\# & {heads} \\\\",
            "\\midrule",
        ]
        for p in found:
            cells = [escaping.latex(cell(p.row)) for _, _, cell in columns]
            if p.rank == 1 and p.row.mean is not None:
                cells = [f"\\textbf{{{cell}}}" for cell in cells]
            lines.append(f"{p.rank} & {' & '.join(cells)} \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
        lines += [f"% {escaping.plain(verdict_note(rows))}"]
    lines += [f"% {escaping.plain(note)}" for note in (*notes, FOOTNOTE)]
    return "\n".join([*lines, ""])


_CSV_NAMES = (
    "pair", "row", "kind", "n", "seeds", "mean", "std", "epochs", "parameters", "macs",
    "teacher_top1", "kept", "control", "difference", "difference_std", "target",
    "exported_top1", "p50_ms", "p90_ms", "p99_ms", "size_mb", "status", "note",
    "rank", "low", "high", "difference_n", "difference_low", "difference_high",
    "difference_bootstrap_low", "difference_bootstrap_high", "p", "p_exact", "p_holm",
    "p_unequal_holm", "margin", "comparisons", "verdict", "why_open", "test_evaluations", "missing",
)  # fmt: skip


def _csv(placed: Sequence[Placed], notes: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_NAMES)
    for p in placed:
        row = p.row
        interval = (row.interval.low, row.interval.high) if row.interval else ("", "")
        missing = "; ".join(reason.text for reason in row.missing)
        line = [
            *_csv_head(row), row.status, row.note, p.rank, *interval, *_csv_versus(row.versus),
            row.test_evaluations, missing,
        ]  # fmt: skip
        writer.writerow(escaping.csv_text(v) if isinstance(v, str) else v for v in line)
    return out.getvalue()


def _csv_head(row: LeaderboardRow) -> list[object]:
    versus, export = row.versus, shown_export(row.exported)
    return [
        row.pair, row.row, row.kind, len(row.top1), row.seeds, row.mean, row.std, row.epochs,
        row.parameters, row.macs, row.teacher_top1, row.kept,
        *((versus.control, versus.difference, versus.std) if versus else ("", "", "")),
        *(
            (export.target, export.top1, export.p50_ms, export.p90_ms, export.p99_ms,
             export.size_mb) if export else ("",) * 6
        ),
    ]  # fmt: skip


def _csv_versus(versus: Versus | None) -> list[object]:
    if versus is None:
        return [""] * 13
    return [
        versus.n, versus.low, versus.high, versus.bootstrap_low, versus.bootstrap_high, versus.p,
        versus.p_exact, versus.p_holm, versus.p_unequal_holm, versus.margin, versus.family,
        versus.verdict, versus.why,
    ]  # fmt: skip


def _json(placed: Sequence[Placed], notes: Sequence[str]) -> str:
    rows = [{**asdict(p.row), "rank": p.rank} for p in placed]
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


RENDERERS: dict[str, Callable[[Sequence[Placed], Sequence[str]], str]] = {
    "markdown": _markdown,
    "csv": _csv,
    "json": _json,
    "latex": _latex,
}
"""Formats that are text; notes are lines about the whole table."""
