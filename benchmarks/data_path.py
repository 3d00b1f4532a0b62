"""Speed of the data path alone: PIL transforms in a DataLoader, and our gather.

    python -m benchmarks.data_path --data-root DIR

All make shuffled, augmented, normalised float batches of the same data on the device; no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.command import common_options, publish, run, set_up
from benchmarks.expected import DATA_PATH, GATHER, PIL_0, PIL_2, data_group
from benchmarks.interleave import Contestant, interleave

if TYPE_CHECKING:
    import torch

    from benchmarks.images import TrainImages
    from benchmarks.pil_loader import Passes
    from smskd.data import Batch, ResidentBatches

PIL_BATCHES = 60
OUR_BATCHES = 600
"""Batches of one turn; more of ours, so that a turn is not too short to time."""

EXCLUDED = (
    "reading the data set",
    "the first round",
    "starting worker processes and the batches they make before the first is asked for "
    "(to the loaders' advantage)",
)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@common_options(rounds=20, seconds=90)
def main(
    device: str, threads: int | None, rounds: int, seconds: float, batch_size: int,
    data_root: Path | None, output: Path | None,
) -> None:  # fmt: skip
    """Time the data paths and write the result."""
    from benchmarks.images import load_images
    from benchmarks.ours import resident

    place, clock = set_up(device, threads)
    data = load_images(data_root)
    batches = resident(data, batch_size, place)
    turns = [
        loader_turn(PIL_0, data, batch_size, 0, place),
        loader_turn(PIL_2, data, batch_size, 2, place),
        Contestant(GATHER, partial(_gather, _epochs(batches))),
    ]
    group = replace(data_group(), rounds=interleave(turns, rounds, seconds, clock=clock))
    shown = {
        "batch": batch_size, "batches_a_turn": f"{PIL_BATCHES} (ours {OUR_BATCHES})",
        "images": data.source,
    }  # fmt: skip
    publish(DATA_PATH, device, [group], shown, EXCLUDED, output)


def loader_turn(
    name: str, data: TrainImages, batch_size: int, workers: int, device: torch.device
) -> Contestant:
    """A loader that begins a pass before each turn and ends it after, workers included."""
    from benchmarks.pil_loader import Passes, make_loader

    passes = Passes(make_loader(data, batch_size, workers))
    return Contestant(name, partial(_load, passes, device), passes.begin, passes.close)


def _load(passes: Passes, device: torch.device) -> int:
    images = 0
    for _ in range(PIL_BATCHES):
        batch, labels = next(passes)
        batch, labels = batch.to(device), labels.to(device)
        images += len(labels)
    return images


def _gather(batches: Iterator[Batch]) -> int:
    return sum(len(next(batches).labels) for _ in range(OUR_BATCHES))


def _epochs(batches: ResidentBatches) -> Iterator[Batch]:
    for epoch in count(1):
        yield from batches.epoch(epoch)


if __name__ == "__main__":
    run(main)
