"""``smskd-bench run``: plan, run what is missing, show the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from smskd.errors import ConfigError
from smskd.methods import METHODS, Method, load_plugins
from smskd.precision import check_precision
from smskd_bench.compatibility import check_plan
from smskd_bench.config import load_matrix
from smskd_bench.cost import network_cost
from smskd_bench.executors import local, pool
from smskd_bench.executors.device_failure import DeviceFailedError
from smskd_bench.executors.ledger import Summary, missing
from smskd_bench.executors.messages import WorkerSetup
from smskd_bench.executors.observing import Observers
from smskd_bench.executors.ray_settings import ExecutorKind, RaySettings, StoreMode
from smskd_bench.fast_paths import FastPaths
from smskd_bench.folds import FoldChoice, choose_folds
from smskd_bench.importing import check_imports
from smskd_bench.mirror import MirrorObserver
from smskd_bench.parallel import Parallelism, Wanted, choose_workers
from smskd_bench.plan import Plan, make_plan
from smskd_bench.progress import ProgressDisplay
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.report.tables import print_table
from smskd_bench.shortcuts import takes_shortcuts
from smskd_bench.speed import Workload
from smskd_bench.stopping import StopRequest
from smskd_bench.store import Store
from smskd_bench.table_shelf import TableChoice
from smskd_bench.tracking import TrackerKind, make_tracker
from smskd_bench.worker import RunOptions, Worker
from smskd_bench.worker_trial import measured_workers

TRACKING_PATIENCE_S = 20.0
"""How long the end of a run waits for the mirror; what is left stays on disk."""

PATIENCE_WHEN_STOPPED_S = 0.3
"""The same after Ctrl-C."""


@dataclass(frozen=True)
class RunRequest:
    """What the user asked for on the command line."""

    matrix: Path
    store: Path
    data_root: Path | None = None
    device: str = "auto"
    only: str | None = None
    tracking: TrackerKind = "wandb"
    project: str = "smskd-bench"
    retry_failed: bool = False
    download: bool = False
    threads: int | None = None
    paths: FastPaths = field(default_factory=FastPaths)
    executor: ExecutorKind = "local"
    slurm_jobs: int = 4
    slurm_option: tuple[str, ...] = ()
    ray: RaySettings | None = None


def request(
    exact: bool, teacher_table: TableChoice, fold_seeds: FoldChoice, compile: bool,
    workers: Wanted, executor: ExecutorKind = "local", address: str | None = None,
    gpus_per_stage_run: float | None = None, store_mode: StoreMode = "shared",
    node_store: Path | None = None, **options: Any,
) -> RunRequest:  # fmt: skip
    """A request from the command line's options.

    Raises:
        ConfigError: options that exclude each other.
    """
    paths = FastPaths.choose(
        exact, teacher_table=teacher_table, fold_seeds=fold_seeds, compile=compile, workers=workers
    )
    ray = RaySettings.choose(
        executor, address=address, gpus_per_stage_run=gpus_per_stage_run, store_mode=store_mode,
        node_store=node_store and node_store.absolute(),
    )  # fmt: skip
    return RunRequest(**options, paths=paths, executor=executor, ray=ray)


MakeWorker = Callable[[Store, RunOptions, StopRequest], Worker]


def run(
    request: RunRequest,
    console: Console,
    make_worker: MakeWorker = Worker,
    stop: StopRequest | None = None,
) -> int:
    """Run a matrix and print its table; returns the exit code.

    Args:
        request: What is asked for.
        console: Where it is shown.
        make_worker: Builds this process's own worker.
        stop: Hears when the run is to stop; default: a new one.

    Raises:
        SmskdError: it could not be started, or the store or data gave out.
    """
    plan = make_plan(load_matrix(request.matrix), request.only)
    store = Store.open(request.store)
    store.sweep(plan.nodes)
    summary = Summary(cached=list(plan.nodes))
    if missing(plan, store):

        def waiting() -> None:
            console.print("another process cleans up this store; waiting for it", soft_wrap=True)

        elsewhere = {"slurm": _train_on_slurm, "ray": _train_on_ray}
        train = elsewhere.get(request.executor) or partial(_train, make_worker)
        with store.in_use(plan.nodes, waiting):
            if left := missing(plan, store):
                summary = train(request, plan, store, left, console, stop or StopRequest())
    print_table(leaderboard_rows(plan, store), console)
    for line in _closing(plan, store, summary, request):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 4 if summary.failed else 0


def _train(
    make_worker: MakeWorker, request: RunRequest, plan: Plan, store: Store, left: list[str],
    console: Console, stop: StopRequest,
) -> Summary:  # fmt: skip
    device = choose_device(request.device)
    for precision in {plan.nodes[key].training.precision for key in left}:
        check_precision(precision, torch.device(device))
    check_imports(plan, left)
    check_plan(plan, left)
    measured = partial(_measured_workers, plan, left, device)
    spread = choose_workers(request.paths.workers, plan, left, device, request.threads, measured)
    options = run_options(request, plan, device)
    worker = _worker_here(store, options, spread, stop, make_worker)
    if any(not plan.nodes[key].imported for key in left):  # missing data is said before anything
        data = next(iter(plan.nodes.values())).dataset
        (worker or Worker(store, replace(options, device="cpu"))).data(data)
    folds = _folds(request, plan, store, left, device, spread, console)
    with _observed(request, plan, store, left, console, stop) as observer:
        retry, here = request.retry_failed, set[str]()
        if worker:
            worker.shelf.note, worker.shelf.filling = observer.note, observer.filling
            try:
                return local.execute(plan, store, worker, observer, retry, folds)
            except DeviceFailedError as error:
                if make_worker is not Worker:
                    raise  # its processes belong to whoever started them
                console.print(f"{error.message}; going on in another process", soft_wrap=True)
                here = set(left) - set(missing(plan, store))
        setup = WorkerSetup(store, options, plan.matrix.plugins, spread.threads)
        summary = pool.execute(plan, setup, spread.workers, observer, retry, folds)
        return summary.and_trained(here)


def _train_on_slurm(
    request: RunRequest, plan: Plan, store: Store, left: list[str], console: Console,
    stop: StopRequest,
) -> Summary:  # fmt: skip
    """Nothing is measured or trained here: the machine that sends jobs is not one that runs them.

    Raises:
        SmskdError: it could not be started, or the store or data gave out.
    """
    from smskd_bench.executors import slurm, slurm_queue  # its worker needs this module

    if request.paths.workers not in ("auto", 1):
        raise ConfigError("--workers is for this machine", "use --slurm-jobs N on a cluster")
    options = slurm_queue.parse_options(request.slurm_option)
    slurm_queue.check_installed()
    check_imports(plan, left)
    check_plan(plan, left)
    folds = choose_folds("on", plan, "cpu", store) if request.paths.fold_seeds == "on" else []
    worker = run_options(request, plan, request.device)
    setup = WorkerSetup(store, worker, plan.matrix.plugins, request.threads)
    with _observed(request, plan, store, left, console, stop) as observer:
        jobs, retry = request.slurm_jobs, request.retry_failed
        return slurm.execute(plan, setup, jobs, options, observer, retry, folds)


def _train_on_ray(
    request: RunRequest, plan: Plan, store: Store, left: list[str], console: Console,
    stop: StopRequest,
) -> Summary:  # fmt: skip
    """The same on the nodes of a cluster; what can be refused without one is refused first."""
    from smskd_bench.executors import ray_cluster, ray_executor

    check_imports(plan, left)
    check_plan(plan, left)
    store = Store.open(store.root.absolute())  # other processes have other working folders
    with ray_cluster.joined(request.ray or RaySettings()) as cluster:
        device = cluster.device(request.device)
        has_device = device == "cpu" or torch.cuda.is_available()  # a head node may have no GPU
        for precision in {plan.nodes[key].training.precision for key in left if has_device}:
            check_precision(precision, torch.device(device))
        threads = _threads_on_ray(request, plan, left, device)
        share = cluster.share(device, threads)
        places = sum(node.places(share) for node in cluster.nodes())
        folding = request if has_device else replace(request, paths=_unmeasured(request.paths))
        spread = Parallelism(places, threads)
        folds = _folds(folding, plan, store, left, device, spread, console)
        options = run_options(request, plan, device)
        options = replace(options, data_root=request.data_root and request.data_root.absolute())
        setup = WorkerSetup(store, options, plan.matrix.plugins, threads)
        wanted = request.paths.workers
        limit = wanted if wanted != "auto" and not request.paths.exact else None
        with _observed(request, plan, store, left, console, stop) as observer:
            return ray_executor.execute(
                plan, setup, cluster, ray_executor.Spread(share, limit), observer,
                request.retry_failed, folds,
            )  # fmt: skip


def _threads_on_ray(request: RunRequest, plan: Plan, left: list[str], device: str) -> int:
    """CPU threads of each stage run: on a CPU those of a run on this machine, for the same bits."""
    if request.threads:
        return request.threads
    if device == "cuda":
        return 1
    spread = choose_workers(request.paths.workers, plan, left, device)
    return spread.threads or torch.get_num_threads()


def _unmeasured(paths: FastPaths) -> FastPaths:
    """Without the device here, nothing can be measured on it."""
    return replace(paths, fold_seeds="off") if paths.fold_seeds == "auto" else paths


@contextmanager
def _observed(
    request: RunRequest, plan: Plan, store: Store, left: list[str], console: Console,
    stop: StopRequest,
) -> Iterator[Observers]:  # fmt: skip
    """Show and mirror what happens in this block, and hear when it is to stop."""
    tracker = make_tracker(request.tracking)
    try:
        with stop.on(), ProgressDisplay(console, plan, left) as display:
            yield Observers([display, MirrorObserver(tracker, plan, store, request.project)])
    finally:
        messages = (
            tracker.leave(PATIENCE_WHEN_STOPPED_S)
            if stop.asked
            else tracker.close(TRACKING_PATIENCE_S)
        )
        for message in messages:
            console.print(f"tracking: {message}", highlight=False, markup=False, soft_wrap=True)


def _folds(
    request: RunRequest, plan: Plan, store: Store, left: list[str], device: str,
    spread: Parallelism, console: Console,
) -> list[tuple[str, ...]]:  # fmt: skip
    """The groups of stage runs that are trained as one network."""

    def say(done: int, total: int, what: str) -> None:
        if done == 0:
            text = f"measuring whether folded seeds are faster: {total} short trials ..."
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    wanted, choice = set(left), request.paths.fold_seeds
    spread = replace(spread, threads=request.threads or spread.threads)
    return choose_folds(choice, plan, device, store, spread, say, wanted.__contains__)


def _measured_workers(plan: Plan, left: list[str], device: str) -> int:
    """The best number of workers for the stage run that trains the largest student."""
    students = [plan.nodes[key] for key in left if not plan.nodes[key].imported]
    if not students:
        return 1
    spec = max(students, key=lambda spec: network_cost(spec.model, spec.dataset.name).macs)
    work = Workload.of(spec, spec.model, "train", 1)
    return measured_workers(work, device).workers


def _worker_here(
    store: Store,
    options: RunOptions,
    spread: Parallelism,
    stop: StopRequest,
    make_worker: MakeWorker,
) -> Worker | None:
    """This process's own worker; none where worker processes do the work."""
    if spread.workers > 1:
        return None
    if spread.threads:
        torch.set_num_threads(spread.threads)
    return make_worker(store, options, stop)


