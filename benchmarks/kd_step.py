"""Speed of one knowledge-distillation step: torchdistill, the conventional loop, and ours.

    python -m benchmarks.kd_step
    python -m benchmarks.kd_step --pair 'resnet110>resnet20' --data-root DIR

All contestants train the same pair of networks on batches of the same size; what one step costs
holds the data path (``--feed memory`` leaves it out for all of them). That they do the same work is
checked first (:mod:`benchmarks.same_work`).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.command import common_options, publish, run, set_up
from benchmarks.expected import KD_STEP, PAIRS, step_group
from benchmarks.interleave import Clock, Contestant, interleave
from benchmarks.record import Group
from benchmarks.timing import STEPS

if TYPE_CHECKING:
    import torch

    from benchmarks.images import TrainImages

DATA, MEMORY = "data", "memory"
EXCLUDED = (
    "reading the data set",
    "building networks and stage",
    "filling the teacher's table (the teacher's forward pass, once for each image and view that is "
    "read, for all methods, seeds and stages together)",
    "the first round",
    "starting the loaders' workers, and up to 2 batches a worker that they made while others "
    "were timed (to the loaders' advantage)",
)


@dataclass(frozen=True)
class Settings:
    """What is the same for all contestants.

    Attributes:
        device: Where to train.
        batch_size: B.
        workers: Of the loaders.
        feed: "data" end to end, "memory" the same batch in each step.
        steps: Steps of one measurement.
        rounds: Timed rounds at most.
        seconds: Time budget of one pair.
    """

    device: torch.device
    batch_size: int
    workers: int
    feed: str
    steps: int
    rounds: int
    seconds: float


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@common_options(rounds=20, seconds=150)
@click.option("--pair", "pairs", multiple=True, default=PAIRS[:1], show_default=True)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True,
              help="Worker processes of the DataLoaders.")  # fmt: skip
@click.option("--feed", type=click.Choice([DATA, MEMORY]), default=DATA, show_default=True,
              help="Batches from each contestant's data path, or one batch in memory.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Steps a turn; 1 on a CPU, 20 on a GPU.")
def main(
    device: str, threads: int | None, rounds: int, seconds: float, batch_size: int,
    data_root: Path | None, output: Path | None, pairs: tuple[str, ...], workers: int,
    feed: str, steps: int | None,
) -> None:  # fmt: skip
    """Time the step for each pair and write the result."""
    from benchmarks.images import load_images

    place, clock = set_up(device, threads)
    settings = Settings(
        place, batch_size, workers, feed, steps or STEPS[device], rounds, seconds / len(pairs)
    )
    data = load_images(data_root)
    groups = [measure(pair, data, settings, clock) for pair in pairs]
    shown = {
        "batch": batch_size, "loader_workers": workers, "batches_from": feed,
        "steps_a_turn": settings.steps, "images": data.source,
    }  # fmt: skip
    publish(KD_STEP, device, groups, shown, EXCLUDED, output)


def measure(name: str, data: TrainImages, settings: Settings, clock: Clock) -> Group:
    """Build, check and time all contestants of one pair."""
    from benchmarks.contestants import Contestants
    from benchmarks.numerics import unchanged_numerics
    from benchmarks.pair import Pair
    from benchmarks.same_work import check_same_work

    group = step_group(name, settings.device.type)
    pair = Pair.parse(name)
    if unknown := pair.unknown():
        click.echo(f"{name} is left out: {unknown}", err=True)
        return replace(group, missing=dict.fromkeys(group.expected, unknown))
    with unchanged_numerics(), closing(Contestants(pair, data, settings)) as contestants:
        loops = contestants.loops
        notes = {"one_step": check_same_work(loops, *contestants.plain_batch())}
        turns = [
            Contestant(loop.name, partial(loop.train, settings.steps), before=loop.numerics.apply)
            for loop in loops
        ]
        rounds = interleave(turns, settings.rounds, settings.seconds, clock=clock)
    return replace(group, rounds=rounds, missing=contestants.missing, notes=notes)


if __name__ == "__main__":
    run(main)
