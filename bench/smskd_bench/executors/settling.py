"""What a parent does with the answers of its workers, and with the deaths of some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from smskd_bench.executors.jobs import Job, JobQueue
from smskd_bench.executors.ledger import Ledger, Outcome
from smskd_bench.executors.messages import Told
from smskd_bench.executors.stage_run import write_failure
from smskd_bench.spec import StageSpec


class Books:
    """Ledger, queue and observers of one execution, kept in step.

    Args:
        ledger: What has become of every stage run.
        queue: What is to be handed out.
        tries: So often a stage run whose worker died is begun in all.
    """

    def __init__(self, ledger: Ledger, queue: JobQueue, tries: int) -> None:
        self.ledger = ledger
        self.queue = queue
        self.tries = tries
        self._nodes = ledger.plan.nodes
        self._store = ledger.store
        self._observer = ledger.observer
        self._deaths: Counter[str] = Counter()

    def tell(self, told: Told) -> None:
        """Pass on to the observers what a worker said."""
        getattr(self._observer, told.what)(self._nodes[told.key], *told.rest)

    def settle(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Enter what became of a job; returns those that were short of memory beside others."""
        for outcome in outcomes:
            if outcome.status not in ("put_back", "busy"):
                self.ledger.settle(outcome)
        if busy := [outcome.key for outcome in outcomes if outcome.status == "busy"]:
            self.queue.defer(tuple(self._nodes[key] for key in busy))
        return [outcome for outcome in outcomes if outcome.status == "put_back"]

    def put_back(self, short: Sequence[Outcome], room: str) -> None:
        """Let what was short of memory begin again, with more ``room``."""
        for outcome in short:
            text = f"out of memory beside others ({outcome.reason}): {room}"
            self._observer.put_back(self._nodes[outcome.key], text)
        self.queue.put_back(tuple(self._nodes[outcome.key] for outcome in short))

    def bury(self, job: Job, begun: Collection[str], reason: str) -> None:
        """A worker is dead: what it had in hand begins once more, or fails after so many tries.

        Args:
            job: What it had in hand.
            begun: Keys of what it had begun and not ended, as far as the observers were told.
            reason: How it died.
        """
        again: list[StageSpec] = []
        for spec in job:
            self._deaths[spec.key] += 1
            if self._store.is_done(spec.key):
                self._close(spec, begun)
            elif self._deaths[spec.key] < self.tries:
                self._observer.put_back(spec, f"{reason}; once more")
                again.append(spec)
            else:
                self._fail(spec, reason)
        if again:
            self.queue.put_back(tuple(again))

    def _close(self, spec: StageSpec, begun: Collection[str]) -> None:
        """The result was written; only the news of it died with the worker."""
        if spec.key in begun:
            self._observer.end(spec, "done", self._store.result(spec.key), "")
        self.ledger.settle(Outcome(spec.key, "done"))

    def _fail(self, spec: StageSpec, reason: str) -> None:
        if not self._store.is_running(spec.key):  # else another process has it by now
            self._store.begin(spec)
            write_failure(self._store, spec.key, "failed", reason)
        self.ledger.settle(Outcome(spec.key, "failed", reason))
        self._observer.end(spec, "failed", None, reason)
