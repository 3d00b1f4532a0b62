"""A measurement on this machine: the runner as a process beside this one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from smskd.errors import RefusedError
from smskd_export.child import Child
from smskd_export.manifest import RUNNER
from smskd_export.transport import Ended, Job, OnEvent


class LocalTransport:
    """Runs the runner here.

    Args:
        cache: Folder of the runner's lock and of what it keeps; None: the user's cache.
    """

    where = "this machine"

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache or cache_folder()

    def probe(self, job: Job, on_event: OnEvent) -> Ended:
        """Ask whether this machine can do the job."""
        bare = replace(job, test_set=None, test_set_id="")
        return self._run(bare, ["--probe"], on_event)

    def measure(self, job: Job, scratch: Path, on_event: OnEvent) -> tuple[Ended, Path]:
        """Do the job into a folder below ``scratch``."""
        out = scratch / "run"
        scratch.mkdir(parents=True, exist_ok=True)
        return self._run(job, ["--out", str(out.absolute())], on_event), out

    def resume(self, job: Job, scratch: Path, on_event: OnEvent) -> Path:
        """Nothing is ever left half-way on this machine.

        Raises:
            RefusedError: always.
        """
        raise RefusedError(
            "there is no link to this machine that could break, so nothing to resume",
            "measure without --resume, or name the device",
        )

    def forget(self, job: Job, on_event: OnEvent) -> None:
        """Nothing to do: the results were made in their place."""

    def _run(self, job: Job, words: list[str], on_event: OnEvent) -> Ended:
        ended = Ended()
        with self._start(job, words) as child:
            for line in child.lines():
                ended.take(line, on_event)
            ended.code = child.end()
            for line in child.complaints:
                ended.complain(line)
        return ended

    def _start(self, job: Job, words: list[str]) -> Child:
        bundle, python = job.bundle.absolute(), job.python or sys.executable
        command = [python, str(bundle / RUNNER), str(bundle), *words, "--stop-with-stdin"]
        command += ["--cache", str(self._cache), "--expect-id", job.bundle_id]
        if job.test_set is not None:
            command += ["--test-set", str(job.test_set.absolute())]
        try:
            return Child([*command, *job.options])
        except OSError as error:
            raise RefusedError(
                f"cannot start the Python interpreter {python}: {error.strerror}",
                "name one that is here: --python python3, or its full path",
            ) from error


def cache_folder() -> Path:
    """Where every device, so this machine too, keeps the runner's lock and its engines."""
    return Path.home() / ".cache" / "smskd-bench"
