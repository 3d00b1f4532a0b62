"""What ``benchmarks.simulate`` found, as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd_bench.calibration import Calibration
from smskd_bench.dry_run import duration_text
from smskd_bench.plan import Plan

from benchmarks.page_part import grid
from benchmarks.simulated_cluster import Costs, Schedule, longest_chain

HEAD = (
    "devices", "makespan", "lower bound", "above it %", "times as fast as one", "devices busy %",
)  # fmt: skip

TITLES = {
    "tables": "Frozen networks looked up, as `run` does by default",
    "live": "Frozen networks run live, as `--teacher-table off` does",
    "by MACs": "The same work as the first, shared out by multiply-accumulates",
}


@dataclass(frozen=True)
class Simulation:
    """A matrix on clusters of several sizes.

    Attributes:
        plan: What is run.
        tables: Tables of frozen networks' outputs in it.
        costs: Seconds of every stage run, by how they were found.
        schedules: By the same names, one for each size.
        speeds: What was measured.
        record: The result file, with threads and environment of the measurement.
        device: torch device type of the measurement.
    """

    plan: Plan
    tables: int
    costs: Mapping[str, Costs]
    schedules: Mapping[str, Sequence[Schedule]]
    speeds: Calibration
    record: Mapping[str, Any]
    device: str


def page(found: Simulation) -> str:
    """All tables, with what they rest on."""
    plan = found.plan
    parts = [
        f"`{plan.matrix.name}`: {len(plan.cells):,} cells, {len(plan.nodes):,} stage runs "
        f"({plan.stages_before_sharing():,} if every cell ran alone), {found.tables} tables. "
        "Times are of devices like the one that was measured."
    ]
    for name, schedules in found.schedules.items():
        parts += [f"**{TITLES[name]}**", _table(schedules), _chain(found, name)]
    return "\n\n".join([*parts, _footer(found)])


def _table(schedules: Sequence[Schedule]) -> str:
    return grid(HEAD, [_row(schedule) for schedule in schedules])


def _row(schedule: Schedule) -> list[str]:
    return [
        str(schedule.devices),
        duration_text(schedule.makespan_s),
        duration_text(schedule.bound_s),
        f"{100.0 * (schedule.makespan_s / schedule.bound_s - 1.0):.1f}",
        f"{schedule.work_s / schedule.makespan_s:.1f}",
        f"{100.0 * schedule.efficiency:.1f}",
    ]


def _chain(found: Simulation, name: str) -> str:
    costs, first = found.costs[name], found.schedules[name][0]
    steps = [
        f"{found.plan.nodes[key].label} ({duration_text(costs[key])})"
        for key in longest_chain(found.plan, costs)
    ]
    return (
        f"Work: {duration_text(first.work_s)}. Critical path: "
        f"{duration_text(first.longest_chain_s)}: {', then '.join(steps)}. "
        f"Work / critical path: {first.work_s / first.longest_chain_s:.1f}."
    )


def _footer(found: Simulation) -> str:
    env, threads = found.record["environment"], found.record["threads"]
    clock = "processor" if threads == 1 and found.device == "cpu" else "wall"
    machine, packages = env["machine"], env["packages"]
    return (
        f"Speeds of {len(found.speeds.measured)} kinds of work measured on {found.speeds.name} "
        f"({machine['cores']} cores; {threads} thread{'s' if threads > 1 else ''}, {clock} time; "
        f"load {env['load_average'][0]}), Python {machine['python']}, torch {packages['torch']}; "
        f"{env['date']}; revision {(env['code']['revision'] or 'unknown')[:7]}."
    )


def draw(found: Simulation, file: Path) -> None:
    """Times as fast as one device against their number, beside what no schedule can exceed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "smskd-bench", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for name, schedules in found.schedules.items():
            counts = [one.devices for one in schedules]
            (line,) = axes.plot(
                counts, [one.work_s / one.makespan_s for one in schedules], "o-", label=name
            )
            most = [one.work_s / one.bound_s for one in schedules]
            axes.plot(counts, most, "--", color=line.get_color(), linewidth=1.0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_yticks(counts, [str(count) for count in counts])
        axes.set_xlabel("devices")
        axes.set_ylabel("times as fast as one device")
        axes.set_title(f"{found.plan.matrix.name}, simulated; dashed: upper bound", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
