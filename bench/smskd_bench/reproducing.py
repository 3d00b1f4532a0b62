"""Recorded stage runs trained again, in a store of their own and as far as can be as they were."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smskd.atomic import write_atomically
from smskd.errors import RefusedError, RunError, StoreError
from smskd_bench.agreement import Outputs
from smskd_bench.environment import device_name
from smskd_bench.executors.observing import Observer
from smskd_bench.executors.stage_run import Conditions, run_job
from smskd_bench.fast_paths import FastPaths
from smskd_bench.folds import fold_groups, folded_with
from smskd_bench.manner import LIVE, Manner, manner_of
from smskd_bench.plan import Plan
from smskd_bench.running import RunRequest, run_options
from smskd_bench.spec import DataSpec, StageSpec, key_of
from smskd_bench.stopping import StopRequest
from smskd_bench.store import INFERENCE, PREDICTIONS, RESULT, RETRAIN, SPEC, WEIGHTS, Record, Store
from smskd_bench.tables import TableKey, TablePlan, plan_tables
from smskd_bench.worker import RunOptions, Worker

RUN_AGAIN = "run the matrix again: it trains what is missing"


@dataclass(frozen=True)
class Job:
    """Stage runs that are trained together, as one network if there are several."""

    keys: tuple[str, ...]
    manner: Manner


def recorded(store: Store, plan: Plan, key: str, name: str) -> Outputs:
    """What a store holds of a finished stage run, checked against its own hashes.

    Raises:
        RefusedError: it is not trained yet.
        StoreError: it is damaged, or not that of its key.
    """
    record = store.result(key)
    if record is None:
        raise RefusedError(
            f"{plan.nodes[key].label} of {name} is not trained yet, so there is nothing to verify",
            f"smskd-bench run --matrix {plan.loaded.file} --only {name!r}",
        )
    place = store.folder(key) / RESULT
    if not isinstance(record.get("spec"), dict) or key_of(record["spec"]) != key:
        raise StoreError(f"{place} is damaged: its specification is not that of its key", RETRAIN)
    files = _hashes(store.folder(key))
    if files != record.get("files"):
        written = record.get("files")
        known = written if isinstance(written, dict) else {}
        wrong = [n for n in (*files, *known) if files.get(n) != known.get(n)]
        path = store.folder(key) / (wrong[0] if wrong else RESULT)
        raise StoreError(f"{path} is damaged: its SHA-256 is not that of its result", RETRAIN)
    manner_of(record)
    return Outputs(record, files, store.predictions(key))


def jobs_for(plan: Plan, store: Store, targets: Iterable[str], all_stages: bool) -> list[Job]:
    """What has to be trained to get the targets again.

    Args:
        plan: Of the whole matrix.
        store: With the records.
        targets: Keys of the stage runs to verify.
        all_stages: Train all that they build on again too, instead of taking it as recorded.

    Raises:
        RefusedError: something of it was never trained.
        StoreError: a record is damaged.
    """
    groups = folded_with(fold_groups(plan))
    jobs: dict[tuple[str, ...], Job] = {}
    waiting = list(targets)
    seen: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        job = _job(key, groups.get(key, (key,)), plan, store)
        jobs[job.keys] = job
        seen |= {*job.keys}
        if all_stages:
            waiting += (other for k in job.keys for other in plan.nodes[k].depends_on)
    return list(jobs.values())


class Reproduction:
    """Carries out jobs in ``scratch``, after what they build on was copied there.

    Args:
        plan: Of the whole matrix.
        store: With the records; only read.
        scratch: A store for nothing else.
        data_root: Folder with the data sets that are not embedded.
        observer: Told what happens.
        stop: Whether the process was told to stop.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        scratch: Store,
        data_root: Path | None,
        observer: Observer,
        stop: StopRequest,
    ) -> None:
        self.plan = plan
        self.store = store
        self.scratch = scratch
        self.observer = observer
        self.stop = stop
        self._labels: dict[DataSpec, torch.Tensor] = {}
        paths = FastPaths.choose(True)
        request = RunRequest(plan.loaded.file, store.root, data_root, paths=paths)
        self._plain = run_options(request, plan, "cpu")

    def carry_out(self, jobs: Iterable[Job]) -> None:
        """Train all jobs, each after what it builds on.

        Raises:
            RunError: one of them failed.
            SmskdError: data or a record are missing or damaged.
        """
        waiting = list(jobs)
        trained = {key for job in waiting for key in job.keys}
        below = {other for key in trained for other in self._depends(key)}
        for key in sorted(below - trained):
            self._take_over(key)
        while waiting:
            ready = next(j for j in waiting if not self._still(j, waiting))
            waiting.remove(ready)
            self._train(ready)

    def labels(self, spec: StageSpec) -> torch.Tensor:
        """Classes of the test images ``(N,)``."""
        if spec.dataset not in self._labels:
            data = Worker(self.scratch, self._plain).data(spec.dataset)
            self._labels[spec.dataset] = data.test.labels.cpu().long()
        return self._labels[spec.dataset]

    def outputs(self, key: str) -> Outputs:
        """What was trained."""
        record = self.scratch.result(key)
        assert record is not None
        return Outputs(record, _hashes(self.scratch.folder(key)), self.scratch.predictions(key))

    def _depends(self, key: str) -> tuple[str, ...]:
        return self.plan.nodes[key].depends_on

    def _still(self, job: Job, waiting: list[Job]) -> bool:
        """Whether a job waits for another one."""
        later = {key for other in waiting for key in other.keys}
        return any(k in later for key in job.keys for k in self._depends(key))

    def _take_over(self, key: str) -> None:
        """Copy a finished stage run from the store, its result last."""
        if self.scratch.is_done(key):
            return
        source, target = self.store.folder(key), self.scratch.folder(key)
        names = (SPEC, WEIGHTS, RESULT)
        if not all((source / name).exists() for name in names):
            label = self.plan.nodes[key].label
            raise RefusedError(f"{label}, on which it was built, is not in the store", RUN_AGAIN)
        self.store.weights(key)  # refuses what was damaged
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            _copy(source / name, target / name)

    def _train(self, job: Job) -> None:
        specs = [self.plan.nodes[key] for key in job.keys]
        worker = Worker(self.scratch, self._options(job, specs), self.stop)
        worker.shelf.note, worker.shelf.filling = self.observer.note, self.observer.filling
        given = Conditions(self.plan.weights, retry_failed=True)
        for outcome in run_job(specs, self.scratch, worker, self.observer, given):
            label = self.plan.nodes[outcome.key].label
            if outcome.status == "busy":
                raise StoreError(
                    f"another process trains {label} in {self.scratch.root}",
                    "choose another folder",
                )
            if outcome.status not in ("done", "cached"):
                raise RunError(f"{label}, trained again, is {outcome.status}: {outcome.reason}")

    def _options(self, job: Job, specs: list[StageSpec]) -> RunOptions:
        """The worker's options that repeat a manner."""
        manner = job.manner
        return replace(
            self._plain,
            device=_device(self.store.result(job.keys[0]) or {}),
            threads=manner.threads,
            teacher_table=manner.storage or "off",
            tables=_tables(self.plan, specs, manner),
            compile=manner.compiled,
            exact=False,
        )


