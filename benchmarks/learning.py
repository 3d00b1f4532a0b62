"""What students learn: the conventional loop beside each of our ways to train, paired by seed.

    python -m benchmarks.learning --data-root DIR --seeds 0,1,2,3 --work DIR --jobs 2

Being fast must not change what is learnt. All ways start from the same weights at equal seed and
have the same teacher, images, epochs, batch size, schedule and optimiser. With ``--work DIR`` what
was stopped goes on with the seeds that are not done.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.command import publish, run, set_up
from benchmarks.expected_sheets import (
    COMPILED,
    LEARNING,
    LEARNING_MODES,
    LEARNING_PAIR,
    learning_sheet,
)
from benchmarks.paired import MAX_SEEDS
from smskd.errors import ConfigError

SMOKE = {"train_size": 100, "test_size": 100, "epochs": 2, "teacher_epochs": 1}
"""Sizes that show that every way runs; they say nothing about learning."""

READING = (
    "top-1: test accuracy after the last epoch, mean over seeds. Differences in points, paired by "
    "seed: mean and 95 % t-interval, each interval by itself. 'lower' or 'higher' is said where it "
    "excludes 0, else 'no difference seen', which does not say that there is none. Ways of ours "
    "share order and crops at equal seed, the conventional loop has its own."
)


def _seeds(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list like 0,1,2", ctx, param) from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0 or len(seeds) > MAX_SEEDS:
        raise click.BadParameter(f"give up to {MAX_SEEDS} different numbers from 0", ctx, param)
    return seeds


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--data-root", type=click.Path(path_type=Path, file_okay=False),
              help="Folder with CIFAR-100; --smoke does without.")  # fmt: skip
@click.option("--seeds", callback=_seeds, default="0,1,2,3", show_default=True)
@click.option("--train-size", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--teacher-epochs", type=click.IntRange(1), default=30, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of teacher and results, to go on from; else temporary.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True,
              help="So many seeds at once, each in a process of its own.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True,
              help="CPU threads of each.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--compile", "compiled", is_flag=True, help="Also train with compiled networks.")
@click.option("--smoke", is_flag=True, help="Tiny sizes, to see that it runs; needs --output.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the result file; default benchmarks/results.")  # fmt: skip
def main(
    data_root: Path | None, seeds: tuple[int, ...], train_size: int, epochs: int,
    teacher_epochs: int, batch_size: int, work: Path | None, jobs: int, threads: int,
    device: str, compiled: bool, smoke: bool, output: Path | None,
) -> None:  # fmt: skip
    """Train every way with every seed, compare, and write the result."""
    from benchmarks.learning_report import filled_sheet
    from benchmarks.learning_runs import School
    from benchmarks.learning_setting import Setting

    set_up(device, threads)
    if smoke and output is None:
        raise ConfigError("--smoke makes no results to be kept", "add --output DIR")
    if data_root is None and not smoke:
        raise ConfigError("there are no images to learn from", "add --data-root DIR")
    sizes: dict[str, Any] = {
        "train_size": train_size, "test_size": None, "epochs": epochs,
        "teacher_epochs": teacher_epochs,
    } | (SMOKE if smoke else {})  # fmt: skip
    setting = Setting(
        pair=LEARNING_PAIR, data_root=data_root, batch_size=batch_size, device=device,
        threads=threads, **sizes,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(TemporaryDirectory()))
        school = School(setting, folder, jobs, lambda text: click.echo(text, err=True))
        asked = _asked(device, compiled)
        lessons = school.learn(asked, seeds)
        sheet = learning_sheet(LEARNING_PAIR, _expected(device, compiled))
        filled = filled_sheet(sheet, lessons, seeds, school.missing(device, compiled))
        filled.notes = {**filled.notes, "teacher": school.teacher, "jobs": jobs}
    shown = {
        **sizes, "batch": batch_size, "seeds": len(seeds), "jobs": jobs,
        "teacher_top1": f"{school.teacher['top1']:.2f}", "images": school.images,
        "trained_at_revision": " and ".join(filled.notes["revisions"]),
    }  # fmt: skip
    shown = {name: value for name, value in shown.items() if value is not None}
    publish(LEARNING, device, [filled], shown, (), output, READING)


def _expected(device: str, compiled: bool) -> tuple[str, ...]:
    modes = LEARNING_MODES[device]
    return modes if not compiled or COMPILED in modes else (*modes, COMPILED)


def _asked(device: str, compiled: bool) -> tuple[str, ...]:
    """The ways that are trained; compiled networks only if asked for."""
    modes = _expected(device, compiled)
    return modes if compiled else tuple(mode for mode in modes if mode != COMPILED)


if __name__ == "__main__":
    run(main)
