"""The page's pictures as PNG and SVG, for papers: text stays text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd_bench.report.columns import SIGNS
from smskd_bench.report.escaping import plain
from smskd_bench.report.picture import draw, points
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.site.curves import SeedCurve, mean_points, mean_series
from smskd_bench.site.heat import HeatMap
from smskd_bench.site.names import slug

MOST_ROWS = 40
"""Rows of one picture; of more, the best."""
MOST_CURVES = 6
LONGEST_NAME = 48

COLOURS = {"better": "#0b7a55", "worse": "#b3401c", "equal": "#2a5ea8", "open": "#6b7480"}
"""Of verdicts; their sign stands beside."""
MARKERS = {"better": "^", "worse": "v", "equal": "s", "open": "o"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a04f83", "#7a6a00", "#3b8fc4")


@dataclass(frozen=True)
class FigureFile:
    """A picture: what it shows, and its files within the site."""

    title: str
    png: str
    svg: str


@dataclass(frozen=True)
class Figures:
    """Draws the pictures of one board."""

    rows: Sequence[LeaderboardRow]

    @property
    def steps(self) -> int:
        """How often :meth:`write` tells that it got further: for each pair, and once for costs."""
        return len(self._pairs()) + 1

    def write(
        self,
        folder: Path,
        name: str,
        title: str,
        curves: Sequence[Sequence[SeedCurve]],
        maps: Sequence[HeatMap],
        advance: Callable[[], object],
    ) -> list[FigureFile]:
        """Write them all.

        Args:
            folder: Where to.
            name: Of the board, for the files.
            title: Of the board, in the pictures.
            curves: Of each row.
            maps: Heat maps.
            advance: Called after each pair, and at the end.
        """
        found: list[FigureFile] = []
        for number, pair in enumerate(self._pairs(), start=1):
            stem = f"{name}-{number}-{slug(pair)}"
            for kind, text, figure in self._of_pair(pair, curves, maps):
                found.append(_save(figure, folder, f"{stem}-{kind}", f"{text}, {pair}"))
            advance()
        found += self._costs(folder, name, title)
        advance()
        return found

    def _pairs(self) -> list[str]:
        return list(dict.fromkeys(row.pair for row in self.rows))

    def _of_pair(
        self, pair: str, curves: Sequence[Sequence[SeedCurve]], maps: Sequence[HeatMap]
    ) -> Iterator[tuple[str, str, Any]]:
        own = [(row, c) for row, c in zip(self.rows, curves, strict=True) if row.pair == pair]
        known = [row for row, _ in own if row.mean is not None]
        if known:
            yield "accuracy", "accuracy", _accuracies(known[:MOST_ROWS], pair)
        drawn = [(row, c) for row, c in own if c][:MOST_CURVES]
        if drawn:
            yield "curves", "learning curves", _curves(drawn, pair)
        for one in maps:
            if one.pair == pair:
                kind = "with" if one.reference else "without"
                yield f"order-{kind}", f"order and stage, {kind} reference", _heat(one)

    def _costs(self, folder: Path, name: str, title: str) -> Iterator[FigureFile]:
        known = [row for row in self.rows if row.mean is not None]
        if known:
            stem = f"{name}-parameters"
            yield _save(_parameters(known, title), folder, stem, "accuracy against parameters")
        if measured := points(self.rows):
            stem = f"{name}-latency"
            for ending in (".png", ".svg"):
                draw(measured, folder / f"{stem}{ending}", plain(title))
            yield _file(stem, "accuracy against latency")


def _file(stem: str, title: str) -> FigureFile:
    return FigureFile(title, f"figures/{stem}.png", f"figures/{stem}.svg")


def _save(figure: Any, folder: Path, stem: str, title: str) -> FigureFile:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "smskd-bench"}):
        figure.savefig(folder / f"{stem}.png", dpi=130, metadata={"Software": None})
        figure.set_layout_engine("none")  # found once, it fits both
        figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
    return _file(stem, title)


def _axes(width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_short(title, 80), parse_math=False, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _short(text: str, most: int = LONGEST_NAME) -> str:
    text = plain(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _accuracies(rows: Sequence[LeaderboardRow], pair: str) -> Any:
    """Means with their intervals, the best above; shape, sign and colour tell the verdict."""
    figure, axes = _axes(8, 1.2 + 0.28 * len(rows), pair)
    for place, row in enumerate(rows):
        verdict = row.versus.verdict if row.versus else "open"
        colour = COLOURS[verdict] if row.versus else "#2b2f36"
        if row.interval is not None:
            axes.plot([row.interval.low, row.interval.high], [place, place], color=colour, lw=1.4)
        axes.plot([row.mean], [place], MARKERS[verdict] if row.versus else "o", color=colour, ms=5)
    names = [_short(r.row) + (f"  {SIGNS[r.versus.verdict]}" if r.versus else "") for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small", parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    means = [row.mean for row in rows if row.mean is not None]
    room = max(0.6 * (max(means) - min(means)), 0.3)  # wide intervals of few seeds are cut off
    axes.set_xlim(min(means) - room, max(means) + room)
    axes.set_xlabel("test top-1, %: mean and 95 % interval; sign: verdict against the control")
    return figure


def _curves(drawn: Sequence[tuple[LeaderboardRow, Sequence[SeedCurve]]], pair: str) -> Any:
    figure, axes = _axes(8, 4.5, pair)
    for place, (row, curves) in enumerate(drawn):
        colour = SERIES[place % len(SERIES)]
        train = mean_series(curves, "train_top1")
        ends = mean_points(curve.ends for curve in curves)
        axes.plot(list(train), list(train.values()), color=colour, lw=1.2, alpha=0.8)
        (dots,) = axes.plot(list(ends), list(ends.values()), "o", color=colour, ms=6)
        dots.set_label(_short(row.row).lstrip("_"))
        for epoch in list(ends)[:-1]:
            axes.axvline(epoch, color="#888888", lw=0.6, ls=":")
    legend = axes.legend(fontsize="x-small", loc="lower right")
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_xlabel("epoch of the whole sequence; dotted: borders of stages")
    axes.set_ylabel("line: training top-1, %; dot: test after the stage")
    return figure


def _heat(one: HeatMap) -> Any:
    held = "with" if one.reference else "without"
    size = 1.2 + 0.75 * max(len(one.firsts), len(one.seconds))
    figure, axes = _axes(max(5.0, size + 1.5), max(3.2, size), f"{one.pair}, {held} reference")
    axes.grid(visible=False)
    means = [[_mean_or_nan(one, first, second) for second in one.seconds] for first in one.firsts]
    image = axes.imshow(means, cmap="cividis")
    figure.colorbar(image, ax=axes, label="test top-1, %")
    axes.set_xticks(range(len(one.seconds)), map(_short, one.seconds), parse_math=False)
    axes.set_yticks(range(len(one.firsts)), map(_short, one.firsts), parse_math=False)
    axes.set_xlabel("stage 2")
    axes.set_ylabel("stage 1")
    middle = sum(image.get_clim()) / 2
    for y, line in enumerate(means):
        for x, mean in enumerate(line):
            if mean == mean:  # no NaN
                colour = "black" if mean > middle else "white"
                axes.text(x, y, f"{mean:.2f}", ha="center", va="center", color=colour)
    return figure


def _mean_or_nan(one: HeatMap, first: str, second: str) -> float:
    cell = one.cells.get((first, second))
    return float("nan") if cell is None or cell.mean is None else cell.mean


def _parameters(rows: Sequence[LeaderboardRow], title: str) -> Any:
    figure, axes = _axes(7, 4.5, title)
    axes.set_xscale("log")
    for place, pair in enumerate(dict.fromkeys(row.pair for row in rows)):
        own = [row for row in rows if row.pair == pair]
        axes.scatter(
            [row.parameters for row in own], [row.mean for row in own], s=22,
            color=SERIES[place % len(SERIES)], marker="os^vDP"[place // len(SERIES) % 6],
            label=_short(pair).lstrip("_"),
        )  # fmt: skip
    legend = axes.legend(fontsize="x-small", loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_xlabel("parameters of the student (log scale)")
    axes.set_ylabel("test top-1, %")
    return figure
