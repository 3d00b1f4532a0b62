"""SLURM's queue as a run sees it: submit through submitit, list, cancel.

Only ``sbatch``, ``squeue``, ``scancel`` and ``scontrol`` are needed, no accounting.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from smskd.errors import ConfigError, RefusedError, did_you_mean

Options: TypeAlias = dict[str, str | bool]

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")

OURS = (
    "array", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output",
    "requeue", "no-requeue", "signal", "wrap",
)  # fmt: skip
"""Options of sbatch that a run sets itself."""

KNOWN = (
    "account", "clusters", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "exclude",
    "exclusive", "gpus", "gpus-per-node", "gpus-per-task", "gres", "licenses", "mem", "mem-per-cpu",
    "mem-per-gpu", "nice", "nodelist", "partition", "priority", "qos", "reservation", "time",
    "tmp",
)  # fmt: skip
"""Options people give, for suggestions; sbatch has more, and they are passed on."""

WARN_S = 90
"""How long before its end a job is told, so that it can save its state and queue again."""

ENDLESS = 1_000_000
"""Submitit's limit of requeues; how often a job is sent is the driver's affair."""


def parse_options(words: Iterable[str]) -> Options:
    """Options of sbatch from KEY=VALUE, or KEY alone for a flag.

    Raises:
        ConfigError: one is malformed, or is one of ours.
    """
    options: Options = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.strip().replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not value.isprintable():
            raise ConfigError(
                f"--slurm-option {word!r} is not KEY=VALUE",
                "e.g. --slurm-option partition=gpu --slurm-option gres=gpu:1",
            )
        if name in OURS:
            raise ConfigError(
                f"--slurm-option {name}: a run sets this itself",
                "use --slurm-jobs N for the number of jobs; " + did_you_mean(name, KNOWN),
            )
        options[name] = value if equals else True
    return options


def check_installed() -> None:
    """See that jobs can be submitted from here.

    Raises:
        RefusedError: submitit or a program of SLURM is missing.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise RefusedError(
            "--executor slurm needs submitit, which is not installed",
            "pip install 'smskd-bench[slurm]'",
        ) from None
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        raise RefusedError(
            f"--executor slurm needs SLURM's {', '.join(lacking)}, not found on the PATH",
            "run this on a login node of the cluster, or use --executor local",
        )


class SlurmQueue:
    """The jobs of one run, told apart from all others by their name.

    Args:
        folder: For submitit's files and the jobs' output; all nodes must see it.
        name: Of the matrix, for people who look at the queue.
        options: Of sbatch.
    """

    def __init__(self, folder: Path, name: str, options: Options) -> None:
        self.folder = folder
        self.options = options
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
        self.name = f"smskd-{plain}-{secrets.token_hex(4)}"

    def submit(self, count: int, function: Callable[[Any], None], argument: Any) -> list[str]:
        """Send an array of equal jobs and return their ids.

        Raises:
            RefusedError: sbatch says no.
        """
        import submitit

        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=ENDLESS)
        # submitit asks for 5 minutes by itself; without any time the partition's own limit holds.
        executor.update_parameters(
            job_name=self.name, time=None, signal_delay_s=WARN_S, wckey=None,
            additional_parameters={"requeue": True, **self.options},
        )  # fmt: skip
        try:
            jobs = executor.map_array(function, [argument] * count)
        except submitit.core.utils.FailedJobError as error:
            raise RefusedError(
                f"sbatch refused the jobs: {_last_line(str(error))}",
                "check --slurm-option; sinfo lists partitions and what they offer",
            ) from None
        return [str(job.job_id) for job in jobs]

    def ids(self) -> set[str] | None:
        """Ids of the jobs that wait or run; None if the queue cannot be asked now."""
        command = ("squeue", "--noheader", "--array", f"--name={self.name}", "--format=%i")
        found = _call(command)
        return None if found is None else set(found.split())

    def cancel(self, patience_s: float) -> bool:
        """Cancel them all and wait a while; whether all are gone."""
        _call(("scancel", "--quiet", f"--name={self.name}"))
        end = time.monotonic() + patience_s
        while (ids := self.ids()) != set():
            if ids is None or time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def last_words(self, job: str) -> str:
        """The last line a job wrote to its output, or ""."""
        files = sorted(self.folder.glob(f"{job}_*.err"))
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return next((_last_line(text) for text in texts if text.strip()), "")


def _call(command: Sequence[str]) -> str | None:
    """Output of one of SLURM's commands; None if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _last_line(text: str) -> str:
    """The last line; of what SLURM itself adds, errors only, and where there is nothing else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    errors = [line for line in lines if "error:" in line]
    return next(reversed(own or errors or lines), "")
