"""Cost of a whole matrix: all cells in one run, and each cell alone in an empty store.

    python -m benchmarks.matrix_cost --data-root DIR

Every time is that of ``smskd-bench run`` processes, start to end. Other code is given the teacher
as a checkpoint, so each cell alone gets it as imported weights; the same matrix with the same
weights is run at once, and once more with the teacher trained in it. The students are compared
cell by cell. With ``--work DIR`` a benchmark that was stopped goes on with what is not finished.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from benchmarks.command import publish, run, set_up
from benchmarks.expected_sheets import MATRIX_COST, matrix_sheet
from benchmarks.record import ROOT

if TYPE_CHECKING:
    from benchmarks.matrix_rounds import MeasuredRound

DEFAULT_MATRIX = ROOT / "benchmarks" / "matrices" / "shared.yaml"

ALONE_OPTIONS = ("--workers", "1")
ALONE_SHORTCUTS = ("--teacher-table", "off", "--fold-seeds", "off")

EXCLUDED = ("reading the results back", "training the teacher that is given")

READING = (
    "Wall and CPU s: of whole processes; 'stage runs only' leaves out the starts of processes, "
    "reading data, and the evaluation of the given teacher in each cell; 'computed' adds up "
    "times that were measured. Cells alone run one after the other, each in one worker with one "
    "thread; the run of all cells uses its defaults, so it also uses the cores that those leave "
    "idle: its CPU time is the comparison without that."
)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--data-root", type=click.Path(path_type=Path, file_okay=False),
              help="Folder with the matrix's data set.")  # fmt: skip
@click.option("--matrix", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              default=DEFAULT_MATRIX, help="Default: benchmarks/matrices/shared.yaml.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of all stores, kept, to go on from; temporary without it.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True,
              help="CPU threads of each worker, on both sides.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the result file; default benchmarks/results.")  # fmt: skip
def main(
    data_root: Path | None, matrix: Path, work: Path | None, rounds: int, threads: int,
    device: str, output: Path | None,
) -> None:  # fmt: skip
    """Time both ways, compare their students, and write the result."""
    from benchmarks.matrix_report import filled_sheet, in_words
    from benchmarks.matrix_rounds import Arena

    _, clock = set_up(device, threads)
    common = ["--threads", str(threads), "--device", device, "--tracking", "none"]
    if data_root:
        common += ["--data-root", str(data_root.resolve())]
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(TemporaryDirectory()))
        arena = Arena(
            matrix, folder, tuple(common), (*ALONE_OPTIONS, *ALONE_SHORTCUTS), clock, _say
        )
        measured: list[MeasuredRound] = [arena.round(number + 1) for number in range(rounds)]
        sheet = filled_sheet(matrix_sheet(arena.title, device), measured)
    shown = {
        "rounds": rounds, "threads_of_a_worker": threads, "cells": len(measured[0].cells),
        "options_alone": " ".join((*ALONE_OPTIONS, *ALONE_SHORTCUTS)), "images": arena.images,
    }  # fmt: skip
    reading = f"{in_words(sheet.notes['students'])} {READING}"
    publish(MATRIX_COST, device, [sheet], shown, EXCLUDED, output, reading)


def _say(text: str) -> None:
    click.echo(text, err=True)
    sys.stderr.flush()


if __name__ == "__main__":
    run(main)
