"""A job under its locks: look again, try, and write down what became of each stage run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from smskd.errors import DivergedError, IncompatibleError, RefusedError, SmskdError, StoreError
from smskd_bench.executors.device_failure import (
    device_failed,
    is_device_failure,
)
from smskd_bench.executors.ledger import Outcome
from smskd_bench.executors.observing import Observer, Status
from smskd_bench.leases import LeaseLostError
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record, Store
from smskd_bench.worker import Progress, Worker

STICKY = ("diverged", "incompatible")
"""Trying these again gives the same; they are retried only when asked."""

ANY_FAILURE = (*STICKY, "out_of_memory", "failed")
"""Where several processes share a matrix, none tries again what another one has just tried."""

OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Memory that ran out, where torch reports it as a plain RuntimeError."""


@dataclass(frozen=True)
class Conditions:
    """How a worker carries out what it is given.

    Attributes:
        weights: Files of imported weights, by key.
        retry_failed: Try again what failed in a way that trying does not mend.
        shares_memory: Others run beside it. Memory that runs out is then no failure of a stage
            run: nothing is written, and the outcome is "put_back".
        sticky: Statuses in the store that are not tried again.
    """

    weights: Mapping[str, Path] = field(default_factory=dict)
    retry_failed: bool = False
    shares_memory: bool = False
    sticky: Collection[str] = STICKY


def run_job(
    job: Sequence[StageSpec],
    store: Store,
    worker: Worker,
    observer: Observer,
    given: Conditions,
) -> tuple[Outcome, ...]:
    """Run the stage runs of a job, as one network if there are several.

    If another process holds one of them, nothing is run and all outcomes are "busy".

    Raises:
        DeviceFailedError: this process can compute nothing more; another one may.
        SmskdError: the store or the data gave out, for every other stage run too.
    """
    with ExitStack() as locks:
        for spec in job:
            if not locks.enter_context(store.try_lock(spec.key)):
                return tuple(Outcome(spec.key, "busy") for spec in job)
        outcomes: dict[str, Outcome] = {}
        for spec in job:
            if (outcome := _settled(spec, store, observer, given)) is not None:
                outcomes[spec.key] = outcome
        left = [spec for spec in job if spec.key not in outcomes]
        for spec in left:
            store.forget_failure(spec.key)
            observer.begin(spec)
        if len(left) > 1:
            outcomes |= _run_folded(left, store, worker, observer)
        for spec in left:
            if spec.key not in outcomes:
                outcomes[spec.key] = _run_one(spec, store, worker, observer, given)
    return tuple(outcomes[spec.key] for spec in job)


def _settled(
    spec: StageSpec, store: Store, observer: Observer, given: Conditions
) -> Outcome | None:
    """Looked at under the lock: somebody may have settled it while we waited."""
    if store.is_done(spec.key):
        observer.skip(spec, "finished by another process")
        return Outcome(spec.key, "cached")
    failure = store.failure(spec.key)
    if failure and failure["status"] in given.sticky and not given.retry_failed:
        observer.skip(spec, f"{failure['status']} before: {failure['reason']}")
        return Outcome(spec.key, failure["status"], failure["reason"])
    return None


def _run_folded(
    specs: Sequence[StageSpec], store: Store, worker: Worker, observer: Observer
) -> dict[str, Outcome]:
    """Train several as one network; whatever goes wrong, each goes on alone from where it is."""
    try:
        worker.run_together(specs, observer.epoch)
    except RefusedError as error:
        if not isinstance(error, IncompatibleError):
            raise
        reason = error.message
    except Exception as error:
        if not _ran_out(error) and is_device_failure(error):
            raise device_failed(error) from error
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        reason = ""
    done = [spec for spec in specs if store.is_done(spec.key)]
    for spec in done:
        observer.end(spec, "done", store.result(spec.key), "")
    if reason:
        observer.note(specs[0], f"its seeds go on one by one, not as one network: {reason}")
    return {spec.key: Outcome(spec.key, "done") for spec in done}


def _run_one(
    spec: StageSpec, store: Store, worker: Worker, observer: Observer, given: Conditions
) -> Outcome:
    weights = given.weights.get(spec.key)
    try:
        status, reason, result = _attempt(spec, worker, observer.epoch, weights)
        if status == "out_of_memory" and given.shares_memory:
            return Outcome(spec.key, "put_back", reason)
        if status == "out_of_memory" and worker.save_memory():
            observer.note(spec, f"out of memory ({reason}); once more, with less")
            status, reason, result = _attempt(spec, worker, observer.epoch, weights)
    except LeaseLostError as error:
        observer.put_back(spec, str(error))
        return Outcome(spec.key, "busy")
    if status != "done":
        write_failure(store, spec.key, status, reason)
    observer.end(spec, status, result, reason)
    return Outcome(spec.key, status, reason)


def write_failure(store: Store, key: str, status: Status, reason: str) -> None:
    """Write why a stage run ended without a result, with the epochs that its checkpoint holds."""
    state = store.checkpoint(key)
    store.fail(key, status, reason, state["epoch"] if state else 0)


def _attempt(
    spec: StageSpec, worker: Worker, tell_epoch: Progress, weights: Path | None
) -> tuple[Status, str, Record | None]:
    try:
        return "done", "", worker.run(spec, tell_epoch, weights)
    except DivergedError as error:
        return "diverged", error.message, None
    except IncompatibleError as error:
        return "incompatible", error.message, None
    except LeaseLostError:
        raise  # no failure: somebody else trains it
    except StoreError:
        raise  # the store is gone or full: nothing else can go on either
    except SmskdError as error:
        if error.exit_code == 3:
            raise  # data missing or corrupt: the same for every stage run
        return "failed", error.message, None
    except Exception as error:  # a defect of one method must not take the matrix down
        if _ran_out(error):
            return "out_of_memory", " ".join(str(error).partition("\n")[0].split()), None
        if is_device_failure(error):
            raise device_failed(error) from error
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}", None


def _ran_out(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
