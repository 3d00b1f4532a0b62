"""Whether every method runs on every standard pair: each cell of the grid trained for two steps.

    python -m benchmarks.grid --markdown docs/grid.md
    python -m benchmarks.grid --methods crd,ctkd --pairs 'vgg13>MobileNetV2'

Nothing is timed. A part of the grid is only printed, unless --output or --markdown is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.command import run, set_up
from benchmarks.grid_page import GRID, READING, counts, grid_sheet, page, summary
from benchmarks.pair import Pair, known_pair
from benchmarks.record import RESULTS, document, write
from smskd.errors import ConfigError, unknown_name
from smskd.methods import METHODS, MODIFIERS
from smskd.methods.objective import Part

if TYPE_CHECKING:
    from benchmarks.grid_cell import Cell

PAIRS = (
    "resnet56>resnet20", "resnet110>resnet20", "resnet110>resnet32", "resnet32x4>resnet8x4",
    "wrn_40_2>wrn_16_2", "wrn_40_2>wrn_40_1", "vgg13>vgg8", "vgg13>MobileNetV2",
    "ResNet50>MobileNetV2", "ResNet50>vgg8", "resnet32x4>ShuffleV1", "resnet32x4>ShuffleV2",
    "wrn_40_2>ShuffleV1",
)  # fmt: skip
"""The pairs of the CRD paper (arXiv 1910.10699), which nearly all later papers took over."""

MODIFIED = "kd"
"""What modifiers are tried around."""


def names() -> list[str]:
    """All rows: methods, then modifiers."""
    return [*METHODS, *MODIFIERS]


def part_of(name: str) -> Part:
    """A method at its defaults, or kd at its defaults with a modifier at its own.

    Raises:
        UnknownNameError: there is neither.
    """
    if name in METHODS:
        return Part(METHODS[name]())
    if name in MODIFIERS:
        return Part(METHODS[MODIFIED](), (MODIFIERS[name](),))
    raise unknown_name("method or modifier", name, names())


def kind_of(name: str) -> str:
    """What is said of a row beside its name."""
    return METHODS[name].kind if name in METHODS else f"modifier, around {MODIFIED}"


def _words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",")) if value else ()


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--methods", callback=_words, help="Methods and modifiers: a,b,...; default all.")
@click.option("--pairs", callback=_words, help="'teacher>student,...'; default the standard 13.")
@click.option("--batch-size", type=click.IntRange(2), default=8, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the result file; default benchmarks/results.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False),
              help="Page to write, docs/grid.md.")  # fmt: skip
@click.option("--rewrite", is_flag=True, help="Run nothing: the page of the result file.")
def main(
    methods: tuple[str, ...], pairs: tuple[str, ...], batch_size: int, device: str,
    threads: int | None, output: Path | None, markdown: Path | None, rewrite: bool,
) -> None:  # fmt: skip
    """Run the cells, print the page and write it; exit 1 if a cell failed."""
    if rewrite:
        if markdown is None:
            raise ConfigError("--rewrite writes a page", "add --markdown FILE")
        kept = (output or RESULTS) / f"{GRID}-{device}.json"
        markdown.write_text(page(json.loads(kept.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    parts = {name: part_of(name) for name in methods or names()}
    chosen = [known_pair(text) for text in pairs or PAIRS]
    cells = run_cells(parts, chosen, batch_size, device, threads)
    sheet = grid_sheet({name: kind_of(name) for name in parts}, list(map(str, chosen)), cells)
    settings = {"batch": batch_size, "images": "random"}
    result = document(GRID, device, [sheet], settings, (), READING)
    if output or not (methods or pairs):
        click.echo(f"written to {write(result, output or RESULTS)}", err=True)
    if markdown:
        markdown.write_text(page(result), encoding="utf-8")
    click.echo(page(result))
    raise SystemExit(bool(sheet.notes["failed"]))


def run_cells(
    parts: dict[str, Part], pairs: Sequence[Pair], batch_size: int, device: str,
    threads: int | None = None,
) -> dict[tuple[str, str], Cell]:  # fmt: skip
    """All cells by row and pair; what fails is told at once. One pair is in memory at a time."""
    from benchmarks.grid_cell import Bench
    from benchmarks.images import load_images

    place, _ = set_up(device, threads)
    data = load_images(None)
    cells: dict[tuple[str, str], Cell] = {}
    for pair in pairs:
        bench = Bench(pair, data, batch_size, place)
        found = {}
        for name, part in parts.items():
            found[name, str(pair)] = cell = bench.cell(part)
            if cell.outcome == "failed":
                click.echo(f"{pair} {name}: FAILED {cell.reason} ({cell.where})", err=True)
        click.echo(f"{pair}: {summary(counts(found.values()))}", err=True)
        cells |= found
    return cells


if __name__ == "__main__":
    run(main)
