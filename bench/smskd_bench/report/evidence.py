"""What a store says about each claim, computed: nothing is typed in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from smskd_bench.claims import Claim, ClaimTest, Expectation, Ledger, tests_of
from smskd_bench.plan import Plan
from smskd_bench.report.comparisons import Scores, Versus, compare_all, paired
from smskd_bench.report.rows import LeaderboardRow, leaderboard_rows
from smskd_bench.report.training_time import ExtraTime, extra_time
from smskd_bench.stats.comparing import MARGIN, Verdict
from smskd_bench.store import Store

Says = Literal["supports", "contradicts", "open", "not run"]
State = Literal[
    "supported", "supported in part", "contradicted", "contradicted in part", "mixed", "open",
    "not run", "not tested here",
]  # fmt: skip

_SUPPORTS: dict[Expectation, tuple[Verdict, ...]] = {
    "better": ("better",),
    "worse": ("worse",),
    "equal": ("equal",),
    "different": ("better", "worse"),
}


@dataclass(frozen=True)
class Evidence:
    """What one test of a claim found.

    Attributes:
        test: The row and its control.
        pairs: Pairs that both rows have results for.
        missing_pairs: Pairs of the matrix without, though the rows are meant for them.
        says: What it means for the claim.
        versus: The difference, averaged over ``pairs`` at each seed; judged among all tests of
            the ledger in this matrix. None for ``cheap``, or without results.
        by_pair: The same within each pair, judged among all of these.
        time: For ``cheap``: training time against the control's.
        why: Why it is open or not run.
    """

    test: ClaimTest
    pairs: tuple[str, ...]
    missing_pairs: tuple[str, ...]
    says: Says
    versus: Versus | None = None
    by_pair: Mapping[str, Versus] | None = None
    time: ExtraTime | None = None
    why: str = ""


@dataclass(frozen=True)
class ClaimState:
    """A claim with its evidence from one matrix and store."""

    claim: Claim
    evidence: tuple[Evidence, ...]
    state: State


def claim_states(
    ledger: Ledger,
    plan: Plan,
    store: Store,
    margin: float = MARGIN,
    rows: Sequence[LeaderboardRow] | None = None,
) -> list[ClaimState]:
    """What a store says about every claim, as far as one matrix tests it.

    Args:
        ledger: The claims.
        plan: The matrix.
        store: Where the results are.
        margin: Points of accuracy that count as practically none.
        rows: The matrix's rows, where they were read already.

    Raises:
        ConfigError: a claim names a row that the matrix does not have.
        StoreError: a result cannot be read.
    """
    rows = leaderboard_rows(plan, store, margin) if rows is None else rows
    tests = [(claim, test) for claim in ledger.claims for test in tests_of(claim, plan.matrix)]
    wanted = [(claim, test) for claim, test in tests if claim.expect != "cheap"]
    judged = _judged([test for _, test in wanted], rows, margin)
    found: dict[str, list[Evidence]] = {claim.id: [] for claim in ledger.claims}
    for claim, test in tests:
        if claim.expect == "cheap":
            found[claim.id].append(_of_time(claim, test, plan, store, rows))
        else:
            found[claim.id].append(_of_accuracy(claim, test, rows, judged))
    return [
        ClaimState(claim, tuple(found[claim.id]), _state([e.says for e in found[claim.id]]))
        for claim in ledger.claims
    ]


@dataclass(frozen=True)
class _Judged:
    overall: dict[ClaimTest, Versus]
    by_pair: dict[ClaimTest, dict[str, Versus]]


def _judged(tests: Sequence[ClaimTest], rows: Sequence[LeaderboardRow], margin: float) -> _Judged:
    """Compare all tests, with one correction for the averages and one for the single pairs."""
    tests = list(dict.fromkeys(tests))
    apart = {test: _differences(test, rows) for test in tests}
    overall = {str(i): _average(apart[test]) for i, test in enumerate(tests)}
    single = {
        f"{i} {pair}": scores
        for i, test in enumerate(tests)
        for pair, scores in apart[test].items()
    }
    averages, singles = _against_zero(overall, margin), _against_zero(single, margin)
    return _Judged(
        {t: _named(averages[str(i)], t) for i, t in enumerate(tests) if str(i) in averages},
        {
            t: {
                pair: _named(singles[f"{i} {pair}"], t)
                for pair in apart[t]
                if f"{i} {pair}" in singles
            }
            for i, t in enumerate(tests)
        },
    )


def _named(versus: Versus, test: ClaimTest) -> Versus:
    return replace(versus, control=test.control)


def _against_zero(differences: Mapping[str, Scores], margin: float) -> dict[str, Versus]:
    """Judge differences that are taken already."""
    zero = {f"zero {name}": dict.fromkeys(scores, 0.0) for name, scores in differences.items()}
    wanted = [(name, f"zero {name}") for name in differences]
    found = compare_all(wanted, {**differences, **zero}, margin)
    return {name: compared[0] for name, compared in found.items()}


def _differences(test: ClaimTest, rows: Sequence[LeaderboardRow]) -> dict[str, dict[int, float]]:
    """Points at each seed, of each pair that has both rows."""
    scores = {(row.pair, row.row): row.top1 for row in rows}
    found = {}
    for pair in dict.fromkeys(row.pair for row in rows):
        ours, theirs = scores.get((pair, test.row), {}), scores.get((pair, test.control), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds:
            found[pair] = dict(zip(seeds, paired(ours, theirs), strict=True))
    return found


def _average(apart: Mapping[str, Scores]) -> dict[int, float]:
    """Mean over pairs at each seed that all of them have."""
    if not apart:
        return {}
    seeds = set.intersection(*(set(scores) for scores in apart.values()))
    return {seed: statistics.fmean(s[seed] for s in apart.values()) for seed in sorted(seeds)}


def _places(
    test: ClaimTest, rows: Sequence[LeaderboardRow]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Pairs with results of both rows, and pairs that lack them."""
    have = {(row.pair, row.row) for row in rows}
    meant = [
        pair
        for pair in dict.fromkeys(row.pair for row in rows)
        if {(pair, test.row), (pair, test.control)} <= have
    ]
    done = _differences(test, rows)
    return tuple(p for p in meant if p in done), tuple(p for p in meant if p not in done)


