"""What runs on the nodes of a Ray cluster: one job, in a Ray worker process.

Ray keeps the process for the next job, so data and teachers stay in memory. A cancelled task hears
it as Ctrl-C: the training loop writes a checkpoint after its step and ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smskd.errors import RefusedError, SmskdError
from smskd.meter import Row
from smskd_bench.environment import package_versions
from smskd_bench.executors.device_failure import EXIT_STATUS, DeviceFailedError
from smskd_bench.executors.jobs import Job
from smskd_bench.executors.messages import Defect, Ended, Refused, Told, WorkerSetup
from smskd_bench.executors.parcels import Parcel, pack, unpack, unpack_all
from smskd_bench.executors.pool_worker import make_worker
from smskd_bench.executors.stage_run import Conditions, run_job
from smskd_bench.executors.telling import Teller
from smskd_bench.spec import StageSpec
from smskd_bench.stopping import Interrupted, StopRequest
from smskd_bench.store import Store
from smskd_bench.worker import Worker

SHIP_EVERY_S = 30.0
"""How often at most a node without the store sends its checkpoint: what its death can cost."""


@dataclass(frozen=True)
class NodeSetup:
    """What a worker on a node is built from.

    Attributes:
        worker: As for any worker process; its store is the driver's.
        token: Of this run.
        beacon: A file in the store that a node must see; None if nodes have stores of their own.
        node_store: Where nodes make these, if that was said.
    """

    worker: WorkerSetup
    token: str
    beacon: Path | None
    node_store: Path | None = None


@dataclass(frozen=True)
class Assignment:
    """One job for one try.

    Attributes:
        job: The stage runs.
        ticket: Of this try.
        shares_memory: Others may run beside it.
        retry_failed: Whether to try again what diverged or cannot work.
        imports: Contents of weights files, by key.
        begun: Checkpoints that are in the driver's store, for nodes that do not see it.
    """

    job: Job
    ticket: int
    shares_memory: bool
    retry_failed: bool
    imports: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    begun: tuple[Parcel, ...] = ()


@dataclass(frozen=True)
class Mail:
    """Something to hear from a try that goes on: for the observers, or a checkpoint."""

    ticket: int
    node: str
    content: Told | Parcel


@dataclass(frozen=True)
class Report:
    """How a try ended.

    Attributes:
        answer: What became of the job.
        mails: How many were sent before.
        parcels: Folders of the stage runs, from a node that does not see the store.
    """

    answer: Ended | Refused | Defect
    mails: int = 0
    parcels: tuple[Parcel, ...] = ()


def carry_out(setup: NodeSetup, given: Assignment, mailbox: Any, *inputs: Parcel) -> Report:
    """Carry out a job; ``inputs`` are what it depends on, for a node without the store."""
    post = _Post(given.ticket, mailbox)
    try:
        with StopRequest().on([signal.SIGINT, signal.SIGTERM]) as stop:
            return _carry_out(setup, given, post, inputs, stop)
    except DeviceFailedError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)  # Ray would give the next job to this process
    except SmskdError as error:
        return Report(Refused(f"on node {socket.gethostname()}: {error.message}", error.hint))
    except Exception:
        return Report(Defect(traceback.format_exc()))


def _carry_out(
    setup: NodeSetup,
    given: Assignment,
    post: _Post,
    inputs: tuple[Parcel, ...],
    stop: StopRequest,
) -> Report:
    worker = _worker(setup, stop)
    store = worker.store
    shipping = setup.beacon is None
    teller = _Shipping(post, store) if shipping else Teller(post.send)
    worker.shelf.note, worker.shelf.filling = teller.note, teller.filling
    unpack_all(store, inputs)
    _take_up(store, given.begun)
    with tempfile.TemporaryDirectory(prefix="smskd-") as folder:
        weights = _files(given.imports, Path(folder))
        conditions = Conditions(weights, given.retry_failed, given.shares_memory)
        try:
            outcomes = run_job(given.job, store, worker, teller, conditions)
        except Interrupted:
            if shipping:
                for spec in given.job:
                    post.send(pack(store, spec.key))
            raise
    known = [o.key for o in outcomes if o.status not in ("busy", "put_back")]
    parcels = tuple(pack(store, key) for key in known) if shipping else ()
    return Report(Ended(outcomes), post.sent, parcels)


class _Post:
    """Sends without waiting: Ray keeps the order of one sender."""

    def __init__(self, ticket: int, mailbox: Any) -> None:
        import ray

        self._ticket, self._mailbox = ticket, mailbox
        self._node: str = ray.get_runtime_context().get_node_id()
        self.sent = 0

    def send(self, content: Told | Parcel) -> None:
        """Send one message."""
        self.sent += 1
        self._mailbox.put.remote(Mail(self._ticket, self._node, content))


class _Shipping(Teller):
    """Sends checkpoints too, now and then."""

    def __init__(self, post: _Post, store: Store) -> None:
        super().__init__(post.send)
        self._post, self._store = post, store
        self._shipped: dict[str, float] = {}

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """An epoch is done, and its checkpoint is in this node's store."""
        super().epoch(spec, row)
        now = time.monotonic()
        if now - self._shipped.setdefault(spec.key, now) > SHIP_EVERY_S:
            self._shipped[spec.key] = now
            self._post.send(pack(self._store, spec.key))


