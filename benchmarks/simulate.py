"""How long a matrix would take on clusters of 1 to 512 devices, by simulation.

    python -m benchmarks.simulate --markdown docs/scale.md --picture docs/scale.svg

The speed of every network of the matrix is measured on the device at hand, which gives the cost of
each stage run; then the executors' own queue hands the stage runs out to
devices that exist on paper only.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.command import run
from benchmarks.record import RESULTS, ROOT
from smskd.errors import ConfigError

if TYPE_CHECKING:
    from smskd_bench.prediction import Machine
    from smskd_bench.speed import Workload

    from benchmarks.simulation_page import Simulation

DEFAULT_MATRIX = ROOT / "leaderboards" / "cifar100.yaml"
DEVICES = tuple(2**power for power in range(10))


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--matrix", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              default=DEFAULT_MATRIX, help="Default: leaderboards/cifar100.yaml.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where speeds are measured.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True,
              help="CPU threads of what is measured.")  # fmt: skip
@click.option("--kept", is_flag=True, help="Take the speeds of the result file; measure nothing.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS,
              help="Folder of the result file; default benchmarks/results.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Page whose part to rewrite.")  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False),
              help="An .svg or .png file to draw.")  # fmt: skip
def main(
    matrix: Path, device: str, threads: int, kept: bool, output: Path,
    markdown: Path | None, picture: Path | None,
) -> None:  # fmt: skip
    """Measure, simulate, and write the page."""
    from benchmarks.page_part import rewrite
    from benchmarks.simulation_page import draw, page

    found = _simulated(matrix, device, threads, kept, output)
    text = page(found)
    click.echo(text)
    if markdown:
        rewrite(markdown, "simulation", text)
    if picture:
        draw(found, picture)


def _simulated(matrix: Path, device: str, threads: int, kept: bool, folder: Path) -> Simulation:
    from smskd_bench.calibration import Calibration
    from smskd_bench.config import load_matrix
    from smskd_bench.plan import make_plan
    from smskd_bench.prediction import Machine, Predictor
    from smskd_bench.tables import plan_tables

    from benchmarks.simulated_cluster import schedules
    from benchmarks.simulation_page import Simulation
    from benchmarks.stage_costs import by_macs, wanted, with_live_networks, with_tables

    plan = make_plan(load_matrix(matrix))
    machine = Machine(device, threads, threads)
    predictor = Predictor(plan, machine)
    tables = {place: table for place, table in plan_tables(plan).items() if table.pays}
    work = wanted(predictor, tables)
    if not kept:
        _keep(work, machine, folder)
    record, measured = _read(folder, device)
    if lacking := [str(one) for one in work if one not in measured]:
        raise ConfigError(f"not measured: {', '.join(lacking)}", "run it without --kept")
    speeds = Calibration(device, record["environment"]["device"], measured)
    looked_up = with_tables(predictor, tables, speeds)
    costs = {
        "tables": looked_up,
        "live": with_live_networks(predictor, speeds),
        "by MACs": by_macs(plan, sum(looked_up.values())),
    }
    found = {name: schedules(plan, each, DEVICES) for name, each in costs.items()}
    return Simulation(plan, len(tables), costs, found, speeds, record, device)


def _keep(work: list[Workload], machine: Machine, folder: Path) -> None:
    """Measure, and write the result file."""
    from benchmarks.record import environment, write
    from benchmarks.stage_costs import measured_speeds

    speeds = measured_speeds(work, machine, lambda text: click.echo(text, err=True))
    entries = [{"work": asdict(one), "ms_per_image": round(ms, 6)} for one, ms in speeds.items()]
    place = {"benchmark": "simulate", "device": machine.device}
    where = {"threads": machine.threads, "environment": environment(machine.device)}
    write({**place, **where, "measured": entries}, folder)


def _read(folder: Path, device: str) -> tuple[dict[str, Any], dict[Workload, float]]:
    from smskd_bench.speed import Workload

    file = folder / f"simulate-{device}.json"
    if not file.exists():
        raise ConfigError(f"there is no {file}", "run it without --kept")
    record = json.loads(file.read_text(encoding="utf-8"))
    measured = {Workload(**one["work"]): one["ms_per_image"] for one in record["measured"]}
    return record, measured


if __name__ == "__main__":
    run(main)
