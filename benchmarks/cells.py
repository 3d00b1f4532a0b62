"""What tables of every kind share: their parts as they are stored, and cells of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

from benchmarks.interleave import Rounds, spread

Document = dict[str, Any]
Row = dict[str, Any]

NOT_MEASURED = "not measured"
NOT_RUN = "it was not run"
VERDICTS = {True: "met", False: "not met", None: ""}


def measured(name: str, rounds: Rounds) -> Row:
    """Speed and samples of a contestant that was timed."""
    samples = rounds.timed[name]
    return {
        "images_per_s": asdict(spread([s.images_per_s for s in samples])),
        "samples": [astuple(s) for s in samples],
        "warmup_samples": [astuple(s) for s in rounds.warmup.get(name, [])],
    }


def grid(group: Document, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under the group's title, its remarks below; the last column is text."""
    numbers = len(titles) - 2
    parts = [
        f"**{group['title']}**",
        "",
        f"| {' | '.join(titles)} |",
        f"| --- |{' ---: |' * numbers} --- |",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    for remark in group.get("remarks", []):
        parts += ["", remark]
    return "\n".join(parts)


def quartiles(value: Mapping[str, float], digits: int = 2) -> str:
    """A median with its quartiles."""
    low, high = (f"{value[key]:.{digits}f}" for key in ("low", "high"))
    between = f"{low} to {high}" if value["low"] < 0 else f"{low}-{high}"
    return f"{value['median']:.{digits}f} ({between})"
