"""The local executor: this process, one stage run after another."""

from __future__ import annotations

from smskd_bench.executors.ledger import Ledger, Summary
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.stage_run import run_one
from smskd_bench.plan import Plan
from smskd_bench.store import Store
from smskd_bench.worker import Worker


def execute(
    plan: Plan, store: Store, worker: Worker, observer: Observer, retry_failed: bool = False
) -> Summary:
    """Run everything in ``plan`` that is missing; one failure never stops the rest.

    Raises:
        SmskdError: the store or the data gave out; nothing else could go on either.
    """
    ledger = Ledger(plan, store, observer)
    for spec in plan.nodes.values():
        if not ledger.settle_unrun(spec):
            file = plan.weights.get(spec.key)
            ledger.settle(run_one(spec, store, worker, observer, file, retry_failed))
    return ledger.summary()
