"""The Ray executor: the stage graph as Ray tasks on the nodes of a cluster.

A job is submitted when all it depends on is done, not earlier with object references as its
dependencies: what is blocked, busy elsewhere, or to begin again is then decided in one place, as
for every executor, and Ray never trains a parent again because the node that held its object died.
Ray does the rest: places, shares of GPUs, processes, and the news that one of them died.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from smskd.errors import RefusedError
from smskd_bench.executors.jobs import Job, JobQueue
from smskd_bench.executors.ledger import Ledger, Summary
from smskd_bench.executors.messages import Defect, Ended, Refused, Told, WorkerSetup
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.parcels import Parcel, pack, unpack
from smskd_bench.executors.pool_worker import GRACE_S
from smskd_bench.executors.ray_cluster import RayCluster, Share, new_token
from smskd_bench.executors.ray_task import (
    Assignment,
    Mail,
    NodeSetup,
    Report,
    carry_out,
    remove_node_store,
)
from smskd_bench.executors.settling import Books
from smskd_bench.plan import Plan
from smskd_bench.store import SPEC

TRIES = 4
"""A stage run whose worker or node died is begun so often in all: nodes come and go."""

LOOK_EVERY_S = 0.1
"""How long to wait for a task to end before looking for mail."""

MAIL_S = 10.0
"""How long to wait for mail that a task sent before it ended."""

AHEAD = 2
"""Tasks submitted beyond the free places, so that a cluster that can grow sees that it should."""

KEPT_INPUTS = 64
"""Finished stage runs that are kept as objects for nodes without the store."""


@dataclass(frozen=True)
class Spread:
    """How an execution is spread over a cluster.

    Attributes:
        share: What a stage run takes of a node.
        limit: Stage runs at once; None for as many as there is room for.
    """

    share: Share
    limit: int | None = None


def execute(
    plan: Plan,
    setup: WorkerSetup,
    cluster: RayCluster,
    spread: Spread,
    observer: Observer,
    retry_failed: bool = False,
    folds: Iterable[tuple[str, ...]] = (),
) -> Summary:
    """Run everything in ``plan`` that is missing on the nodes of a cluster.

    Raises:
        SmskdError: the nodes cannot do it, or the store or the data gave out.
    """
    ledger = Ledger(plan, setup.store, observer)
    books = Books(ledger, JobQueue(plan, ledger, folds), TRIES)
    token = new_token()
    with cluster.beacon(setup.store, token) as beacon:
        # Classes of plug-ins need not be picklable; the worker finds them by name.
        plain = replace(setup, options=replace(setup.options, methods={}))
        nodes = NodeSetup(plain, token, beacon, cluster.settings.node_store)
        with closing(Dispatch(plan, nodes, cluster, spread, books, retry_failed)) as dispatch:
            dispatch.run()
        if beacon is None:
            cluster.everywhere(remove_node_store, nodes)
    return ledger.summary()


class Mailbox:
    """An actor beside the driver, to which all tasks send their mail."""

    def __init__(self) -> None:
        self._mail: list[Mail] = []

    def put(self, mail: Mail) -> None:
        """Add a message."""
        self._mail.append(mail)

    def take(self) -> list[Mail]:
        """All that came since the last time."""
        mail, self._mail = self._mail, []
        return mail


@dataclass
class _Running:
    """A try that was submitted.

    Attributes:
        ref: Ray's promise of its report.
        job: What it carries out.
        alone: It has a GPU, or a node, for itself.
        holds: Its locks in the driver's store, if the node has a store of its own.
        node: Where it runs, as far as is known.
        heard: Messages so far.
        begun: Keys of what it has begun and not ended.
        held_news: Ends that are told when the results have been published.
    """

    ref: Any
    job: Job
    alone: bool
    holds: ExitStack
    node: str | None
    heard: int = 0
    begun: set[str] = field(default_factory=set)
    held_news: list[Told] = field(default_factory=list)


class Dispatch:
    """The tasks of one execution."""

    def __init__(
        self,
        plan: Plan,
        setup: NodeSetup,
        cluster: RayCluster,
        spread: Spread,
        books: Books,
        retry_failed: bool,
    ) -> None:
        ray = cluster.ray
        self.plan, self.cluster, self.spread, self.books = plan, cluster, spread, books
        self.store = setup.worker.store
        self.retry_failed = retry_failed
        self.fetches = setup.beacon is None
        self._ray = ray
        self._tables = {network for network, _ in setup.worker.options.tables}
        here = ray.get_runtime_context().get_node_id()
        actor = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox = actor.options(scheduling_strategy=cluster.on(here, soft=False)).remote()
        self._setup = ray.put(setup)
        # Deaths are counted here, and defects of ours are not tried again.
        self._task = ray.remote(max_retries=0, retry_exceptions=False)(carry_out)
        self._running: dict[int, _Running] = {}
        self._tickets = 0
        self._crowded: set[str] = set()  # first keys of jobs that ran out of memory beside others
        self._homes: dict[str, str] = {}  # where the table of a network was read last
        self._inputs: OrderedDict[str, Any] = OrderedDict()

    def run(self) -> None:
        """Submit and listen until nothing is left.

        Raises:
            SmskdError: a node met an error that stops the whole run, or the cluster is gone.
        """
        try:
            self._run()
        except self._ray.exceptions.RayError as error:
            raise RefusedError(
                f"the Ray cluster is gone: {' '.join(str(error).split())[:300]}",
                "start it again; the same command goes on from the last checkpoints",
            ) from None

    def _run(self) -> None:
        while self._hand_out():
            if not self._running:
                time.sleep(self.books.queue.seconds_to_wait() or 0.0)
                continue
            refs = {running.ref: ticket for ticket, running in self._running.items()}
            ready, _ = self._ray.wait(list(refs), timeout=LOOK_EVERY_S)
            self._read_mail()
            for ref in ready:
                self._end(refs[ref])

    def close(self) -> None:
        """Cancel what is under way: a training loop writes its checkpoint and ends."""
        with suppress(self._ray.exceptions.RayError):
            self._cancel()
        for running in self._running.values():
            running.holds.close()
        self._running = {}

    def _cancel(self) -> None:
        left = [running.ref for running in self._running.values()]
        for ref in left:
            self._ray.cancel(ref)
        until = time.monotonic() + GRACE_S
        while left and time.monotonic() < until:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=LOOK_EVERY_S)
        for ref in left:
            self._ray.cancel(ref, force=True)
        if self._running and self.fetches:
            for mail in self._ray.get(self._mailbox.take.remote(), timeout=GRACE_S):
                if isinstance(mail.content, Parcel) and mail.ticket in self._running:
                    unpack(self.store, mail.content)

    # Submitting.

    def _hand_out(self) -> bool:
        """Fill the free places; False when nothing is under way any more."""
        while len(self._running) < self._room() and (job := self.books.queue.take()) is not None:
            self._submit(job)
        if self._running:
            return True
        self.books.queue.announce()
        return self.books.queue.seconds_to_wait() is not None

    def _room(self) -> int:
        places = sum(node.places(self.spread.share) for node in self.cluster.nodes())
        return min(places + AHEAD, self.spread.limit or places + AHEAD)

    def _submit(self, job: Job) -> None:
        with ExitStack() as locks:
            # We look, not the node: one process that sees the lease of a dead machine stand still.
            if not all(locks.enter_context(self.store.try_lock(spec.key)) for spec in job):
                self.books.queue.defer(job)
                return
            holds = locks.pop_all()
        if not self.fetches:
            holds.close()
        alone = job[0].key in self._crowded
        node = None if alone else self._home(job)
        self._tickets += 1
        given = Assignment(
            job, self._tickets, self._shares_memory(alone), self.retry_failed,
            self._imports(job), self._begun(job),
        )  # fmt: skip
        inputs = [self._input(key) for key in self._wanted(job)] if self.fetches else []
        ref = self._task.options(**self._place(alone, node)).remote(
            self._setup, given, self._mailbox, *inputs
        )
        self._running[self._tickets] = _Running(ref, job, alone, holds, node)

    def _place(self, alone: bool, node: str | None) -> dict[str, Any]:
        """Ray's words for what a task takes, and where."""
        share = self.spread.share
        if alone and share.gpus:
            share = replace(share, gpus=1.0)
        elif alone:
            share = replace(share, cpus=max(node.cpus for node in self.cluster.nodes()))
        strategy = self.cluster.on(node, soft=True) if node else "DEFAULT"
        return {
            "num_cpus": share.cpus, "num_gpus": share.gpus, "scheduling_strategy": strategy,
        }  # fmt: skip

    def _shares_memory(self, alone: bool) -> bool:
        return not alone and (not self.spread.share.gpus or self.spread.share.gpus < 1)

    def _home(self, job: Job) -> str | None:
        """The node that has a table this job reads, if a place is free there.

        Asked to stay on a full node, Ray would let the job wait while other nodes idle.
        """
        nodes = {node.id: node for node in self.cluster.nodes()}
        busy = Counter(running.node for running in self._running.values())
        for key in self._tables_of(job):
            home = nodes.get(self._homes.get(key, ""))
            if home is not None and busy[home.id] < home.places(self.spread.share):
                return home.id
        return None

    def _tables_of(self, job: Job) -> list[str]:
        """Networks whose tables it reads, teachers first."""
        keys = dict.fromkeys(key for spec in job for key in spec.depends_on)
        return [key for key in keys if key in self._tables]

    def _imports(self, job: Job) -> dict[str, tuple[str, bytes]]:
        files = {s.key: self.plan.weights[s.key] for s in job if s.key in self.plan.weights}
        return {key: (file.suffix, file.read_bytes()) for key, file in files.items()}

    def _begun(self, job: Job) -> tuple[Parcel, ...]:
        """What is there of it, for a node that does not see it."""
        there = [s.key for s in job if (self.store.folder(s.key) / SPEC).exists()]
        return tuple(pack(self.store, key) for key in there) if self.fetches else ()

    def _wanted(self, job: Job) -> list[str]:
        return list(dict.fromkeys(key for spec in job for key in spec.depends_on))

    def _input(self, key: str) -> Any:
        """A finished stage run as an object; Ray brings it to a node once."""
        if key not in self._inputs:
            self._inputs[key] = self._ray.put(pack(self.store, key))
        self._inputs.move_to_end(key)
        while len(self._inputs) > KEPT_INPUTS:
            self._inputs.popitem(last=False)
        return self._inputs[key]

    # Listening.

    def _read_mail(self) -> None:
        for mail in self._ray.get(self._mailbox.take.remote()):
            running = self._running.get(mail.ticket)
            if running is not None:  # else of a try that was given up
                self._hear(running, mail)

    def _hear(self, running: _Running, mail: Mail) -> None:
        running.heard += 1
        running.node = mail.node
        self._homes |= dict.fromkeys(self._tables_of(running.job), mail.node)
        match mail.content:
            case Parcel() as parcel:
                unpack(self.store, parcel)
            case Told("end", _, (_, result, _)) as told if self.fetches and result is not None:
                running.held_news.append(told)
            case Told(what, key) as told:
                if what == "begin":
                    running.begun.add(key)
                elif what == "end":
                    running.begun.discard(key)
                self.books.tell(told)

    def _end(self, ticket: int) -> None:
        exceptions = self._ray.exceptions
        running = self._running[ticket]
        try:
            report: Report = self._ray.get(running.ref)
        except exceptions.RayTaskError as error:
            if not isinstance(error, exceptions.TaskCancelledError):
                raise RuntimeError(f"in a Ray worker:\n{error}") from None
            self._bury(ticket, "its worker process was told to end")
            return
        except exceptions.RayError as error:
            self._bury(ticket, _death(exceptions, error))
            return
        self._await_mail(running, report.mails)
        match report.answer:
            case Refused(message, hint):
                raise RefusedError(message, hint)
            case Defect(traceback):
                raise RuntimeError(f"in a Ray worker:\n{traceback}")
            case Ended() as ended:
                self._settle(ticket, ended, report.parcels)

    def _await_mail(self, running: _Running, sent: int) -> None:
        until = time.monotonic() + MAIL_S
        while running.heard < sent and time.monotonic() < until:
            self._read_mail()

    def _settle(self, ticket: int, ended: Ended, parcels: tuple[Parcel, ...]) -> None:
        running = self._running.pop(ticket)
        for parcel in parcels:
            unpack(self.store, parcel)
        running.holds.close()
        for told in running.held_news:
            self.books.tell(told)
        if short := self.books.settle(ended.outcomes):
            self._crowded |= {outcome.key for outcome in short}
            room = "a GPU" if self.spread.share.gpus else "a node"
            self.books.put_back(short, f"put back, to have {room} for itself")

    def _bury(self, ticket: int, reason: str) -> None:
        running = self._running.pop(ticket)
        running.holds.close()
        self.books.bury(running.job, running.begun, reason)


def _death(exceptions: Any, error: Exception) -> str:
    """How a task was lost, in words."""
    if isinstance(error, exceptions.NodeDiedError):
        return "its node died"
    if isinstance(error, exceptions.OutOfMemoryError):
        return "its node ran out of memory"
    return f"its worker process died, or its node did ({type(error).__name__})"
