"""What the parent and its worker processes say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smskd_bench.executors.jobs import Job
from smskd_bench.executors.ledger import Outcome
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process is built from.

    Attributes:
        store: Where it works.
        options: Of its :class:`Worker`; its methods are found again in the process.
        plugins: Names of the method plug-ins to load.
        threads: CPU threads it has; None leaves torch's default.
    """

    store: Store
    options: RunOptions
    plugins: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class Order:
    """A job for a worker.

    Attributes:
        job: The stage runs.
        workers: How many workers there may be while it runs; beside others it shares memory.
        weights: Files of imported weights, by key.
        retry_failed: Whether to try again what diverged or cannot work.
    """

    job: Job
    workers: int
    weights: Mapping[str, Path] = field(default_factory=dict)
    retry_failed: bool = False


@dataclass(frozen=True)
class Told:
    """A call for the observers: which one, of which stage run, with what else."""

    what: Literal["begin", "epoch", "end", "waiting", "skip", "put_back", "note", "filling"]
    key: str
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An order is carried out."""

    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Refused:
    """The store or the data gave out, for every stage run: an error of exit status 3."""

    message: str
    hint: str


@dataclass(frozen=True)
class Broken:
    """The device failed under the worker process, which ends."""

    reason: str


@dataclass(frozen=True)
class Defect:
    """An error that no stage run can be blamed for, as a traceback."""

    traceback: str


Answer = Told | Ended | Refused | Broken | Defect
