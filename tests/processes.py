"""Processes of one session, as the kernel lists them."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def of_session(leader):
    """Numbers of the living processes of a session, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def workers_of(leader):
    """Worker processes of a run, which are started by its spawn method."""
    found = []
    for number in of_session(leader):
        with suppress(OSError):
            command = Path(f"/proc/{number}/cmdline").read_bytes()
            if b"spawn_main" in command:
                found.append(number)
    return found


def kill_9(numbers):
    """Kill all of them at once, as far as they are there."""
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def orphans(leader, patience_s=15.0):
    """What is left of a session a while after its leader is gone."""
    end = time.monotonic() + patience_s
    while (left := of_session(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    return left
