"""The body of a worker process: carries out orders until its parent has no more, or is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from types import FrameType

import torch

from smskd.errors import SmskdError
from smskd.meter import Row
from smskd.methods import METHODS, load_plugins
from smskd_bench.executors.messages import Answer, Defect, Ended, Order, Refused, Told, WorkerSetup
from smskd_bench.executors.observing import Status
from smskd_bench.executors.stage_run import Conditions, run_job
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record
from smskd_bench.worker import Worker

GRACE_S = 5.0
"""How long a stage run that is told to stop may take to leave its files in order."""


def serve(connection: Connection, setup: WorkerSetup) -> None:
    """Carry out orders from ``connection`` until it ends."""
    _end_as_the_parent_says()
    if setup.threads:
        torch.set_num_threads(setup.threads)
    teller = _Teller(connection)
    try:
        methods = {**METHODS, **load_plugins(setup.plugins)}
        worker = Worker(setup.store, replace(setup.options, methods=methods))
        worker.shelf.note, worker.shelf.filling = teller.note, teller.filling
        while (order := _next_order(connection)) is not None:
            given = Conditions(order.weights, order.retry_failed, shares_memory=order.workers > 1)
            teller.answer(Ended(run_job(order.job, worker.store, worker, teller, given)))
    except SmskdError as error:
        teller.answer(Refused(error.message, error.hint))
    except Exception:
        teller.answer(Defect(traceback.format_exc()))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to put in order any more


class _Teller:
    """Passes on to the parent what its observers are to be told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def answer(self, answer: Answer) -> None:
        try:
            self.connection.send(answer)
        except OSError:
            sys.exit(1)  # the parent is gone: no fault of the stage run, so no plain exception

    def begin(self, spec: StageSpec) -> None:
        self.answer(Told("begin", spec.key))

    def epoch(self, spec: StageSpec, row: Row) -> None:
        self.answer(Told("epoch", spec.key, (row,)))

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        self.answer(Told("end", spec.key, (status, result, reason)))

    def waiting(self, spec: StageSpec) -> None:
        self.answer(Told("waiting", spec.key))

    def skip(self, spec: StageSpec, reason: str) -> None:
        self.answer(Told("skip", spec.key, (reason,)))

    def put_back(self, spec: StageSpec, reason: str) -> None:
        self.answer(Told("put_back", spec.key, (reason,)))

    def note(self, spec: StageSpec, text: str) -> None:
        self.answer(Told("note", spec.key, (text,)))

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        self.answer(Told("filling", spec.key, (done, total)))


def _next_order(connection: Connection) -> Order | None:
    try:
        order: Order = connection.recv()
    except (EOFError, OSError):
        return None
    return order


def _end_as_the_parent_says() -> None:
    """Leave Ctrl-C to the parent, stop in good order when it says so, and never outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _unwind)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_watch_parent, name="watch-parent", daemon=True).start()


def _unwind(number: int, frame: FrameType | None) -> None:
    """Stop where we are; unfinished files are removed on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _watch_parent() -> None:
    parent, main = parent_process(), threading.main_thread().ident
    if parent is None or main is None:
        return
    wait([parent.sentinel])
    signal.pthread_kill(main, signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