def _not_exact(plan: Plan, store: Store) -> list[str]:
    """What --exact found in the store and did not make."""
    results = (store.result(key) or {} for key in plan.nodes)
    count = sum(takes_shortcuts(result.get("fast_paths", {})) for result in results)
    if not count:
        return []
    return [
        f"  {count} of these results were made before, with shortcuts",
        "  -> for results without any, use --exact with another --store",
    ]


def _closing(plan: Plan, store: Store, summary: Summary, request: RunRequest) -> list[str]:
    lines = [
        f"{len(summary.trained)} stage runs trained, {len(summary.cached)} already there, "
        f"{len(summary.failed)} failed; store: {request.store}"
    ]
    lines += [f"  {plan.nodes[key].label}: {why}" for key, why in summary.failed.items()]
    if request.paths.exact:
        lines += _not_exact(plan, store)
    if summary.failed:
        lines.append(
            "  -> the rest is complete; mend the cause, or add --retry-failed to try again"
        )
    return lines


def run_options(request: RunRequest, plan: Plan, device: str) -> RunOptions:
    """The worker's options for a request."""
    methods: dict[str, type[Method]] = {**METHODS, **load_plugins(plan.matrix.plugins)}
    return RunOptions(
        device=device,
        data_root=request.data_root,
        download=request.download,
        evaluate_every=plan.matrix.evaluate_every,
        threads=request.threads,
        methods=methods,
        teacher_table=request.paths.teacher_table,
        tables=request.paths.tables(plan, request.only),
        compile=request.paths.compile,
        exact=request.paths.exact,
    )


def choose_device(wanted: str) -> str:
    """Resolve "auto" to a GPU if there is one, and check what was named.

    Raises:
        ConfigError: there is no such device here.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    hint = "use auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"{wanted!r} is no device", hint) from None
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ConfigError(f"device {wanted!r} is not supported", hint)
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", "use --device cpu, or see: doctor")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {wanted}", f"there are {torch.cuda.device_count()} here")
    return wanted
