"""The local executor: this process, one stage run after another."""

from __future__ import annotations

from collections.abc import Iterable

from smskd_bench.executors.jobs import JobQueue
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
    while (job := queue.take()) is not None:
        for outcome in run_job(job, store, worker, observer, given):
            ledger.settle(outcome)
    return ledger.summary()
