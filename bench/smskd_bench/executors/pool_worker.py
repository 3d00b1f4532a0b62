"""The body of a worker process: carries out orders until its parent has no more, or is gone."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

import torch

from smskd.errors import SmskdError
from smskd.methods import METHODS, load_plugins
from smskd_bench.executors.device_failure import DeviceFailedError
from smskd_bench.executors.messages import (
    Answer,
    Broken,
    Defect,
    Ended,
    Order,
    Refused,
    WorkerSetup,
)
from smskd_bench.executors.stage_run import Conditions, run_job
from smskd_bench.executors.telling import Teller
from smskd_bench.stopping import STEP_S, Interrupted, StopRequest
from smskd_bench.worker import Worker

GRACE_S = STEP_S + 0.4
"""How long a stage run that is told to stop may take to write its checkpoint and end."""


def serve(connection: Connection, setup: WorkerSetup) -> None:
    """Carry out orders from ``connection`` until it ends."""
    _end_as_the_parent_says()
    atexit.register(gc.freeze)  # as the command does
    if setup.threads:
        torch.set_num_threads(setup.threads)
    teller = _Teller(connection)
    try:
        with StopRequest().on([signal.SIGTERM]) as stop:
            _carry_out_orders(connection, setup, teller, stop)
    except DeviceFailedError as error:
        teller.answer(Broken(error.message))
    except SmskdError as error:
        teller.answer(Refused(error.message, error.hint))
    except Exception:
        teller.answer(Defect(traceback.format_exc()))
    except Interrupted as told:
        sys.exit(128 + told.number)


def _carry_out_orders(
    connection: Connection, setup: WorkerSetup, teller: _Teller, stop: StopRequest
) -> None:
    worker = make_worker(setup, stop)
    worker.shelf.note, worker.shelf.filling = teller.note, teller.filling
    while (order := _next_order(connection)) is not None:
        given = Conditions(order.weights, order.retry_failed, shares_memory=order.workers > 1)
        teller.answer(Ended(run_job(order.job, worker.store, worker, teller, given)))


def make_worker(setup: WorkerSetup, stop: StopRequest) -> Worker:
    """A worker of this process; its methods are found by their names."""
    methods = {**METHODS, **load_plugins(setup.plugins)}
    return Worker(setup.store, replace(setup.options, methods=methods), stop)


class _Teller(Teller):
    """Tells the parent."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(self.answer)
        self.connection = connection

    def answer(self, answer: Answer) -> None:
        try:
            self.connection.send(answer)
        except OSError:
            sys.exit(1)  # the parent is gone: no fault of the stage run, so no plain exception


def _next_order(connection: Connection) -> Order | None:
    try:
        order: Order = connection.recv()
    except (EOFError, OSError):
        return None
    return order


def _end_as_the_parent_says() -> None:
    """Leave Ctrl-C to the parent, and never outlive it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_watch_parent, name="watch-parent", daemon=True).start()


def _watch_parent() -> None:
    parent, main = parent_process(), threading.main_thread().ident
    if parent is None or main is None:
        return
    wait([parent.sentinel])
    signal.pthread_kill(main, signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
