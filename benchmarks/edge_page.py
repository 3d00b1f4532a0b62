"""The tables of ``benchmarks.edge``: students, clocks and operators as Markdown."""

from __future__ import annotations

from typing import Any

Student = dict[str, Any]

SHOWN_OPERATORS = 5
HEAD = (
    "student", "precision", "top-1 %", "change [95 %]", "McNemar p", "p50 ms", "p90*", "p99*",
    "times as fast as fp32", "MB", "flags",
)  # fmt: skip


def render(record: dict[str, Any]) -> str:
    """The record as tables, which stand between the markers of the page."""
    students: list[Student] = record["students"]
    return "\n".join([
        f"Machine: {record['machine']}.", "",
        *markdown_table(HEAD, [row for student in students for row in _rows(student)]), "",
        "## Does our clock tell the truth?", "",
        "The same session timed by the runner and by the standard library's `timeit`, in turns:",
        "means of blocks of 0.1 s, median and quartiles of the ratio over",
        f"{record['rounds']} rounds.", "",
        *markdown_table(
            ("student", "graph", "runner ms", "timeit ms", "ratio"),
            [row for student in students for row in _clock_rows(student)],
        ), "",
        "## Where the time goes", "",
        "Shares of an inference by operator, from ONNX Runtime's profile, itself not free.",
        "", *markdown_table(
            ("student", "graph", "operators"),
            [row for student in students for row in _operator_rows(student)],
        ),
    ])  # fmt: skip


def markdown_table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(cells) + " |" for cells in (list(head), ["---"] * len(head), *rows)]


def _rows(student: Student) -> list[list[str]]:
    single = [row for row in student["judged"]["rows"] if row["batch"] == 1]
    exact = [row["host"]["p50_ns"] for row in single if row["precision"] == "fp32" and row["host"]]
    rows = [[student["student"], *_cells(row, exact)] for row in single]
    blank = [""] * (len(HEAD) - 3)
    rows += [
        [student["student"], name, *blank, f"left out: {why}"]
        for name, why in student["left_out"].items()
    ]
    return rows


def _cells(row: dict[str, Any], exact: list[int]) -> list[str]:
    host, change = row["host"], row["change"]
    if host is None or change is None:
        return [row["precision"], *[""] * (len(HEAD) - 3), row["reason"]]
    return [
        row["precision"],
        f"{row['top1']:.2f}",
        f"{change['difference']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]",
        f"{change['p']:.2g}",
        *(_ms(host[name]) for name in ("p50_ns", "p90_bound_ns", "p99_bound_ns")),
        f"{exact[0] / host['p50_ns']:.2f}" if exact else "-",
        f"{row['size_mb']:.2f}",
        ", ".join(flag["code"] for flag in row["flags"]) or "-",
    ]


def _clock_rows(student: Student) -> list[list[str]]:
    return [
        [
            student["student"],
            name,
            f"{clocks['ours_ms']:.4f}",
            f"{clocks['theirs_ms']:.4f}",
            f"{clocks['ratio']:.3f} ({clocks['low']:.3f} to {clocks['high']:.3f})",
        ]
        for name, clocks in student["clocks"].items()
    ]


def _operator_rows(student: Student) -> list[list[str]]:
    return [
        [student["student"], name, _shares(shares)] for name, shares in student["operators"].items()
    ]


def _shares(shares: dict[str, float]) -> str:
    shown = list(shares.items())[:SHOWN_OPERATORS]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shown)


def _ms(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.3f}"
