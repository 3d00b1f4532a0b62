"""Planning 100,000 cells, and listing a store of 100,000 results: seconds and memory.

    python -m benchmarks.scale --markdown docs/scale.md

A matrix file of that many cells is made, and a store that holds a result for each of its stage
runs: the folders, files and form of real ones, their content copied from one real stage run that is
trained first. Then the real commands are run as processes of their own.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.command import run

MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory: what is measured is the program, not the disk."""


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--seeds", type=click.IntRange(1), default=50, show_default=True,
              help="Each stands for 2,000 cells.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the store, made unless it is there.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Page whose part to rewrite.")  # fmt: skip
def main(seeds: int, rounds: int, work: Path | None, markdown: Path | None) -> None:
    """Make the matrix and the store, time the commands, write the page."""
    from benchmarks.made_store import make
    from benchmarks.page_part import rewrite
    from benchmarks.record import environment
    from benchmarks.scale_page import page
    from benchmarks.scale_runs import measure

    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        click.echo("making the store", err=True)
        made = make(work or Path(folder), seeds)
        found = measure(made, rounds, lambda text: click.echo(text, err=True))
        text = page(made, found, environment("cpu"))
    click.echo(text)
    if markdown:
        rewrite(markdown, "scale", text)


if __name__ == "__main__":
    run(main)
