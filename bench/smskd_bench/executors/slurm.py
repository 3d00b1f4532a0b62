"""The SLURM executor: sends jobs while there is something to do, and listens to them.

The driver trains nothing. Each job works through whatever is ready, under the store's leases
(:mod:`slurm_worker`), so the driver need not say who does what: it only sees to it that there are
as many jobs as stage runs that are ready, up to a limit. A job that is pre-empted goes back into
the queue; one that dies is replaced. The store is the truth, the jobs' words are for the display.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from smskd.errors import RefusedError
from smskd_bench.executors.event_log import Event, EventReader
from smskd_bench.executors.jobs import Job, jobs_of
from smskd_bench.executors.ledger import Ledger, Outcome, Summary
from smskd_bench.executors.messages import WorkerSetup
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.slurm_queue import Options, SlurmQueue
from smskd_bench.executors.slurm_worker import Task, serve
from smskd_bench.executors.stage_run import STICKY, write_failure
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec

POLL_S = 0.3
"""How often the jobs' files are read."""

LOOK_S = 5.0
"""How often SLURM's queue and the results are looked at."""

GRACE_S = 1.5
"""How long a stopped run waits for its jobs to end; they save their state all the same."""

TIDY_S = 5.0
"""The same at the end of a run, when they have nothing left to do."""

TRIES = 2
"""A stage run whose job died is begun again so often in all: the second death is its own."""

SILENT = 3
"""So many jobs that end before they say a word are no accident."""

LONGEST_PAUSE_S = 60.0
"""Between jobs that find nothing to do, because other runs work on the same matrix."""


def execute(
    plan: Plan,
    setup: WorkerSetup,
    jobs: int,
    options: Options,
    observer: Observer,
    retry_failed: bool = False,
    folds: Iterable[tuple[str, ...]] = (),
) -> Summary:
    """Run everything in ``plan`` that is missing, in at most ``jobs`` jobs at once.

    Raises:
        SmskdError: jobs cannot be sent, or the store or the data gave out.
    """
    folder = setup.store.root.resolve() / "slurm" / secrets.token_hex(6)
    queue = SlurmQueue(folder / "jobs", plan.matrix.name, options)
    # Classes of plug-ins need not be picklable; the job finds them by name.
    setup = replace(setup, options=replace(setup.options, methods={}))
    task = Task(plan, setup, tuple(folds), folder / "news")
    with closing(Driver(task, queue, jobs, observer)) as driver:
        task.news.mkdir(parents=True)
        driver.settle_known(retry_failed)
        driver.run()
        summary = driver.ledger.summary()
    if not summary.failed and driver.all_gone:
        _remove(folder)
    return summary


@dataclass
class _Job:
    """A job in the queue, or running.

    Attributes:
        started: It has said so.
        busy: It has begun something.
        stopped: It was told to stop, and saved its state.
        hands: Stage runs that it has begun and not ended.
    """

    started: bool = False
    busy: bool = False
    stopped: bool = False
    hands: set[str] = field(default_factory=set)


