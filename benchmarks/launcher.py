"""Runs one command and prints what it took as JSON: a small process with nothing else in it.

The kernel counts the memory of a program that starts another one as that one's, up to the moment it
is replaced, so that a large program cannot measure small ones by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

KIB = 1024.0


def main(command: list[str]) -> int:
    """Run it with nothing to read and its output on standard error; returns its exit status."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # it is waited for already
    cpu_s = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss / (KIB if sys.platform != "darwin" else KIB**2)
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mib": peak}))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
