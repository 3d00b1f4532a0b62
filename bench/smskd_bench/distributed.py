"""``torchrun ... -m smskd_bench.distributed``: several processes on one stage run at a time.

For cells too large for one device. Rank 0 is an ordinary ``run``: it plans, holds the leases,
writes the store and shows the progress. Before each stage run it tells the others which one, and
they do the same on their part of every batch (:mod:`smskd.sharded`), with a store that writes
nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from smskd.datasets import dataset_info
from smskd.errors import RefusedError, SmskdError
from smskd.methods import METHODS
from smskd.methods.objective import why_not_shared
from smskd.models import build_model
from smskd.ranks import Ranks
from smskd.seeding import seeded
from smskd.sharded import DROPOUT, Sharded, has_dropout
from smskd.train import Group, Pause, StageRun
from smskd_bench import cli, running
from smskd_bench.config import load_matrix
from smskd_bench.fast_paths import FastPaths
from smskd_bench.plan import Plan, make_plan
from smskd_bench.running import RunRequest
from smskd_bench.spec import StageSpec
from smskd_bench.stopping import Interrupted, StopRequest
from smskd_bench.store import Place, Record, Store
from smskd_bench.terminal import Terminal
from smskd_bench.worker import Begun, Progress, RunOptions, Worker, stage_of

PATHS = FastPaths(teacher_table="off", fold_seeds="off", workers=1)
"""Shortcuts that several processes take: none."""


PATIENCE = timedelta(days=7)
"""How long the others wait for rank 0, which may wait for a stage run that another run has."""


class AgreedPause:
    """A pause that all processes take after the same step, whoever asked for it."""

    def __init__(self, own: Pause, ranks: Ranks, stop: StopRequest) -> None:
        self._own, self._ranks, self._stop = own, ranks, stop
        self._ends = False

    def due(self) -> bool:
        """Asked after every step, by all."""
        due, self._ends = self._ranks.any(self._own.due(), self._stop.asked)
        return due

    def take(self, runs: Sequence[StageRun]) -> None:
        """Save; then end, if some process was told to.

        Raises:
            Interrupted: one was.
        """
        self._own.take(runs)
        if self._ends:
            raise Interrupted


class ShardedWorker(Worker):
    """A worker that trains its part of a stage run; the lead tells the others which one."""

    def __init__(self, store: Store, options: RunOptions, stop: StopRequest, ranks: Ranks) -> None:
        super().__init__(store, options, stop)
        self.ranks = ranks

    def run_together(self, specs: Sequence[StageSpec], progress: Progress) -> list[Record]:
        """See :class:`Worker`; all processes must call it for the same stage run."""
        if self.ranks.rank == 0:
            tell([spec.key for spec in specs])
        return super().run_together(specs, progress)

    def _begin(self, spec: StageSpec, place: Place | None = None, sharing: int = 1) -> Begun:
        begun = super()._begin(spec, place, sharing)
        begun.session["processes"] = self.ranks.size
        return begun

    def group(self, run: StageRun) -> Group:
        """The stage run, divided."""
        return Sharded(run, self.ranks)

    def pause(self, own: Pause) -> Pause:
        """One that all agree on."""
        return AgreedPause(own, self.ranks, self.stop)


class Replica(Store):
    """A store that is read as it is, and written by another process."""

    def begin(self, spec: StageSpec) -> Path:
        """The folder; rank 0 makes it."""
        return self.folder(spec.key)

    def save_checkpoint(self, key: str, state: Record) -> None:
        """Rank 0 does."""

    def go_back(self, key: str, place: Place) -> None:
        """Rank 0 does."""

    def complete(self, *of_a_stage_run: Any, **more: Any) -> None:
        """Rank 0 does."""


def tell(keys: list[str] | None) -> None:
    """Rank 0 says what comes next; None: nothing."""
    dist.broadcast_object_list([keys], src=0)


def heard() -> list[str] | None:
    """What rank 0 says comes next."""
    said: list[Any] = [None]
    dist.broadcast_object_list(said, src=0)
    keys: list[str] | None = said[0]
    return keys


def follow(request: RunRequest, plan: Plan, ranks: Ranks) -> int:
    """Do what rank 0 says until it has no more."""
    store = Replica(request.store)
    options = running.run_options(request, plan, request.device)
    with StopRequest(patient=True).on() as stop:
        worker = ShardedWorker(store, options, stop, ranks)
        while (keys := heard()) is not None:
            with suppress(SmskdError):  # rank 0 meets the same and writes it down
                worker.run_together([plan.nodes[key] for key in keys], lambda spec, row: None)
    return 0


def lead(request: RunRequest, ranks: Ranks) -> int:
    """An ordinary run, with the others' help."""

    def make_worker(store: Store, options: RunOptions, stop: StopRequest) -> Worker:
        return ShardedWorker(store, options, stop, ranks)

    code = running.run(request, Terminal(), make_worker, StopRequest(patient=True))
    tell(None)
    return code


