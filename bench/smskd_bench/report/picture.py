"""Accuracy against latency, with the Pareto front marked: a picture of students on devices.

PNG or SVG through matplotlib, a self-contained web page through Plotly (extra ``report``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd.errors import ConfigError, StoreError
from smskd_bench.report.rows import LeaderboardRow

FORMATS = (".png", ".svg", ".html")
MOST_NAMED = 15
"""Points of one device of which all can be named; of more, those on the front."""
INSTALL = "pip install 'smskd-bench[report]'"


@dataclass(frozen=True)
class Point:
    """A student in one precision on one device.

    Attributes:
        where: Target and device: points are compared within it only.
        label: What it is: pair, row and precision, with `` / `` between.
        p50_ms: Median latency of one image.
        top1: Accuracy on the device, in percent.
        front: Whether no other point of the same place is both faster and more accurate.
    """

    where: str
    label: str
    p50_ms: float
    top1: float
    front: bool = False


def points(rows: Iterable[LeaderboardRow]) -> list[Point]:
    """The measured exports of a leaderboard, one image at a time, with the front marked."""
    found = [
        Point(f"{e.target} on {e.device}", f"{row.pair} / {row.row} / {e.label}", e.p50_ms, e.top1)
        for row in rows
        for e in row.exported
        if e.p50_ms is not None and e.top1 is not None and e.batch == 1
    ]
    return mark_front(found)


def mark_front(found: Sequence[Point]) -> list[Point]:
    """Mark the points that no other of the same place beats in one and equals in the other."""
    return [
        Point(p.where, p.label, p.p50_ms, p.top1, not any(_beats(other, p) for other in found))
        for p in found
    ]


def _beats(one: Point, other: Point) -> bool:
    if one.where != other.where:
        return False
    as_good = one.p50_ms <= other.p50_ms and one.top1 >= other.top1
    return as_good and (one.p50_ms < other.p50_ms or one.top1 > other.top1)


def draw(found: Sequence[Point], path: Path, title: str) -> None:
    """Draw the points into ``path``, whose ending says the form.

    Raises:
        ConfigError: there is nothing to draw, the ending is unknown, or the extra is missing.
        StoreError: the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a picture ends in {', '.join(FORMATS)}")
    if not found:
        raise ConfigError("no exported student was measured yet", "smskd-bench export --target cpu")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            _draw_page(found, path, title)
        else:
            _draw_file(found, path, title)
    except ImportError as error:
        raise ConfigError(f"pictures need {error.name}", INSTALL) from None
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def _draw_file(found: Sequence[Point], path: Path, title: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the same points give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "smskd-bench"}):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.margins(x=0.14)  # room for names
        names = short_names(found)
        for where, group in _by_place(found):
            _draw_group(axes, where, group, names)
        axes.xaxis.set_major_formatter("{x:g}")  # 0.4, not 4 x 10^-1
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("latency p50 of one image, ms (log scale)")
        axes.set_ylabel("top-1 on the device, %")
        axes.set_title(title, parse_math=False)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


def short_names(found: Sequence[Point]) -> dict[str, str]:
    """For each label what tells it from the others: of pair, row and precision what differs."""
    parts = [point.label.split(" / ", 2) for point in found]
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    if not any(differ):
        differ[-1] = True
    names = {}
    for point, (pair, *rest) in zip(found, parts, strict=True):
        words = [pair.rpartition(">")[2], *rest]
        names[point.label] = " ".join(w for w, keep in zip(words, differ, strict=True) if keep)
    return names


def _draw_group(axes: Any, where: str, group: Sequence[Point], names: dict[str, str]) -> None:
    front = sorted((p for p in group if p.front), key=lambda p: p.p50_ms)
    xs, ys = [p.p50_ms for p in front], [p.top1 for p in front]
    (line,) = axes.plot(xs, ys, drawstyle="steps-post", linewidth=1.5)
    color = line.get_color()
    axes.scatter(xs, ys, color=color, s=50, zorder=3, label=f"{where} (line: Pareto front)")
    rest = [p for p in group if not p.front]
    axes.scatter(
        [p.p50_ms for p in rest], [p.top1 for p in rest], s=28, facecolor="none", edgecolor=color
    )
    for point in group if len(group) <= MOST_NAMED else front:
        axes.annotate(
            names[point.label], (point.p50_ms, point.top1), xytext=(6, -10),
            textcoords="offset points", fontsize="x-small", parse_math=False,
        )  # fmt: skip


def _draw_page(found: Sequence[Point], path: Path, title: str) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for where, group in _by_place(found):
        for front in (True, False):
            some = sorted((p for p in group if p.front == front), key=lambda p: p.p50_ms)
            figure.add_trace(
                go.Scatter(
                    x=[p.p50_ms for p in some],
                    y=[p.top1 for p in some],
                    text=[_escaped(p.label) for p in some],
                    mode="lines+markers" if front else "markers",
                    line={"shape": "hv"},
                    marker={
                        "size": 11 if front else 7,
                        "symbol": "circle" if front else "circle-open",
                    },
                    name=_escaped(where) + (", Pareto front" if front else ""),
                    hovertemplate="%{text}<br>p50 %{x:.3f} ms<br>top-1 %{y:.2f} %<extra></extra>",
                )
            )
    figure.update_layout(
        title=_escaped(title),
        template="plotly_white",
        xaxis={"title": "latency p50 of one image, ms", "type": "log"},
        yaxis={"title": "top-1 on the device, %"},
    )
    figure.write_html(path, include_plotlyjs=True, full_html=True, div_id="pareto")


def _escaped(text: str) -> str:
    """Names hold ``>``, and Plotly reads some HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _by_place(found: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    places = dict.fromkeys(point.where for point in found)
    return [(where, [p for p in found if p.where == where]) for where in places]
