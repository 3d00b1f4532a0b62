"""The web page of 2,000 rows: how long it takes to make, and how fast a real browser answers.

    python -m benchmarks.site --markdown docs/site.md

A matrix of 20 pairs and 100 rows is made, with a store that holds a result for each of its stage
runs (``benchmarks.made_store``). The real command makes the site; headless Chromium opens it from
disk, each time in a fresh profile.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.command import run

MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=60, show_default=True,
              help="Length of every history.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True,
              help="How often the page is opened.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of store and site; the store is made unless it is there.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Page whose part to rewrite.")  # fmt: skip
def main(seeds: int, epochs: int, rounds: int, work: Path | None, markdown: Path | None) -> None:
    """Make the store and the site, open it, write the page."""
    from benchmarks.chromium import missing
    from benchmarks.page_part import rewrite
    from benchmarks.record import environment
    from benchmarks.site_runs import measure, page

    if missing():
        raise click.UsageError(missing())
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        found = measure(work or Path(folder), seeds, epochs, rounds)
        text = page(found, environment("cpu"))
    click.echo(text)
    if markdown:
        rewrite(markdown, "site", text)


if __name__ == "__main__":
    run(main)