def _job(key: str, group: tuple[str, ...], plan: Plan, store: Store) -> Job:
    """A stage run as it was trained: alone, or folded with others that are all still there."""
    record = store.result(key)
    if record is None:
        label = plan.nodes[key].label
        raise RefusedError(f"{label}, on which it was built, is not in the store", RUN_AGAIN)
    manner = manner_of(record)
    if manner.folded > 1:
        same = [
            k for k in group if _manner(store, k) == manner and _has_foundations(k, plan, store)
        ]
        if key in same and len(same) == manner.folded:
            return Job(tuple(same), manner)
    return Job((key,), manner)


def _manner(store: Store, key: str) -> Manner | None:
    record = store.result(key)
    return manner_of(record) if record else None


def _has_foundations(key: str, plan: Plan, store: Store) -> bool:
    below = plan.nodes[key].depends_on
    return all(store.is_done(k) and _has_foundations(k, plan, store) for k in below)


def _tables(plan: Plan, specs: list[StageSpec], manner: Manner) -> dict[TableKey, TablePlan]:
    """The tables that were read instead of running networks."""
    storage = manner.storage
    if storage is None:
        return {}
    possible = plan_tables(plan, storage)
    chosen: dict[TableKey, TablePlan] = {}
    for spec in specs:
        networks = [(key, manner.teacher) for key in spec.teachers]
        networks += [(spec.parent, manner.reference)] if spec.parent else []
        for key, source in networks:
            place = key, spec.training.precision
            table = possible.get(place)
            # Of several teachers some may have been live: those that the plan does not look up.
            if table and source not in ("", LIVE) and (table.pays or LIVE not in source):
                chosen[place] = table
    return chosen


def _device(record: Record) -> str:
    """The device here of the class that a record names; the CPU if there is none."""
    environment = record.get("environment") or {}
    wanted, processor = (
        environment.get("device"),
        (environment.get("machine") or {}).get("processor"),
    )
    if wanted is None or wanted == processor or not torch.cuda.is_available():
        return "cpu"
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return next((name for name in names if device_name(name) == wanted), names[0])


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a result, by name."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _files(folder)
    }


def _files(folder: Path) -> Iterator[str]:
    yield from (name for name in (WEIGHTS, PREDICTIONS, INFERENCE) if (folder / name).is_file())


def _copy(source: Path, target: Path) -> None:
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))
