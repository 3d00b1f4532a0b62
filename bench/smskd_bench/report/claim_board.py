"""``smskd-bench claims``: each claim with its evidence, or our numbers beside published ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from smskd.errors import ConfigError
from smskd_bench.claims import load_claims
from smskd_bench.config import load_matrix
from smskd_bench.plan import Plan, make_plan
from smskd_bench.report.columns import PM, SIGNS, verdict_words
from smskd_bench.report.comparisons import Versus
from smskd_bench.report.evidence import ClaimState, Evidence, claim_states
from smskd_bench.report.grid import Grid, Side, grid_markdown, grid_table
from smskd_bench.report.published_comparison import (
    TOLERANCE,
    PublishedComparison,
    compare_published,
)
from smskd_bench.report.reading import read_shown
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.report.tables import WIDE
from smskd_bench.stats.comparing import MARGIN, NOTHING_SHOWN
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal

STYLES = {
    "supported": "green", "supported in part": "green", "contradicted": "red",
    "contradicted in part": "red", "mixed": "yellow", "reproduced": "green", "higher": "cyan",
    "lower": "red",
}  # fmt: skip
"""Colours of states and badges, which are words anyway."""


@dataclass(frozen=True)
class ClaimsRequest:
    """What the user asked for on the command line."""

    matrix: Path
    store: Path
    published: bool = False
    ledger: Path | None = None
    margin: float = MARGIN
    form: str = "table"
    everything: bool = False


def show(request: ClaimsRequest, console: Console) -> None:
    """Print claims or published numbers.

    Raises:
        SmskdError: a file or the store cannot be read, or there is nothing to compare with.
    """
    ledger = None if request.published else load_claims(request.ledger)
    plan, store = make_plan(load_matrix(request.matrix)), Store.peek(request.store)
    if ledger is None:
        _show_published(request, plan, store, console)
        return
    rows = leaderboard_rows(plan, store, request.margin, held=read_shown(plan, store))
    states = claim_states(ledger, plan, store, request.margin, rows)
    if not any(state.evidence for state in states):
        raise ConfigError(
            f"no claim names rows of the matrix {plan.matrix.name}",
            "add tests with this matrix to the file of claims, or name another matrix",
        )
    if request.form == "json":
        _json([asdict(state) for state in states], console)
        return
    shown = [s for s in states if request.everything or s.evidence]
    _print(claim_grid(shown, plan.matrix.name), _claim_notes(states), request.form, console)


def _json(value: object, console: Console) -> None:
    console.file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _print(grid: Grid, notes: Sequence[str], form: str, console: Console) -> None:
    if form == "markdown":
        table = [grid_markdown(grid), ""] if grid.lines else []
        console.file.write("\n".join([*table, *notes, ""]))
        return
    wide = console if console.is_terminal else Terminal(file=console.file, width=WIDE)
    if grid.lines:
        wide.print(grid_table(grid))
    for note in notes:
        wide.print(Text(note, style="dim"))


CLAIM_HEADS: tuple[tuple[str, Side], ...] = (
    ("claim", "left"), ("state", "left"), ("row", "left"), ("against", "left"), ("n", "right"),
    ("difference", "right"), ("95 %", "right"), ("verdict", "left"), ("says", "left"),
)  # fmt: skip


def claim_grid(states: Sequence[ClaimState], matrix: str) -> Grid:
    """One line a test; the claim stands in the first of its lines."""
    lines: list[tuple[str, ...]] = []
    for state in states:
        text = f"{state.claim.id}: {state.claim.claim} ({state.claim.source})"
        if not state.evidence:
            lines.append((text, state.state, *("-",) * 7))
        for number, evidence in enumerate(state.evidence):
            head = ("", "") if number else (text, state.state)
            lines.append((*head, *evidence_cells(evidence)))
    return Grid(CLAIM_HEADS, tuple(lines), f"claims, by {matrix}", tuple(STYLES.items()))


def evidence_cells(evidence: Evidence) -> tuple[str, ...]:
    """Row, control, n, difference, interval, verdict, and what it says for the claim."""
    test = evidence.test
    pairs = f", {len(evidence.pairs)} pairs" if len(evidence.pairs) > 1 else ""
    control = f"{test.control} ({test.asks}{pairs})" if test.asks else f"{test.control}{pairs}"
    telling = evidence.why and evidence.why != NOTHING_SHOWN
    says = f"{evidence.says}: {evidence.why}" if telling else evidence.says
    return (test.row, control, *_numbers(evidence), says)


def _numbers(evidence: Evidence) -> tuple[str, str, str, str]:
    """n, difference, interval and verdict."""
    time, versus = evidence.time, evidence.versus
    if time is not None:
        percent = "-" if time.percent is None else f"{time.percent:+.1f} % time"
        known = time.low is not None and time.high is not None
        return str(time.n), percent, f"{time.low:+.1f} to {time.high:+.1f} %" if known else "-", "-"
    if versus is None:
        return "0", "-", "-", "-"
    return str(versus.n), _difference(versus), _ends(versus.low, versus.high), verdict_words(versus)


def _difference(versus: Versus) -> str:
    spread = "" if versus.std is None else f" {PM} {versus.std:.2f}"
    return f"{round(versus.difference, 2) + 0.0:+.2f}{spread}"


def _ends(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def _claim_notes(states: Sequence[ClaimState]) -> list[str]:
    judged = [e.versus for state in states for e in state.evidence if e.versus is not None]
    notes = [
        "Sources: what was read of the paper is in docs/algorithm.md. This is evidence about our "
        "implementation. Differences are points of test top-1, row less control, paired by seed "
        "and averaged over the pairs."
    ]
    if judged:
        notes.append(
            f"Verdicts: paired t over seeds, corrected for the {judged[0].family} tests of this "
            f"table (Holm); practically equal: within {judged[0].margin:g} points. "
            f"{SIGNS['open']}: more seeds would be needed (`smskd-bench seeds`)."
        )
    return notes


# ------------------------------------------------------------------------------- published numbers


def _show_published(request: ClaimsRequest, plan: Plan, store: Store, console: Console) -> None:
    held = read_shown(plan, store)
    found = compare_published(plan, leaderboard_rows(plan, store, request.margin, held=held))
    if not found:
        pairs = ", ".join(pair.name for pair in plan.matrix.pairs[:3])
        raise ConfigError(
            f"no published number is of a pair of {plan.matrix.name} ({pairs})",
            "smskd-bench list published shows them all",
        )
    shown = [c for c in found if request.everything or c.badge not in ("not run", "no row")]
    if request.form == "json":
        _json([asdict(c) for c in shown], console)
        return
    _print(published_grid(shown), _published_notes(found, shown), request.form, console)


def published_grid(found: Sequence[PublishedComparison]) -> Grid:
    """One line a published number."""
    heads: tuple[tuple[str, Side], ...] = (
        ("pair", "left"), ("method", "left"), ("published", "right"), ("source", "left"),
        ("protocol", "left"), ("our row", "left"), ("ours", "right"), ("95 %", "right"),
        ("n", "right"), ("difference", "right"), ("its 95 %", "right"), ("badge", "left"),
        ("because", "left"),
    )  # fmt: skip
    lines = tuple(_published_cells(c) for c in found)
    return Grid(heads, lines, "published numbers and ours", tuple(STYLES.items()))


def _published_cells(c: PublishedComparison) -> tuple[str, ...]:
    theirs = c.published
    std = "" if theirs.std is None else f" {PM} {theirs.std:.2f}"
    known = c.low is not None and c.high is not None
    return (
        theirs.pair, theirs.method, f"{theirs.top1:.2f}{std}", f"{theirs.source} ({c.epoch})",
        theirs.protocol, c.row or "-", "-" if c.mean is None else f"{c.mean:.2f}",
        f"{c.low:.2f} to {c.high:.2f}" if known else "-", str(c.n),
        "-" if c.difference is None else f"{c.difference:+.2f}",
        _ends(c.difference_low, c.difference_high), c.badge, c.why or "-",
    )  # fmt: skip


def _published_notes(
    found: Sequence[PublishedComparison], shown: Sequence[PublishedComparison]
) -> list[str]:
    counts = {
        badge: sum(c.badge == badge for c in found)
        for badge in dict.fromkeys(c.badge for c in found)
    }
    text = ", ".join(f"{count} {badge}" for badge, count in counts.items())
    return [
        f"{len(found)} published numbers of these pairs: {text}"
        + ("" if len(shown) == len(found) else "; --all lists every one")
        + ".",
        "higher, lower: the 95 % interval of the difference (Student's t, the published number "
        f"taken as one run) leaves out 0. reproduced: it does not, and the difference is at most "
        f"{TOLERANCE:g} points. In brackets: the epoch that the source reports; ours is the last.",
    ]
