"""One stage run under its lock: look again, try, and write down what became of it."""

from __future__ import annotations

from pathlib import Path

import torch

from smskd.errors import DivergedError, IncompatibleError, SmskdError, StoreError
from smskd_bench.executors.ledger import Outcome
from smskd_bench.executors.observing import Observer, Status
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record, Store
from smskd_bench.worker import Progress, Worker

STICKY = ("diverged", "incompatible")
"""Trying these again gives the same; they are retried only when asked."""

OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Memory that ran out, where torch reports it as a plain RuntimeError."""


def run_one(
    spec: StageSpec,
    store: Store,
    worker: Worker,
    observer: Observer,
    weights: Path | None = None,
    retry_failed: bool = False,
    shares_memory: bool = False,
) -> Outcome:
    """Run one stage run, unless somebody settled it while we waited for its lock.

    Args:
        spec: What to do.
        store: Where it is locked and its failure is written.
        worker: Does it.
        observer: Is told of it.
        weights: File to import, if the specification says so.
        retry_failed: Try again what failed in a way that trying does not mend.
        shares_memory: Others run beside it. Memory that runs out is then no failure of this stage
            run: nothing is written, and the outcome is "put_back".

    Raises:
        SmskdError: the store or the data gave out, for every other stage run too.
    """
    with store.lock(spec.key, lambda: observer.waiting(spec)):
        if store.is_done(spec.key):
            observer.skip(spec, "finished by another process")
            return Outcome(spec.key, "cached")
        failure = store.failure(spec.key)
        if failure and failure["status"] in STICKY and not retry_failed:
            observer.skip(spec, f"{failure['status']} before: {failure['reason']}")
            return Outcome(spec.key, failure["status"], failure["reason"])
        store.forget_failure(spec.key)
        observer.begin(spec)
        status, reason, result = _attempt(spec, worker, observer.epoch, weights)
        if status == "out_of_memory" and shares_memory:
            return Outcome(spec.key, "put_back", reason)
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
    except StoreError:
        raise  # the store is gone or full: nothing else can go on either
    except (torch.OutOfMemoryError, MemoryError) as error:
        return "out_of_memory", str(error).partition("\n")[0], None
    except SmskdError as error:
        if error.exit_code == 3:
            raise  # data missing or corrupt: the same for every stage run
        return "failed", error.message, None
    except Exception as error:  # a defect of one method must not take the matrix down
        ran_out = any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
        status: Status = "out_of_memory" if ran_out else "failed"
        return status, f"{type(error).__name__}: {' '.join(str(error).split())}", None
