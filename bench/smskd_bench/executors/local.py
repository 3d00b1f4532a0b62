"""The local executor: this process, one stage run after another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from smskd.errors import DivergedError, IncompatibleError, SmskdError, StoreError
from smskd.meter import Row
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record, Store
from smskd_bench.worker import Progress, Worker

Status = Literal["done", "diverged", "incompatible", "out_of_memory", "failed", "blocked"]

STICKY = ("diverged", "incompatible")
"""Trying these again gives the same; they are retried only when asked."""


class Observer(Protocol):
    """Is told what happens; progress displays and trackers are observers."""

    def begin(self, spec: StageSpec) -> None:
        """A stage run starts or goes on."""

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """An epoch is done and its checkpoint written."""

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """A stage run ended, well or not."""

    def waiting(self, spec: StageSpec) -> None:
        """Another process is training this stage run."""

    def skip(self, spec: StageSpec, reason: str) -> None:
        """A stage run that was missing is not run: it cannot, or another process finished it."""


@dataclass
class Summary:
    """What an execution did: keys by what became of them."""

    trained: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def missing(plan: Plan, store: Store) -> list[str]:
    """Keys of the plan without a result, in dependency order."""
    return [key for key in plan.nodes if not store.is_done(key)]


def execute(
    plan: Plan,
    store: Store,
    worker: Worker,
    observers: Iterable[Observer],
    retry_failed: bool = False,
) -> Summary:
    """Run everything in ``plan`` that is missing; one failure never stops the rest."""
    summary, watching = Summary(), list(observers)

    def refuse(spec: StageSpec, reason: str) -> None:
        summary.failed[spec.key] = reason
        for observer in watching:
            observer.skip(spec, reason)

    for key, spec in plan.nodes.items():
        if store.is_done(key):
            summary.cached.append(key)
            continue
        broken = next((k for k in spec.depends_on if k in summary.failed), None)
        if broken:
            refuse(spec, f"blocked: {plan.nodes[broken].label} {summary.failed[broken]}")
            continue
        file = plan.weights.get(key)
        status, reason = _run_one(spec, store, worker, watching, file, retry_failed)
        if status == "done":
            summary.trained.append(key)
        elif status == "cached":
            summary.cached.append(key)
        else:
            summary.failed[key] = f"{status}: {reason}"
    return summary


def _run_one(
    spec: StageSpec,
    store: Store,
    worker: Worker,
    watching: list[Observer],
    weights: Path | None,
    retry_failed: bool,
) -> tuple[Status | Literal["cached"], str]:
    """Run one stage run; returns what became of it, and why it failed."""

    def tell_waiting() -> None:
        for observer in watching:
            observer.waiting(spec)

    def tell_epoch(spec: StageSpec, row: Row) -> None:
        for observer in watching:
            observer.epoch(spec, row)

    with store.lock(spec.key, tell_waiting):
        # Looked at under the lock: somebody else may have settled it while we waited.
        if store.is_done(spec.key):
            for observer in watching:
                observer.skip(spec, "finished by another process")
            return "cached", ""
        failure = store.failure(spec.key)
        if failure and failure["status"] in STICKY and not retry_failed:
            for observer in watching:
                observer.skip(spec, f"{failure['status']} before: {failure['reason']}")
            return failure["status"], failure["reason"]
        store.forget_failure(spec.key)
        for observer in watching:
            observer.begin(spec)
        status, reason, result = _attempt(spec, worker, tell_epoch, weights)
        if status != "done":
            state = store.checkpoint(spec.key)
            store.fail(spec.key, status, reason, state["epoch"] if state else 0)
        for observer in watching:
            observer.end(spec, status, result, reason)
    return status, reason


def _attempt(
    spec: StageSpec, worker: Worker, tell_epoch: Progress, weights: Path | None
) -> tuple[Status, str, Record | None]:
    try:
        return "done", "", worker.run(spec, tell_epoch, weights)
    except DivergedError as error:
        return "diverged", error.message, None
    except IncompatibleError as error:
        return "incompatible", error.message, None
    except StoreError:
        raise  # the store is gone or full: nothing else can go on either
    except (torch.OutOfMemoryError, MemoryError) as error:
        return "out_of_memory", str(error).partition("\n")[0], None
    except SmskdError as error:
        if error.exit_code == 3:
            raise  # data missing or corrupt: the same for every stage run
        return "failed", error.message, None
    except Exception as error:  # a defect of one method must not take the matrix down
        # On a CPU torch reports memory that ran out as a plain RuntimeError.
        status: Status = "out_of_memory" if "DefaultCPUAllocator" in str(error) else "failed"
        return status, f"{type(error).__name__}: {' '.join(str(error).split())}", None
