"""Commands as a user runs them: a process of their own, timed from its start to its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.interleave import Clock
from smskd.atomic import write_json
from smskd.errors import RunError

TIMES, LOG = "times.json", "log.txt"
LAST_CHARACTERS = 800
OWN_VARIABLES = "SMSKD_"
"""Settings of the user's shell would change what is measured."""


@dataclass(frozen=True)
class Timed:
    """How long a command took; ``cpu_s`` is the time of all processes it started."""

    wall_s: float
    cpu_s: float


def timed_run(command: Sequence[str], folder: Path, identity: str, clock: Clock) -> Timed:
    """Run a command that works in ``folder``, unless it has done so already.

    A command that was stopped begins again in an empty folder: half a run has no time.

    Args:
        command: Program and arguments.
        folder: Emptied before; then holds the output and the times.
        identity: What was asked for; another one makes the run a new one.
        clock: For wall and processor time.

    Raises:
        RunError: the command failed.
    """
    if (done := _finished(folder, identity)) is not None:
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wall, cpu = clock.wall(), clock.cpu()
    with (folder / LOG).open("w") as log:
        ended = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_variables(),
        )
    timed = Timed(clock.wall() - wall, clock.cpu() - cpu)
    if ended.returncode != 0:
        said = (folder / LOG).read_text(errors="replace")[-LAST_CHARACTERS:].strip()
        raise RunError(f"a measured command ended with status {ended.returncode}", said)
    write_json(folder / TIMES, {"identity": identity, **asdict(timed)})
    return timed


def _finished(folder: Path, identity: str) -> Timed | None:
    path = folder / TIMES
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Timed(found["wall_s"], found["cpu_s"]) if found["identity"] == identity else None


def _variables() -> dict[str, str]:
    return {name: v for name, v in os.environ.items() if not name.startswith(OWN_VARIABLES)}
