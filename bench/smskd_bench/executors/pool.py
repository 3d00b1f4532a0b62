"""The pool executor: several stage runs at once on one device, each in a process of its own.

The parent trains nothing. It hands out jobs in plan order as their dependencies get done, and it
alone talks to the observers. Every worker has a pipe of its own, so one that is killed in the
middle of a word harms nobody.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

from smskd.errors import RefusedError
from smskd_bench.executors.jobs import JobQueue
from smskd_bench.executors.ledger import Ledger, Outcome, Summary
from smskd_bench.executors.messages import (
    Answer,
    Broken,
    Defect,
    Ended,
    Order,
    Refused,
    Told,
    WorkerSetup,
)
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.pool_worker import GRACE_S, serve
from smskd_bench.executors.settling import Books
from smskd_bench.plan import Plan

TRIES = 2
"""A stage run whose process died is begun again so often in all: the second death is its own."""


def execute(
    plan: Plan,
    setup: WorkerSetup,
    workers: int,
    observer: Observer,
    retry_failed: bool = False,
    folds: Iterable[tuple[str, ...]] = (),
) -> Summary:
    """Run everything in ``plan`` that is missing, at most ``workers`` jobs at once.

    Raises:
        SmskdError: the store or the data gave out; nothing else could go on either.
    """
    ledger = Ledger(plan, setup.store, observer)
    queue = JobQueue(plan, ledger, folds)
    books = Books(ledger, queue, TRIES)
    with closing(Pool(plan, setup, workers, books, retry_failed)) as pool:
        pool.run()
    return ledger.summary()


class Pool:
    """The worker processes of one execution, started when there is work for them."""

    def __init__(
        self,
        plan: Plan,
        setup: WorkerSetup,
        limit: int,
        books: Books,
        retry_failed: bool,
    ) -> None:
        self.plan = plan
        # Classes of plug-ins need not be picklable; the worker finds them by name.
        self.setup = replace(setup, options=replace(setup.options, methods={}))
        self.limit = limit
        self.books = books
        self.queue = books.queue
        self.retry_failed = retry_failed
        self._workers: list[_WorkerProcess] = []

    def run(self) -> None:
        """Hand out and listen until nothing is left.

        Raises:
            SmskdError: a worker met an error that stops the whole run.
        """
        while self._hand_out():
            connections = [worker.connection for worker in self._workers]
            heard = wait(connections, self.queue.seconds_to_wait())
            for worker in [w for w in self._workers if w.connection in heard]:
                self._listen(worker)

    def close(self) -> None:
        """Stop all workers; checkpoints stay."""
        for worker in self._workers:
            if worker.order is not None:
                worker.process.terminate()  # removes its unfinished files on the way out
        until = time.monotonic() + GRACE_S
        for worker in self._workers:
            worker.end(until - time.monotonic() if worker.order else 0.0)
        self._workers = []

    def _busy(self) -> int:
        return sum(worker.order is not None for worker in self._workers)

    def _hand_out(self) -> bool:
        """Fill the free places; False when nothing is under way any more."""
        while self._busy() < self.limit and (job := self.queue.take()) is not None:
            weights = {s.key: self.plan.weights[s.key] for s in job if s.key in self.plan.weights}
            order = Order(job, self.limit, weights, self.retry_failed)
            while not self._free_worker().hand(order):
                pass  # one that died while it was idle: the next is a new one
        for worker in [w for w in self._workers if w.order is None][: self._surplus()]:
            self._dismiss(worker)
        if self._busy():
            return True
        self.queue.announce()
        return self.queue.seconds_to_wait() is not None

    def _surplus(self) -> int:
        return max(0, len(self._workers) - self.limit)

    def _free_worker(self) -> _WorkerProcess:
        for worker in [w for w in self._workers if w.order is None]:
            if worker.process.is_alive():
                return worker
            self._dismiss(worker)
        try:
            self._workers.append(_WorkerProcess(self.setup))
        except OSError as error:
            raise RefusedError(
                f"a worker process cannot be started: {error.strerror or error}",
                "end other programs, or use --workers 1; nothing done is lost",
            ) from None
        return self._workers[-1]

    def _dismiss(self, worker: _WorkerProcess, patience_s: float = 0.0) -> None:
        self._workers.remove(worker)
        worker.end(patience_s)

    def _listen(self, worker: _WorkerProcess) -> None:
        match worker.hear():
            case Told(what, key) as told:
                worker.note(what, key)
                self.books.tell(told)
            case Ended(outcomes):
                self._settle(worker, outcomes)
            case Refused(message, hint):
                raise RefusedError(message, hint)
            case Broken(reason):
                self._bury(worker, reason)
            case Defect(traceback):
                raise RuntimeError(f"in a worker process:\n{traceback}")
            case None:
                self._bury(worker)

    def _settle(self, worker: _WorkerProcess, outcomes: tuple[Outcome, ...]) -> None:
        order = worker.free()
        short = self.books.settle(outcomes)
        if any(outcome.status in ("put_back", "out_of_memory") for outcome in outcomes):
            self._dismiss(worker)  # a new process has all of its memory
        if short:
            # Others of the same number may run out too: that is one shortage, not several.
            self.limit = min(self.limit, max(1, order.workers // 2))
            room = f"put back, to run with no more than {_stage_runs(self.limit)} at once"
            self.books.put_back(short, room)

    def _bury(self, worker: _WorkerProcess, reason: str = "") -> None:
        """A worker process is dead: what it had in hand begins once more, then fails."""
        self._dismiss(worker, GRACE_S)  # to learn how it ended
        if worker.order is None:
            return
        reason = reason or f"its worker process died ({_death(worker.process.exitcode)})"
        self.books.bury(worker.order.job, worker.begun, reason)


class _WorkerProcess:
    """A worker process as its parent sees it.

    Attributes:
        order: What it is doing; None while it is idle.
        begun: Stage runs of that order that it has begun and not ended.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.connection = ours
        self.order: Order | None = None
        self.begun: set[str] = set()
        self.process = context.Process(target=serve, args=(theirs, setup), daemon=True)
        with theirs, _interrupts_held():
            self.process.start()

    def hand(self, order: Order) -> bool:
        """Give it an order; False if it is no longer there."""
        try:
            self.connection.send(order)
        except OSError:
            return False
        self.order = order
        return True

    def hear(self) -> Answer | None:
        """Its next answer; None if it is dead."""
        try:
            answer: Answer = self.connection.recv()
        except (EOFError, OSError):
            return None
        return answer

    def note(self, what: str, key: str) -> None:
        """Keep track of what it has begun."""
        if what == "begin":
            self.begun.add(key)
        elif what == "end":
            self.begun.discard(key)

    def free(self) -> Order:
        """Take its order away, which is carried out."""
        order, self.order = self.order, None
        assert order is not None
        self.begun.clear()
        return order

    def end(self, patience_s: float) -> None:
        """Give it so long to end, then kill it, which does an idle one no harm."""
        self.connection.close()
        self.process.join(max(0.0, patience_s))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes in which Ctrl-C is held back until they have said that they ignore it."""
    resource_tracker.ensure_running()  # starting it would end the hold
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(code: int | None) -> str:
    """How a process ended, in words; statuses above 128 stand for signals."""
    code = code or 0
    number = -code if code < 0 else code - 128
    return f"signal {number}" if number > 0 else f"exit status {code}"


def _stage_runs(count: int) -> str:
    return "1 stage run" if count == 1 else f"{count} stage runs"
