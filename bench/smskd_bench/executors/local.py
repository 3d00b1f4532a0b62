"""The local executor: this process, one stage run after another."""

from __future__ import annotations

import time
from collections.abc import Iterable

from smskd_bench.executors.jobs import Job, JobQueue
from smskd_bench.executors.ledger import Ledger, Summary
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.stage_run import Conditions, run_job
from smskd_bench.plan import Plan
from smskd_bench.store import Store
from smskd_bench.worker import Worker


def execute(
    plan: Plan,
    store: Store,
    worker: Worker,
    observer: Observer,
    retry_failed: bool = False,
    folds: Iterable[tuple[str, ...]] = (),
) -> Summary:
    """Run everything in ``plan`` that is missing; one failure never stops the rest.

    Raises:
        SmskdError: the store or the data gave out; nothing else could go on either.
    """
    ledger = Ledger(plan, store, observer)
    queue = JobQueue(plan, ledger, folds)
    given = Conditions(plan.weights, retry_failed)
    while True:
        worker.stop.check()
        if (job := queue.take()) is not None:
            carry_out(job, queue, ledger, worker, given)
        elif (seconds := queue.seconds_to_wait()) is not None:
            queue.announce()
            time.sleep(seconds)
        else:
            return ledger.summary()


def carry_out(job: Job, queue: JobQueue, ledger: Ledger, worker: Worker, given: Conditions) -> bool:
    """Run a job and note what became of it; False if another process has it."""
    outcomes = run_job(job, ledger.store, worker, ledger.observer, given)
    for outcome in outcomes:
        if outcome.status != "busy":
            ledger.settle(outcome)
    busy = {outcome.key for outcome in outcomes if outcome.status == "busy"}
    if busy:
        queue.defer(tuple(spec for spec in job if spec.key in busy))
    return not busy
