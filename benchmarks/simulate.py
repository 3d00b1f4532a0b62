"""How long a matrix would take on clusters of 1 to 512 devices, by simulation.

    python -m benchmarks.simulate --markdown docs/scale.md --picture docs/scale.svg

The speed of every network of the matrix is measured on the device at hand (kept in ``--store``),
which gives the cost of each stage run; then the executors' own queue hands the stage runs out to
devices that exist on paper only.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from benchmarks.command import run
from benchmarks.record import ROOT

if TYPE_CHECKING:
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
@click.option("--store", type=click.Path(path_type=Path, file_okay=False),
              help="Store that keeps the measured speeds; temporary without it.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Page whose part to rewrite.")  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False),
              help="An .svg or .png file to draw.")  # fmt: skip
def main(
    matrix: Path, device: str, threads: int, store: Path | None,
    markdown: Path | None, picture: Path | None,
) -> None:  # fmt: skip
    """Measure, simulate, and write the page."""
    from benchmarks.page_part import rewrite
    from benchmarks.simulation_page import draw, page

    with TemporaryDirectory() as folder:
        found = _simulated(matrix, device, threads, store or Path(folder))
    text = page(found)
    click.echo(text)
    if markdown:
        rewrite(markdown, "simulation", text)
    if picture:
        draw(found, picture)


def _simulated(matrix: Path, device: str, threads: int, folder: Path) -> Simulation:
    from smskd_bench.config import load_matrix
    from smskd_bench.plan import make_plan
    from smskd_bench.prediction import Machine, Predictor
    from smskd_bench.store import Store
    from smskd_bench.tables import plan_tables

    from benchmarks.record import environment
    from benchmarks.simulated_cluster import schedules
    from benchmarks.simulation_page import Simulation
    from benchmarks.stage_costs import by_macs, measured_speeds, with_live_networks, with_tables

    plan = make_plan(load_matrix(matrix))
    predictor = Predictor(plan, Machine(device, threads, threads))
    tables = {place: table for place, table in plan_tables(plan).items() if table.pays}
    speeds = measured_speeds(predictor, tables, Store.open(folder), _say)
    looked_up = with_tables(predictor, tables, speeds)
    costs = {
        "tables": looked_up,
        "live": with_live_networks(predictor, speeds),
        "by MACs": by_macs(plan, sum(looked_up.values())),
    }
    found = {name: schedules(plan, each, DEVICES) for name, each in costs.items()}
    return Simulation(plan, len(tables), costs, found, speeds, environment(device), device)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    run(main)