def check_divisible(plan: Plan, processes: int) -> None:
    """Refuse stage runs that cannot be divided, before any is trained.

    Raises:
        RefusedError: with which, and why.
    """
    for spec in plan.nodes.values():
        reason = None if spec.imported else why_not_divisible(spec, processes)
        if reason is not None:
            raise RefusedError(
                f"{spec.label} cannot be divided among processes: {reason}",
                "leave it out with --only, or train it with smskd-bench run",
            )


def why_not_divisible(spec: StageSpec, processes: int) -> str | None:
    """Why a stage run cannot be divided, or None."""
    data, batch = spec.dataset, spec.training.batch_size
    images = data.train_size or dataset_info(data.name).num_train - data.dev_size
    smallest = images % batch or batch
    if smallest < processes:
        return f"its epochs end with a batch of {smallest}, and there are {processes} processes"
    if (reason := why_not_shared(stage_of(spec, METHODS).parts)) is not None:
        return reason
    return DROPOUT if _drops(spec.model, data.name) else None


@cache
def _drops(model: str, dataset: str) -> bool:
    info = dataset_info(dataset)
    with seeded(0):
        return has_dropout(build_model(model, info.num_classes, info.channels, info.size))


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started.

    Raises:
        RefusedError: it has not.
    """
    if "RANK" not in os.environ:
        raise RefusedError(
            "this command is one of several processes",
            "torchrun --nproc-per-node 2 -m smskd_bench.distributed --matrix FILE",
        )
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks.here()
    finally:
        dist.destroy_process_group()


def _end_with(parent: int) -> None:
    """End when torchrun is gone, which starts us in a session of our own; checkpoints stay."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def device_here(wanted: str) -> str:
    """The device of this process: its own GPU, or the CPU."""
    device = running.choose_device(wanted)
    if device != "cuda":
        return device
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(device)
    return device


@click.command()
@cli.matrix_option
@cli.store_option
@cli.data_option
@cli.only_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each process.")
@click.option(
    "--tracking", type=click.Choice(["wandb", "none"]), default="wandb", show_default=True,
    help="Mirror to Weights & Biases (offline without a login), or not.",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Try stage runs again that diverged.")
def main(**options: Any) -> None:
    """Train a matrix, each stage run by all processes that torchrun started."""
    sys.exit(_guarded(lambda: _main(RunRequest(**options, paths=PATHS))))


def _main(request: RunRequest) -> int:
    request = replace(request, device=device_here(request.device))
    plan = make_plan(load_matrix(request.matrix), request.only)
    check_divisible(plan, int(os.environ.get("WORLD_SIZE", "1")))
    with process_group(request.device) as ranks:
        return lead(request, ranks) if ranks.rank == 0 else follow(request, plan, ranks)


def _guarded(work: Callable[[], int]) -> int:
    """The exit code; errors are said once, by rank 0."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        return work()
    except SmskdError as error:
        click.echo(f"error: {error}" if first else "", err=True, nl=first)
        return error.exit_code
    except RuntimeError:
        if first:
            raise
        return 1  # the connection broke, as another process ended: that one says why
    except Interrupted as told:
        click.echo("stopped; the same command goes on" if first else "", err=True, nl=first)
        return 128 + told.number


if __name__ == "__main__":
    main()
