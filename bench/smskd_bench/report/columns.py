"""Columns of the leaderboard, as text; every format shows the same."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from smskd_bench.report.comparisons import Versus
from smskd_bench.report.exported import shown_export
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.stats.comparing import WORDS, Verdict

PM = "\u00b1"

Column = tuple[str, str, Callable[[LeaderboardRow], str]]
"""Heading, side, and the text of a row's cell."""

SIGNS: dict[Verdict, str] = {"better": "+", "worse": "-", "equal": "=", "open": "?"}
"""Before the words, so that a verdict can be told without colour and without room."""

SHORT: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "equal",
    "open": "too few seeds",
}
"""Where there is less room than for :data:`smskd_bench.stats.comparing.WORDS`."""

STYLES: dict[Verdict, str] = {"better": "green", "worse": "red", "equal": "cyan", "open": "dim"}


def spread(mean: float | None, std: float | None, sign: str = "") -> str:
    """Mean and standard deviation, to hundredths."""
    if mean is None:
        return "-"
    # Rounded first, and 0 added: there is no -0.00.
    return f"{round(mean, 2) + 0.0:{sign}.2f}" + (f" {PM} {std:.2f}" if std is not None else "")


def interval_words(row: LeaderboardRow) -> str:
    """The 95 percent interval of the mean."""
    if row.interval is None:
        return "-"
    # Accuracies end at 0 and 100; a t interval of few seeds does not know that.
    low, high = max(0.0, row.interval.low), min(100.0, row.interval.high)
    return f"{low:.2f} to {high:.2f}"


def versus_words(row: LeaderboardRow) -> str:
    """The difference with its standard deviation, and its seeds where they are fewer."""
    if row.versus is None:
        return "-"
    fewer = f" (n {row.versus.n})" if row.versus.n < len(row.top1) else ""
    return spread(row.versus.difference, row.versus.std, "+") + fewer


def versus_interval_words(row: LeaderboardRow) -> str:
    """The 95 percent interval of the difference."""
    versus = row.versus
    if versus is None or versus.low is None or versus.high is None:
        return "-"
    return f"{versus.low:+.2f} to {versus.high:+.2f}"


def control_words(row: LeaderboardRow) -> str:
    """The control that it is compared with, or those that it should be."""
    return row.versus.control if row.versus else ", ".join(row.controls) or "-"


def _kept(row: LeaderboardRow) -> str:
    return "-" if row.kept is None else f"{row.kept:.1f}"


def verdict_of(row: LeaderboardRow) -> Verdict | None:
    """The verdict against the strongest control, if there is one."""
    return row.versus.verdict if row.versus else None


def verdict_words(versus: Versus) -> str:
    """Sign and words of a verdict."""
    return f"{SIGNS[versus.verdict]} {WORDS[versus.verdict]}"


def _verdict(row: LeaderboardRow) -> str:
    return verdict_words(row.versus) if row.versus else "-"


def short_verdict(row: LeaderboardRow) -> str:
    """Sign and verdict for a terminal."""
    verdict = verdict_of(row)
    return "-" if verdict is None else f"{SIGNS[verdict]} {SHORT[verdict]}"


def verdict_sign(row: LeaderboardRow) -> str:
    """The verdict where there is room for one character."""
    verdict = verdict_of(row)
    return "" if verdict is None else SIGNS[verdict]


def _latency(row: LeaderboardRow) -> str:
    shown = shown_export(row.exported)
    if shown is None or shown.p50_ms is None:
        return "-"
    times = (shown.p50_ms, shown.p90_ms, shown.p99_ms)
    return " / ".join("-" if ms is None else f"{ms:.3f}" for ms in times)


def _size(row: LeaderboardRow) -> str:
    shown = shown_export(row.exported)
    return f"{shown.size_mb:.2f}" if shown else "-"


def _target(row: LeaderboardRow) -> str:
    shown = shown_export(row.exported)
    return shown.target if shown else "-"


COLUMNS: tuple[Column, ...] = (
    ("row", "left", lambda row: row.row),
    ("kind", "left", lambda row: row.kind),
    ("top-1 %", "right", lambda row: spread(row.mean, row.std)),
    ("95 %", "right", interval_words),
    ("n", "right", lambda row: str(len(row.top1))),
    ("epochs", "right", lambda row: str(row.epochs)),
    ("to beat", "left", control_words),
    ("difference", "right", versus_words),
    ("its 95 %", "right", versus_interval_words),
    ("verdict", "left", _verdict),
    ("kept %", "right", _kept),
    ("params", "right", lambda row: human(row.parameters)),
    ("MACs", "right", lambda row: human(row.macs)),
    ("ms p50/p90*/p99*", "right", _latency),
    ("MB", "right", _size),
    ("target", "left", _target),
    ("status", "left", lambda row: row.status),
)


def human(number: float) -> str:
    """A count with a unit prefix: 83892 as 83.9k."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:  # else 999999 would be 1e+03k
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def telling(rows: Sequence[LeaderboardRow]) -> list[Column]:
    """The columns that say something in this table."""
    always = {"row", "kind", "top-1 %", "n"}

    def tells(column: Column) -> bool:
        name, _, cell = column
        quiet = "done" if name == "status" else "-"
        return name in always or any(cell(row) != quiet for row in rows)

    return [column for column in COLUMNS if tells(column)]


def heading(pair: str, rows: Sequence[LeaderboardRow]) -> str:
    """Title of one pair's table, with the teacher's accuracy."""
    teacher = rows[0].teacher_top1
    accuracy = "not trained yet" if teacher is None else f"{teacher:.2f} %"
    return f"{pair} (teacher {accuracy})"


def verdict_note(rows: Iterable[LeaderboardRow]) -> str:
    """How the verdicts of a table were reached; empty where there are none."""
    compared = [row.versus for row in rows if row.versus is not None]
    if not compared:
        return ""
    return (
        "95 %: of the mean, Student's t over seeds, each row by itself. verdict: paired t test "
        f"over seeds, corrected for the {compared[0].family} comparisons of the table (Holm); "
        f"{WORDS['equal']}: within {compared[0].margin:g} points (two one-sided tests). "
        f"{WORDS['open']}: neither is shown; `smskd-bench seeds` tells how many would."
    )


_NOTES = {
    "top-1 %": (
        "top-1: test accuracy after the last epoch, mean \u00b1 standard deviation over n seeds."
    ),
    "difference": (
        "difference: points against the strongest of the row's controls, paired by seed."
    ),
    "kept %": "kept: of the test images the stage before had right, percent still right.",
    "ms p50/p90*/p99*": (
        "ms: one image at a time, exported in fp32, on the target; * is an upper bound that holds "
        "in 99 of 100 repetitions. Every precision and device: `leaderboard --devices`."
    ),
}
"""What columns mean, by their headings."""

FOOTNOTE = " ".join(_NOTES.values())


def footnote(names: Container[str]) -> str:
    """What the columns of these names mean."""
    return " ".join(text for name, text in _NOTES.items() if name in names)
