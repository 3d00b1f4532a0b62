"""How many stage runs to train at once, and with how many CPU threads each.

The number of threads changes the rounding of results, so it comes from the machine and the plan
alone: neither from the load, nor from how much of the plan is left.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from smskd.datasets import dataset_info
from smskd_bench.plan import Plan

WORKER_BYTES = 0.6 * 2**30
"""Memory of a worker process without data: torch, a network, its gradients and activations."""

MEMORY_SHARE = 0.8
"""Share of the machine's memory that workers may take."""

Wanted = int | Literal["auto"]


@dataclass(frozen=True)
class Parallelism:
    """How an execution is spread.

    Attributes:
        workers: Stage runs at once; 1 trains in this process.
        threads: CPU threads of each; None leaves torch's default.
    """

    workers: int
    threads: int | None = None


def choose_workers(
    wanted: Wanted,
    plan: Plan,
    left: Iterable[str],
    device: str,
    threads: int | None = None,
    measured: Callable[[], int | None] = lambda: None,
) -> Parallelism:
    """Decide how many workers there are.

    Args:
        wanted: A number, or "auto".
        plan: What is asked for.
        left: Keys of what is missing of it.
        device: torch device string.
        threads: CPU threads of each worker that the user named; they stay.
        measured: For a GPU, the best number of workers that a measurement found, or None.

    Returns:
        No more workers than stage runs of ``left`` could ever be ready at once.
    """
    if wanted != "auto":
        workers = wanted
    elif torch.device(device).type == "cuda":
        workers = measured() or 1
    else:
        workers = min(cores() // (threads or 1), _room(plan), width(plan, plan.nodes))
    workers = max(1, workers)
    if threads is None and workers > 1:
        threads = max(1, min(torch.get_num_threads(), cores() // workers))
    return Parallelism(max(1, min(workers, width(plan, left))), threads)


def width(plan: Plan, keys: Iterable[str]) -> int:
    """The greatest number of these stage runs that can be ready at the same time.

    Dilworth (1950): it is the smallest number of chains, each a sequence of stage runs that have to
    wait for each other, into which all of them can be divided. Chains are joined by augmenting
    paths, so that as few as possible remain.
    """
    chosen = set(keys)
    before: dict[str, set[str]] = {}
    for key, spec in plan.nodes.items():
        if key in chosen:
            near = [other for other in spec.depends_on if other in chosen]
            before[key] = set(near).union(*(before[other] for other in near))
    follower: dict[str, str] = {}

    def join(key: str, seen: set[str]) -> bool:
        """Let ``key`` follow one that it waits for, moving others where that is needed."""
        for other in before[key]:
            if other in seen:
                continue
            seen.add(other)
            if other not in follower or join(follower[other], seen):
                follower[other] = key
                return True
        return False

    return sum(not join(key, set()) for key in before)


def cores() -> int:
    """CPU cores this process may use: its affinity, less if a control group allows less time."""
    affinity = getattr(os, "sched_getaffinity", None)
    here = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_quota(folder / "cpu.max") for folder in _control_groups()]
    return max(1, min([here, *(int(quota) for quota in quotas if quota)]))


def memory_bytes() -> float:
    """The machine's memory, less if a control group allows less; infinite if nobody says."""
    limits = [_quota(folder / "memory.max") for folder in _control_groups()]
    with contextlib.suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((float(limit) for limit in limits if limit), default=float("inf"))


def _room(plan: Plan) -> int:
    """Workers that fit into memory, with their data.

    The images are there twice while they are split; those for training are also there padded, and
    mirrored if they are flipped.
    """
    info = dataset_info(plan.matrix.dataset.name)
    images = info.num_train + info.num_test
    padded = (info.size + 2 * info.pad) ** 2 * (2 if info.flip else 1)
    data = info.channels * (2 * images * info.size**2 + info.num_train * padded)
    each = WORKER_BYTES + data
    return int(min(MEMORY_SHARE * memory_bytes() / each, 2**16))


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """Folders of this process's control group and of those around it (version 2; else none)."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if found is None:
        return []
    folder = root / found
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _quota(file: Path) -> float | None:
    """What a control group's file allows: bytes, or cores from "quota period"; None if no limit."""
    try:
        numbers = [int(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):  # not there, or "max"
        return None
    return numbers[0] / numbers[1] if len(numbers) == 2 else float(numbers[0])
