"""What the commands of all benchmarks have in common: options, set-up, messages, the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from benchmarks.interleave import Clock
from benchmarks.record import RESULTS, Table, document, table, write
from smskd.errors import ConfigError, SmskdError

if TYPE_CHECKING:
    import torch

Command = TypeVar("Command", bound=Callable[..., Any])


def common_options(rounds: int, seconds: int) -> Callable[[Command], Command]:
    """Options of every benchmark, with this one's defaults."""
    options = [
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu"),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default."),
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True),
        click.option(
            "--seconds", type=click.FloatRange(1), default=seconds, show_default=True,
            help="Time budget of all timed rounds; at least 3 are timed.",
        ),
        click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True),
        click.option(
            "--data-root", type=click.Path(path_type=Path, file_okay=False),
            help="Folder with CIFAR-100; random images without it.",
        ),
        click.option(
            "--output", type=click.Path(path_type=Path, file_okay=False),
            help="Folder of the result file; default benchmarks/results.",
        ),
    ]  # fmt: skip

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def set_up(device: str, threads: int | None) -> tuple[torch.device, Clock]:
    """Choose threads and device, and the clock that waits for it.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        return torch.device("cpu"), Clock()
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device", "use --device cpu")
    return torch.device("cuda"), Clock(synchronise=torch.cuda.synchronize)


def publish(
    name: str,
    device: str,
    groups: Sequence[Table],
    settings: Mapping[str, Any],
    excluded: Sequence[str],
    folder: Path | None,
    reading: str = "",
) -> None:
    """Write the result file and print its tables."""
    result = document(name, device, groups, settings, excluded, reading)
    path = write(result, folder or RESULTS)
    click.echo(table(result))
    click.echo(f"written to {path}")


def run(command: click.Command) -> None:
    """Run a command; a problem becomes one message and its exit status."""
    try:
        command()
    except SmskdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
