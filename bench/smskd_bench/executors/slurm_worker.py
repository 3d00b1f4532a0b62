"""The body of a SLURM job: carries out whatever of the matrix is ready, until nothing is.

Any number of these work in one store at the same time; leases keep two of them from the same stage
run. A job that finds nothing to do leaves, and gives its processor or GPU back; the driver sends
others when there is work for them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smskd.errors import SmskdError
from smskd.methods import METHODS, load_plugins
from smskd.precision import check_precision
from smskd_bench.executors import local
from smskd_bench.executors.device_failure import EXIT_STATUS, DeviceFailedError
from smskd_bench.executors.event_log import ENDING, EventLog
from smskd_bench.executors.jobs import JobQueue
from smskd_bench.executors.ledger import Ledger, missing
from smskd_bench.executors.messages import WorkerSetup
from smskd_bench.executors.stage_run import ANY_FAILURE, Conditions
from smskd_bench.plan import Plan
from smskd_bench.running import choose_device
from smskd_bench.stopping import STOPPING, Interrupted, StopRequest
from smskd_bench.worker import Worker

WARNING = (signal.SIGUSR1, signal.SIGUSR2)
"""What SLURM sends before a job's time is up, or before another job takes its place."""

LINGER_S = 3.0
"""How long a job stays when all that is ready seems to be in other hands."""


@dataclass(frozen=True)
class Task:
    """What every job of a run is given.

    Attributes:
        plan: The whole matrix.
        setup: What a worker is built from; its device may be "auto", which is the job's own.
        folds: Keys of stage runs that are trained as one network.
        news: Folder for the jobs' files of events.
    """

    plan: Plan
    setup: WorkerSetup
    folds: tuple[tuple[str, ...], ...]
    news: Path


def serve(task: Task) -> None:
    """Work until nothing is ready, or the job is told to stop."""
    log = EventLog(task.news / f"{job_id()}{ENDING}")
    log.tell("start")
    try:
        with StopRequest(patient=True).on((*STOPPING, *WARNING)) as stop:
            _work(task, log, stop)
        log.tell("left")
    except DeviceFailedError as error:
        print(error, file=sys.stderr)  # its last words; the driver sends another job, once
        sys.exit(EXIT_STATUS)
    except SmskdError as error:
        log.tell("refused", "", error.message, error.hint)
    except Exception:
        log.tell("defect", "", traceback.format_exc())
    except Interrupted as told:
        log.tell("stopped")
        if told.number in WARNING:
            requeue()
        sys.exit(128 + told.number)


def job_id() -> str:
    """This job's name in the queue: that of an element of an array, or of a job alone."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue() -> None:
    """Put this job back into the queue; where that is not allowed, the driver sends another."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    subprocess.run(command, check=False, timeout=60)


def _work(task: Task, log: EventLog, stop: StopRequest) -> None:
    plan, worker = task.plan, _worker(task, stop)
    worker.shelf.note, worker.shelf.filling = log.note, log.filling
    ledger = Ledger(plan, worker.store, log)
    queue = JobQueue(plan, ledger, task.folds)
    given = Conditions(plan.weights, sticky=ANY_FAILURE)
    until = time.monotonic() + LINGER_S
    while True:
        stop.check()
        if (job := queue.take()) is not None:
            if local.carry_out(job, queue, ledger, worker, given):
                until = time.monotonic() + LINGER_S
        elif (seconds := queue.seconds_to_wait()) is None or time.monotonic() > until:
            return
        else:
            time.sleep(seconds)


def _worker(task: Task, stop: StopRequest) -> Worker:
    setup = task.setup
    device = choose_device(setup.options.device)
    left = missing(task.plan, setup.store)
    for precision in {task.plan.nodes[key].training.precision for key in left}:
        check_precision(precision, torch.device(device))
    if threads := setup.threads or int(os.environ.get("SLURM_CPUS_ON_NODE", 0)):
        torch.set_num_threads(threads)
    methods = {**METHODS, **load_plugins(setup.plugins)}
    return Worker(setup.store, replace(setup.options, device=device, methods=methods), stop)
