"""The W&B report of a board, made of blocks and panels by the official package.

Runs in the sender's process. Package ``wandb-workspaces``, extra ``wandb-report``; 0.4.13 was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARK = "smskd-bench board"
"""Begins the description of our reports: another's report of the same title is not ours."""

CURVES = {"train_top1": "training accuracy (%)", "loss": "training loss"}
"""Columns of the table of curves that are drawn; losses of unlike methods do not compare."""

Text = dict[str, Any]
"""A ``ReportText`` as JSON."""


def build(text: Text, entity: str, project: str) -> Any:
    """A report, not saved yet; asks the server for the project."""
    import wandb_workspaces.reports.v2 as wr

    return wr.Report(
        entity=entity,
        project=project,
        title=text["title"],
        description=description(text),
        width="fluid",
        blocks=list(_blocks(text, entity, project)),
    )


def description(text: Text) -> str:
    """Below the title; tells ours from others', and whether anything has changed."""
    return f"{MARK} {text['board']}, content {text['digest'][:16]}"


def save(text: Text, entity: str, project: str, existing: Any) -> tuple[str, str]:
    """Make the report, or bring the one that is there up to date.

    Args:
        text: What it says.
        entity: Of the project.
        project: Where it is.
        existing: All reports of the project, as ``wandb.Api().reports`` gives them.

    Returns:
        "made", "changed", "same" or "not ours", and its id.
    """
    titled = [r for r in existing if r.display_name == text["title"]]
    ours = [r for r in titled if (r.description or "").startswith(f"{MARK} {text['board']}")]
    if titled and not ours:
        return "not ours", str(titled[0].id)
    if ours and ours[0].description == description(text):
        return "same", str(ours[0].id)
    report = build(text, entity, project)
    if ours:
        report.id = ours[0].id
    report.save()
    return ("changed" if ours else "made"), str(report.id)


def _blocks(text: Text, entity: str, project: str) -> Iterator[Any]:
    import wandb_workspaces.reports.v2 as wr

    for line in text["intro"]:
        yield wr.MarkdownBlock(text=line)
    yield wr.H2(text="Ranked")
    yield wr.MarkdownBlock(text=text["table"])
    yield wr.H2(text="Runs")
    yield wr.PanelGrid(runsets=[_rows(text, entity, project)], panels=_bars())
    if text["curves"]:
        yield wr.H2(text="Learning curves")
        yield wr.P(text="On training images, over all stages of a row, mean over its seeds.")
        yield wr.PanelGrid(runsets=[_board(text, entity, project)], panels=_curves())
    if text["targets"]:
        yield wr.H2(text="Accuracy against latency")
        panels = _scatters(text["targets"])
        yield wr.PanelGrid(runsets=[_rows(text, entity, project)], panels=panels)
    if text["picture"]:
        yield wr.PanelGrid(runsets=[_board(text, entity, project)], panels=_picture())


def _rows(text: Text, entity: str, project: str) -> Any:
    """The rows of this board, best first; by its id, as a name could end the expression."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    shown = ("rank", "accuracy/mean", "accuracy/std", "accuracy/low", "accuracy/high", "accuracy/n")
    more = ("control", "difference/mean", "difference/low", "difference/high", "verdict", "status")
    return wr.Runset(
        entity=entity,
        project=project,
        name="rows",
        filters=expr.And(expr.Config("board") == text["board"]),
        order=[wr.OrderBy(name=wr.SummaryMetric("accuracy/mean"), ascending=False)],
        pinned_columns=["run:displayName", *(f"summary:{name}" for name in shown[:2])],
        visible_columns=[f"summary:{name}" for name in (*shown[2:], *more)],
    )


def _board(text: Text, entity: str, project: str) -> Any:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    return wr.Runset(
        entity=entity,
        project=project,
        name="board",
        filters=expr.And(expr.Config("table_of") == text["board"]),
    )


def _bars() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.BarPlot(
            title="test accuracy, mean over seeds (%)",
            metrics=["accuracy/mean"],
            layout=wr.Layout(x=0, y=0, w=12, h=10),
        ),
        wr.ScatterPlot(
            title="accuracy and parameters",
            x=wr.SummaryMetric("cost/parameters"),
            y=wr.SummaryMetric("accuracy/mean"),
            log_x=True,
            layout=wr.Layout(x=12, y=0, w=12, h=10),
        ),
    ]


def _curves() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    charts = [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": "curves"}},
            chart_name="wandb/line/v0",
            chart_fields={"x": "epoch", "y": column, "stroke": "row"},
            chart_strings={"title": title},
            layout=wr.Layout(x=12 * i, y=0, w=12, h=10),
        )
        for i, (column, title) in enumerate(CURVES.items())
    ]
    table = wr.WeavePanelSummaryTable(
        table_name="leaderboard", layout=wr.Layout(x=0, y=10, w=24, h=12)
    )
    return [*charts, table]


def _scatters(targets: list[str]) -> list[Any]:
    """Running best from the left: the Pareto front."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.ScatterPlot(
            title=f"{target}: p50 of one image in ms, fp32",
            x=wr.SummaryMetric(f"latency/{target}/p50_ms"),
            y=wr.SummaryMetric("accuracy/mean"),
            log_x=True,
            running_ymax=True,
            layout=wr.Layout(x=12 * (i % 2), y=10 * (i // 2), w=12, h=10),
        )
        for i, target in enumerate(targets)
    ]


def _picture() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.MediaBrowser(
            title="every precision", media_keys=["pareto"], num_columns=1,
            layout=wr.Layout(x=0, y=0, w=24, h=14),
        )
    ]  # fmt: skip
