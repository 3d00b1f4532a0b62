"""The commands of ``benchmarks.scale``, each a process of its own with its time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import launcher
from benchmarks.made_store import Made
from smskd.errors import RunError

LAST_CHARACTERS = 800


@dataclass(frozen=True)
class Use:
    """What one process took.

    Attributes:
        wall_s: From its start to its end.
        cpu_s: Processor time, of user and system.
        peak_mib: Largest resident set.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float


@dataclass(frozen=True)
class Measured:
    """One command.

    Attributes:
        what: It does, in words.
        command: As a user types it.
        goal_s: Wall seconds wanted; None if no goal was set.
        uses: One for each round.
    """

    what: str
    command: str
    goal_s: float | None
    uses: list[Use]


def measure(made: Made, rounds: int, say: Callable[[str], None]) -> list[Measured]:
    """Run every command ``rounds`` times, in turns, so that a busy minute does not hit one only."""
    matrix = ["--matrix", str(made.matrix)]
    full, empty = ["--store", str(made.store)], ["--store", str(made.empty)]
    commands: list[tuple[str, list[str], str, float | None]] = [
        ("start and end of the program", ["list", "datasets"], "list datasets", None),
        ("plan, nothing done", ["status", *matrix, *empty], "status --matrix, empty store", 10.0),
        ("plan, all done", ["status", *matrix, *full], "status --matrix, full store", 10.0),
        ("the store alone", ["status", *full], "status, full store", 5.0),
        (
            "rank all rows", ["leaderboard", *matrix, *full, "--format", "csv"],
            "leaderboard --format csv", None,
        ),
        (
            "predict", ["run", *matrix, *full, "--dry-run", "--device", "cpu"],
            "run --dry-run, full store", None,
        ),
    ]  # fmt: skip
    found = [Measured(what, shown, goal, []) for what, _, shown, goal in commands]
    for number in range(rounds):
        for measured, (_, words, shown, _) in zip(found, commands, strict=True):
            measured.uses.append(use := use_of([sys.executable, "-m", "smskd_bench.cli", *words]))
            say(f"round {number + 1}: {shown}: {use.wall_s:.1f} s, {use.peak_mib:.0f} MiB")
    return found


def use_of(command: Sequence[str]) -> Use:
    """Run a command to its end and ask the kernel what it took.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(
        [sys.executable, launcher.__file__, *command],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise RunError("a measured command failed", done.stderr[-LAST_CHARACTERS:].strip())
    return Use(**json.loads(done.stdout))