@dataclass
class Driver:
    """Jobs and stage runs of one execution.

    Attributes:
        task: What each job is given.
        queue: Where they are sent.
        limit: Jobs at most.
        observer: Is told what the jobs say.
        all_gone: After :meth:`close`: whether no job is left.
    """

    task: Task
    queue: SlurmQueue
    limit: int
    observer: Observer
    all_gone: bool = False
    _jobs: dict[str, _Job] = field(default_factory=dict)
    _begun: dict[str, str] = field(default_factory=dict)  # stage run -> job
    _deaths: Counter[str] = field(default_factory=Counter)
    _silent: int = 0
    _pause_s: float = 0.0
    _send_after: float = 0.0

    def __post_init__(self) -> None:
        self.plan, self.store = self.task.plan, self.task.setup.store
        self.ledger = Ledger(self.plan, self.store, self.observer)
        self._reader = EventReader(self.task.news)
        self._left: list[Job] = jobs_of(self.plan, self.task.folds)

    def settle_known(self, retry_failed: bool) -> None:
        """Settle what is there; what failed and is to be tried again becomes missing."""
        for spec in self.plan.nodes.values():
            if self.ledger.settle_unrun(spec):
                continue
            failure = self.store.failure(spec.key)
            if failure and failure["status"] in STICKY and not retry_failed:
                self.observer.skip(spec, f"{failure['status']} before: {failure['reason']}")
                self.ledger.settle(Outcome(spec.key, failure["status"], failure["reason"]))
            elif failure:
                self.store.forget_failure(spec.key)

    def run(self) -> None:
        """Send and listen until nothing is left.

        Raises:
            SmskdError: a job met an error that stops the whole run, or none can be sent.
        """
        look_at = 0.0
        while ready := self._ready():
            self._send(ready)
            time.sleep(POLL_S)
            if time.monotonic() < look_at:
                self._hear()
                continue
            ids, over = self.queue.ids(), self._over(ready)
            self._hear()  # after looking: whatever is over by then has been said by then
            self._close_books(over)
            if ids is not None:
                self._bury(set(self._jobs) - ids)
            look_at = time.monotonic() + LOOK_S

    def close(self) -> None:
        """Cancel what still waits or runs; it saves its state."""
        done = not self._ready()
        self.all_gone = self.queue.cancel(TIDY_S if done else GRACE_S)

    def _ready(self) -> list[Job]:
        """What is not settled and can run now, as jobs; what is blocked is settled on the way."""
        ready: list[Job] = []
        for job in self._left:
            able = [spec for spec in job if self.ledger.is_ready(spec)]
            open_ = [s for s in able if not self.ledger.is_settled(s.key)]
            if still := tuple(s for s in open_ if not self.ledger.settle_blocked(s)):
                ready.append(still)
        settled = self.ledger.is_settled
        self._left = [job for job in self._left if not all(settled(s.key) for s in job)]
        return ready

    def _send(self, ready: list[Job]) -> None:
        lacking = min(self.limit, len(ready)) - len(self._jobs)
        if lacking > 0 and time.monotonic() >= self._send_after:
            sent = self.queue.submit(lacking, serve, self.task)
            self._jobs.update({job: _Job() for job in sent})

    def _hear(self) -> None:
        for event in self._reader.news():
            if event.key:
                self._hear_of_stage_run(event, self.plan.nodes[event.key])
            else:
                self._hear_of_job(event)

    def _hear_of_job(self, event: Event) -> None:
        job = self._jobs.setdefault(event.job, _Job())
        match event.what:
            case "start":
                job.started, job.stopped, self._silent = True, False, 0
            case "stopped":
                job.stopped = True
            case "left":
                self._drop(event.job)
            case "refused":
                raise RefusedError(*event.rest)
            case _:
                raise RuntimeError(f"in SLURM job {event.job}:\n{event.rest[0]}")

    def _hear_of_stage_run(self, event: Event, spec: StageSpec) -> None:
        if self.ledger.is_settled(spec.key):
            return
        if event.what == "begin":
            self._begin(event.job, spec)
        elif self._begun.get(spec.key) != event.job:
            return  # what others do is no news, and old news is none either
        elif event.what == "end":
            self._end(spec, *event.rest)
        else:
            if event.what == "put_back":
                del self._begun[spec.key]
                self._jobs[event.job].hands.discard(spec.key)
            getattr(self.observer, event.what)(spec, *event.rest)

    def _begin(self, job: str, spec: StageSpec) -> None:
        if spec.key in self._begun:
            self.observer.put_back(spec, f"its job was stopped; job {job} goes on with it")
        self._begun[spec.key] = job
        self._jobs.setdefault(job, _Job()).busy = True
        self._jobs[job].hands.add(spec.key)
        self._pause_s = 0.0
        self.observer.begin(spec)

    def _end(self, spec: StageSpec, status: str, reason: str) -> None:
        result = self.store.result(spec.key) if status == "done" else None
        if status == "done" and result is None:
            return  # a network file system is late; it is looked at again
        outcome = Outcome(spec.key, status, reason)  # type: ignore[arg-type]
        self.ledger.settle(outcome)
        self.observer.end(spec, outcome.status, result, reason)  # type: ignore[arg-type]

    def _over(self, ready: list[Job]) -> list[StageSpec]:
        """Stage runs that have a result or a failure, whether that was said or not."""
        store = self.store
        return [
            spec for job in ready for spec in job
            if store.is_done(spec.key) or store.failure(spec.key)
        ]  # fmt: skip

    def _close_books(self, over: list[StageSpec]) -> None:
        """Settle what is over and nobody said so: another run did it, or the news got lost."""
        for spec in over:
            failure = self.store.failure(spec.key)
            if self.ledger.is_settled(spec.key):
                continue
            if spec.key in self._begun and self.store.is_done(spec.key):
                self._end(spec, "done", "")
            elif self.store.is_done(spec.key):
                self.observer.skip(spec, "finished by another process")
                self.ledger.settle(Outcome(spec.key, "cached"))
            elif failure:
                self._end(spec, failure["status"], failure["reason"])

    def _bury(self, gone: set[str]) -> None:
        """Jobs that are no longer in the queue and did not say why."""
        for name in sorted(gone):
            job = self._jobs[name]
            if not job.started:
                self._silent += 1
                self._check_silence(name)
            for key in job.hands:
                if not self.ledger.is_settled(key):
                    self._try_again(name, job, self.plan.nodes[key])
            self._drop(name)

    def _check_silence(self, name: str) -> None:
        if self._silent >= SILENT:
            words = self.queue.last_words(name) or "nothing was written to its output"
            raise RefusedError(
                f"{self._silent} SLURM jobs ended before they began; the last of them: {words}",
                f"read the outputs in {self.queue.folder}; all nodes need the same Python, the "
                "same packages, and this folder",
            )

    def _try_again(self, name: str, job: _Job, spec: StageSpec) -> None:
        """See to a stage run that a job has left behind; another one may have it already."""
        taken = self._begun.get(spec.key) != name
        self._deaths[spec.key] += not job.stopped
        if taken:
            return
        del self._begun[spec.key]
        reason = f"its SLURM job died ({self.queue.last_words(name) or name})"
        if job.stopped:
            self.observer.put_back(spec, f"job {name} was stopped; another one goes on with it")
        elif self._deaths[spec.key] < TRIES:
            self.observer.put_back(spec, f"{reason}; once more")
        elif not self.store.is_running(spec.key):  # else somebody has it by now
            self.store.begin(spec)
            write_failure(self.store, spec.key, "failed", reason)
            self._end(spec, "failed", reason)

    def _drop(self, name: str) -> None:
        """Forget a job; if it found nothing to do, the next one is sent later."""
        job = self._jobs.pop(name)
        if not job.busy:
            self._pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))
            self._send_after = time.monotonic() + self._pause_s


def _remove(folder: Path) -> None:
    """Nothing in it is needed when all went well."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