def _of_accuracy(
    claim: Claim, test: ClaimTest, rows: Sequence[LeaderboardRow], judged: _Judged
) -> Evidence:
    pairs, missing = _places(test, rows)
    versus = judged.overall.get(test)
    if versus is None:
        why = "no seed that both rows, in all of these pairs, have" if pairs else "no results yet"
        return Evidence(test, pairs, missing, "not run", why=why)
    says: Says = "open"
    if versus.verdict != "open":
        says = "supports" if versus.verdict in _SUPPORTS[claim.expect] else "contradicts"
    return Evidence(test, pairs, missing, says, versus, judged.by_pair[test], why=versus.why)


def _of_time(
    claim: Claim, test: ClaimTest, plan: Plan, store: Store, rows: Sequence[LeaderboardRow]
) -> Evidence:
    pairs, missing = _places(test, rows)
    if not pairs:
        return Evidence(test, pairs, missing, "not run", why="no results yet")
    time = extra_time(plan, store, pairs, test.row, test.control)
    says: Says = "open"
    if time.high is not None and time.high <= claim.percent:
        says = "supports"
    elif time.low is not None and time.low > claim.percent:
        says = "contradicts"
    why = time.why or f"the interval holds both less and more than {claim.percent:g} %"
    return Evidence(test, pairs, missing, says, time=time, why=why if says == "open" else "")


def _state(says: Sequence[Says]) -> State:
    """A claim's state from all of its tests in this matrix."""
    found = set(says)
    if not found:
        return "not tested here"
    if found == {"not run"}:
        return "not run"
    if {"supports", "contradicts"} <= found:
        return "mixed"
    partly = bool(found & {"open", "not run"})
    if "supports" in found:
        return "supported in part" if partly else "supported"
    if "contradicts" in found:
        return "contradicted in part" if partly else "contradicted"
    return "open"
