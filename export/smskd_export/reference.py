"""What the PyTorch student says of every test image: what all graphs are compared with."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from smskd_export.cpu_session import CpuSession, Floats
from smskd_export.frozen_net import frozen_copy

_TORCH_BATCH = 250
_MOST_CORES = 8


def scale(images_u8: NDArray[np.uint8]) -> Floats:
    """Images as graphs take them: float32 in 0..1."""
    return images_u8.astype(np.float32) / np.float32(255)


def torch_logits(
    model: nn.Module, images_u8: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> Floats:
    """Logits ``(N, K)`` of the model in float32 on the CPU, normalised outside of any graph.

    They do not depend on the number of cores: parts of the images go to cores, not parts of a
    product. Each core has its own copy of the model, which may keep features between its layers.
    """
    own = threading.local()
    mean_t, std_t = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def prepare() -> None:
        torch.set_num_threads(1)
        own.model = frozen_copy(model)

    def run(part: NDArray[np.uint8]) -> Floats:
        with torch.no_grad():
            out: Floats = own.model((torch.from_numpy(scale(part)) - mean_t) / std_t).numpy()
        return out

    threads = torch.get_num_threads()
    try:
        parts = np.split(images_u8, range(_TORCH_BATCH, len(images_u8), _TORCH_BATCH))
        return _in_parallel(run, parts, prepare)
    finally:
        torch.set_num_threads(threads)


def session_logits(session: CpuSession, images_u8: NDArray[np.uint8]) -> Floats:
    """Logits ``(N, K)`` of a graph, run at its own batch size; the last batch is filled up."""
    size = session.batch

    def run(part: NDArray[np.uint8]) -> Floats:
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        return session.run(scale(filled))[: len(part)]

    return _in_parallel(run, (images_u8[i : i + size] for i in range(0, len(images_u8), size)))


def _in_parallel(
    run: Callable[[NDArray[np.uint8]], Floats],
    parts: Iterable[NDArray[np.uint8]],
    prepare: Callable[[], None] = lambda: None,
) -> Floats:
    """``run`` of every part, joined in order; both runtimes let go of the interpreter's lock."""
    with ThreadPoolExecutor(_cores(), initializer=prepare) as pool:
        return np.concatenate(list(pool.map(run, parts)))


def _cores() -> int:
    """Cores to use: those that this process may run on, within reason."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return min(here, _MOST_CORES)
