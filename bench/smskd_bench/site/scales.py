"""Small pictures inside the table: a number and its interval on the scale of its pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smskd_bench.report.rows import LeaderboardRow

WIDTH = 92.0
"""Units of a picture from end to end; 4 more are left free on both sides."""
EDGE = 4.0

Range = tuple[float | None, float | None, float | None]
"""A number, and the lower and upper end of its interval."""


@dataclass(frozen=True)
class Bar:
    """Where to draw, in units from the left.

    Attributes:
        x: The number.
        left: Lower end of its interval, or the number.
        right: Upper end.
        zero: No difference; None on a scale of accuracies.
    """

    x: float
    left: float
    right: float
    zero: float | None = None


def interval_bars(rows: Sequence[LeaderboardRow]) -> list[Bar | None]:
    """Mean accuracy with its interval."""
    return _bars(rows, _accuracy, centred=False)


def difference_bars(rows: Sequence[LeaderboardRow]) -> list[Bar | None]:
    """Difference from the control with its interval; no difference is in the middle."""
    return _bars(rows, _difference, centred=True)


def _accuracy(row: LeaderboardRow) -> Range:
    interval = row.interval
    if interval is None:
        return row.mean, row.mean, row.mean
    return row.mean, interval.low, interval.high


def _difference(row: LeaderboardRow) -> Range:
    versus = row.versus
    if versus is None:
        return None, None, None
    if versus.low is None or versus.high is None:
        return versus.difference, versus.difference, versus.difference
    return versus.difference, versus.low, versus.high


def _bars(
    rows: Sequence[LeaderboardRow], read: Callable[[LeaderboardRow], Range], centred: bool
) -> list[Bar | None]:
    middles: dict[str, list[float]] = {}
    for row in rows:
        middle = read(row)[0]
        if middle is not None:
            middles.setdefault(row.pair, []).append(middle)
    scales = {pair: _scale(found, centred) for pair, found in middles.items()}
    return [_bar(read(row), scales.get(row.pair), centred) for row in rows]


def _scale(middles: Sequence[float], centred: bool) -> tuple[float, float]:
    """Ends of a scale: a wide interval of few seeds is cut off, so that the others are seen."""
    if centred:
        most = 1.8 * max(abs(m) for m in middles) or 1.0
        return -most, most
    room = max(0.4 * (max(middles) - min(middles)), 0.2)
    return min(middles) - room, max(middles) + room


def _bar(found: Range, scale: tuple[float, float] | None, centred: bool) -> Bar | None:
    middle, low, high = found
    if middle is None or low is None or high is None or scale is None:
        return None

    def place(value: float) -> float:
        share = (value - scale[0]) / (scale[1] - scale[0])
        return round(EDGE + WIDTH * min(1.0, max(0.0, share)), 1)

    return Bar(place(middle), place(low), place(high), place(0.0) if centred else None)
