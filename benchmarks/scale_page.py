"""What ``benchmarks.scale`` found, as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.made_store import Made
from benchmarks.page_part import grid
from benchmarks.scale_runs import Measured, Use

GOAL_MIB = 1e9 / 2**20
"""1 GB."""

HEAD = ("what", "command", "wall s", "goal", "CPU s", "peak MiB", "goal", "")


def page(made: Made, found: Sequence[Measured], environment: Mapping[str, Any]) -> str:
    """The table, with what it was measured on."""
    machine, packages = environment["machine"], environment["packages"]
    revision = (environment["code"]["revision"] or "unknown")[:7]
    return "\n\n".join(
        [
            f"{made.cells:,} cells, {made.stage_runs:,} stage runs; each result has "
            f"{made.result_bytes:,} bytes. Median (least to most) of "
            f"{len(found[0].uses)} runs, in turns.",
            grid(HEAD, [_row(one) for one in found]),
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, store "
            f"in memory; load at the end {environment['load_average'][0]}; Python "
            f"{machine['python']}, torch {packages['torch']}, pydantic {packages['pydantic']}; "
            f"{environment['date']}; revision {revision}.",
        ]
    )


def _row(one: Measured) -> list[str]:
    memory = f"{GOAL_MIB:.0f}" if one.goal_s else "-"
    return [
        one.what,
        f"`{one.command}`",
        _spread(one.uses, lambda use: use.wall_s, 1),
        f"{one.goal_s:g}" if one.goal_s else "-",
        _spread(one.uses, lambda use: use.cpu_s, 1),
        _spread(one.uses, lambda use: use.peak_mib, 0),
        memory,
        verdict(one),
    ]


def verdict(one: Measured) -> str:
    """Whether every run met both goals.

    A command has one thread, so that alone on a machine it takes about its processor time; on one
    that is shared it may keep to the goal in that alone.
    """
    if one.goal_s is None:
        return ""
    if any(use.cpu_s >= one.goal_s or use.peak_mib >= GOAL_MIB for use in one.uses):
        return "not met"
    return "met" if all(use.wall_s < one.goal_s for use in one.uses) else "met in CPU s only"


def _spread(uses: Sequence[Use], of: Callable[[Use], float], digits: int) -> str:
    values = sorted(of(use) for use in uses)
    return f"{median(values):.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"
