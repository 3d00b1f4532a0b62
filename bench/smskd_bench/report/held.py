"""What a store holds of a plan, read once: no result is opened twice for one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smskd_bench.collector import collector_paused
from smskd_bench.plan import Plan
from smskd_bench.report.evaluation_count import EvaluationCount, evaluations_of
from smskd_bench.report.exported import exported_keys
from smskd_bench.store import Record, Store

READ = ("test", "kept", "deployed")
"""Entries of a result that rows are made of."""

TOLD_EVERY = 100
"""Stage runs between two calls of who is told."""


@dataclass(frozen=True)
class Held:
    """What a store holds of a plan.

    Attributes:
        store: It.
        results: Of the stage runs that are done, without their histories.
        looks: How often each of these was evaluated on the test set.
        begun: Keys that have a folder.
        exported: Keys of which something was exported.
    """

    store: Store
    results: dict[str, Record]
    looks: dict[str, int]
    begun: set[str]
    exported: set[str]

    @property
    def test_set(self) -> EvaluationCount:
        """How often the test set was looked at."""
        counts = self.looks.values()
        return EvaluationCount(len(counts), sum(counts), max(counts, default=0))


def read_held(plan: Plan, store: Store, told: Callable[[int], None] | None = None) -> Held:
    """Read what rows need of every stage run of a plan.

    Args:
        plan: The matrix.
        store: Where its results are.
        told: Called now and then with the number of stage runs that were looked at.

    Raises:
        StoreError: a result cannot be read.
    """
    begun = store.folders()
    results: dict[str, Record] = {}
    looks: dict[str, int] = {}
    # Histories are most of a result, and many of them need more memory than there is.
    with collector_paused():
        for number, key in enumerate(plan.nodes):
            record = store.result(key) if key in begun else None
            if told is not None and number % TOLD_EVERY == 0:
                told(number)
            if record is not None:
                results[key] = {entry: record[entry] for entry in READ if entry in record}
                looks[key] = evaluations_of(record)
    return Held(store, results, looks, begun, exported_keys(store.root))