_workers: dict[str, Worker] = {}
"""The worker of this process, by the token of its run."""


def _worker(setup: NodeSetup, stop: StopRequest) -> Worker:
    if setup.beacon is not None and not setup.beacon.exists():
        raise RefusedError(
            f"the store {setup.beacon.parent} is not visible",
            "put the store into a folder that all nodes share, or use --store-mode fetch",
        )
    if setup.worker.threads:
        torch.set_num_threads(setup.worker.threads)
    if setup.token not in _workers:
        _workers.clear()
        mine = setup.worker
        if setup.beacon is None:
            mine = replace(mine, store=Store.open(node_store(setup)))
        _workers[setup.token] = make_worker(mine, stop)
    worker = _workers[setup.token]
    worker.stop = stop
    return worker


def node_store(setup: NodeSetup) -> Path:
    """The folder in which this node works, if it does not see the store; made for us alone."""
    import ray

    base = setup.node_store or Path(tempfile.gettempdir())
    node = ray.get_runtime_context().get_node_id()
    folder = base / f"smskd-{setup.token}-{node[:12]}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(
            f"the folder {folder} cannot be made: {error.strerror}", "name another: --node-store"
        ) from None
    return folder


def remove_node_store(setup: NodeSetup) -> None:
    """Remove it at the end of a run."""
    shutil.rmtree(node_store(setup), ignore_errors=True)


def _take_up(store: Store, begun: tuple[Parcel, ...]) -> None:
    for parcel in begun:
        with store.try_lock(parcel.key) as ours:
            if ours:
                unpack(store, parcel)


def _files(imports: Mapping[str, tuple[str, bytes]], folder: Path) -> dict[str, Path]:
    """Weights files as files again, with the endings they had."""
    found: dict[str, Path] = {}
    for number, (key, (ending, content)) in enumerate(imports.items()):
        found[key] = folder / f"{number}{ending}"
        found[key].write_bytes(content)
    return found


@dataclass(frozen=True)
class Sighting:
    """What a node says of itself.

    Attributes:
        host: Its name.
        sees_store: Whether it sees the store's beacon, and can write beside it.
        versions: Of packages.
    """

    host: str
    sees_store: bool
    versions: Mapping[str, str | None]


def look(beacon: Path | None, token: str, answer: str) -> Sighting:
    """See whether the store is here, and leave an ``answer`` (a file name) beside its beacon."""
    sees = True
    if beacon is not None:
        try:
            sees = beacon.read_text(encoding="utf-8") == token
            if sees:
                beacon.with_name(answer).write_text(token, encoding="utf-8")
        except OSError:
            sees = False
    return Sighting(socket.gethostname(), sees, package_versions())
