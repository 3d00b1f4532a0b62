"""Runs every benchmark of this folder within a time, one after the other, then the report.

    python -m benchmarks.all --device cpu
    python -m benchmarks.all --device cuda --minutes 8

One that fails, or that takes far longer than planned and is ended, is named; the others go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from benchmarks.command import run
from benchmarks.record import ROOT
from benchmarks.registry import Planned, plan

PATIENCE = 1.5
"""A benchmark may take this much longer than planned, if there is time."""

REPORT = "report"


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=8.0,
              show_default=True, help="Time of all of them together.")  # fmt: skip
@click.option("--data-root", type=click.Path(path_type=Path, file_okay=False),
              help="Folder with CIFAR-100; random images without it.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the result files; without it they go into the report.")  # fmt: skip
def main(device: str, minutes: float, data_root: Path | None, output: Path | None) -> None:
    """Run them and tell which failed."""
    planned = plan(device, minutes)
    failed = run_all(planned, [words(p, device, data_root, output) for p in planned], minutes)
    if output is None and (why := _run([REPORT], None)):
        failed[REPORT] = why
    for name, why in failed.items():
        click.echo(f"failed: {name}: {why}", err=True)
    click.echo(f"{len(planned) - len(set(failed) - {REPORT})} of {len(planned)} benchmarks done")
    if failed:
        sys.exit(1)


def words(planned: Planned, device: str, data_root: Path | None, output: Path | None) -> list[str]:
    """The command line of one benchmark after ``python -m``, its module without the package."""
    entry = planned.entry
    line = [entry.name, "--device", device, "--seconds", f"{planned.seconds:.0f}"]
    line += entry.options.get(device, ())
    if data_root and entry.reads_images:
        line += ["--data-root", str(data_root.resolve())]
    return line + (["--output", str(output.resolve())] if output else [])


def run_all(
    planned: Sequence[Planned], lines: Sequence[Sequence[str]], minutes: float
) -> dict[str, str]:
    """Run one after the other; why those that failed did, by name."""
    ends = time.monotonic() + 60.0 * minutes
    failed = {}
    for one, line in zip(planned, lines, strict=True):
        left = max(0.0, ends - time.monotonic())
        click.echo(f"== {one.entry.name}: {one.seconds:.0f} s of rounds; {left:.0f} s left")
        if left <= 0:
            failed[one.entry.name] = "no time was left"
        elif why := _run(line, min(left, PATIENCE * one.total_s)):
            failed[one.entry.name] = why
    return failed


def _run(line: Sequence[str], limit_s: float | None) -> str | None:
    """Run one command; why it failed, or None."""
    module, *rest = line
    command = [sys.executable, "-m", f"benchmarks.{module}", *rest]
    sys.stdout.flush()
    # In a session of its own, so that its worker processes end with it.
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            code = process.wait(limit_s)
        except BaseException as error:
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"it was ended after {limit_s:.0f} s"
    return f"exit status {code}" if code else None


if __name__ == "__main__":
    run(main)
