"""Claims and published numbers of one board; a ledger that does not fit is told, never fatal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from smskd.errors import SmskdError
from smskd_bench.claims import load_claims
from smskd_bench.plan import Plan
from smskd_bench.report.claim_board import evidence_cells, published_grid
from smskd_bench.report.evidence import ClaimState, claim_states
from smskd_bench.report.grid import Grid
from smskd_bench.report.published_comparison import PublishedComparison, compare_published
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.store import Store


@dataclass(frozen=True)
class ClaimEntry:
    """A claim as a page shows it: who says what, its state, and a line for each test."""

    id: str
    claim: str
    source: str
    state: str
    tests: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LedgerPart:
    """Claims and published numbers beside ours.

    Attributes:
        claims: Those that this matrix tests.
        untested: Claims that it does not test.
        claims_problem: Why there are no claims to show; empty if there are.
        published: Published numbers that we have a result for.
        published_count: All published numbers of these pairs.
        badges: How many have which badge, in words.
        published_problem: Why there are no published numbers to show; empty if there are.
    """

    claims: tuple[ClaimEntry, ...]
    untested: tuple[ClaimEntry, ...]
    claims_problem: str
    published: Grid
    published_count: int
    badges: str
    published_problem: str


def read_ledger(
    plan: Plan, store: Store, rows: Sequence[LeaderboardRow], margin: float
) -> LedgerPart:
    """What the store says about claims and published numbers, or why it says nothing."""
    claims_problem, entries = "", []
    try:
        entries = [_entry(s) for s in claim_states(load_claims(), plan, store, margin, rows)]
    except SmskdError as error:  # no checkout beside, or the matrix lacks a row that a claim names
        claims_problem = str(error.message)
    found, published_problem = _published(plan, rows)
    shown = [c for c in found if c.badge not in ("not run", "no row")]
    counts = Counter(c.badge for c in found)
    tested = tuple(e for e in entries if e.tests)
    if not tested and not claims_problem:
        claims_problem = f"No claim of the ledger names rows of the matrix {plan.matrix.name}."
    return LedgerPart(
        claims=tested,
        untested=tuple(e for e in entries if not e.tests),
        claims_problem=claims_problem,
        published=published_grid(shown),
        published_count=len(found),
        badges=", ".join(f"{count} {badge}" for badge, count in counts.items()),
        published_problem=published_problem,
    )


def _entry(state: ClaimState) -> ClaimEntry:
    claim = state.claim
    tests = tuple(evidence_cells(evidence) for evidence in state.evidence)
    return ClaimEntry(claim.id, claim.claim, claim.source, state.state, tests)


def _published(plan: Plan, rows: Sequence[LeaderboardRow]) -> tuple[list[PublishedComparison], str]:
    try:
        found = compare_published(plan, rows)
    except SmskdError as error:
        return [], error.message
    pairs = ", ".join(pair.name for pair in plan.matrix.pairs[:3])
    return found, "" if found else f"No published number is of a pair of this board ({pairs})."
