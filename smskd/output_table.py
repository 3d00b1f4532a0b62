"""The exact outputs of a frozen network for views of the training images, computed once.

Pad-and-crop with flip shows an image in finitely many views (162 for the CIFAR recipe,
:mod:`smskd.views`). So what a frozen teacher says is a finite table, and looking it up is not an
approximation: only the rounding of the stored numbers differs from running the teacher. The views
that a stage will show are known beforehand, so the table is filled only where it will be read.

A table is addressed by the content of everything that decides its numbers, so that methods, seeds,
stages, pairs and processes share it. The previous stage's student, frozen as the reference, is a
network like any other here.

Shapes: N samples, V views, B batch, K classes, D width of the pooled feature.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smskd.atomic import write_json
from smskd.data import Batch, ResidentBatches
from smskd.entry_file import EntryFile
from smskd.errors import DataError, TableError
from smskd.frozen import Frozen, Live
from smskd.modes import eval_mode
from smskd.precision import autocast, tensor_cores
from smskd.settings import Precision
from smskd.taps import CLASSIFIER, POOLED, Network, Outputs, TappedModel, probe

Storage = Literal["fp16", "fp32"]
LOGITS = "logits"
DTYPES: dict[Storage, np.dtype[np.generic]] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}

CHUNK = {"cpu": 64, "cuda": 1000}
"""Images a forward pass when filling, by device type; on a CPU, larger ones leave the caches."""

SAVE_EVERY_S = 10.0
"""A kill while filling loses at most this much work."""

FORMAT = 2

GPU_SHARE = 0.4
"""Of the free memory of a GPU, what a column may take; a larger one is read from the host."""

Progress = Callable[[int, int], None]
"""Called with entries done and entries to do."""


@dataclass(frozen=True)
class TableSettings:
    """What is computed and how it is kept.

    Attributes:
        storage: Type of the stored numbers; "fp16" halves the size, "fp32" keeps every bit.
        precision: Under which the network runs.
        pooled: Whether the pooled feature is kept too.
    """

    storage: Storage = "fp16"
    precision: Precision = "fp32"
    pooled: bool = False


class OutputTable:
    """Outputs of one network for views of one training set, in a folder; a ``Frozen``.

    Opening verifies every checksum; entries that were altered or half written are filled anew.

    Args:
        root: Folder of all tables; this one's is named by :func:`table_key`.
        network: Frozen here.
        data: The training set; its seed and batch size do not matter.
        settings: What is kept.
        waiting: Called when another process fills it and this one has to wait.
        why_no_room: Asked for a table that is not there yet, with its bytes; a reason refuses it.

    Raises:
        TableError: there is no room for it, or the folder cannot be written.
    """

    def __init__(
        self,
        root: Path,
        network: Network,
        data: ResidentBatches,
        settings: TableSettings | None = None,
        why_no_room: Callable[[int], str | None] = lambda num_bytes: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.waiting = waiting
        self.settings = settings or TableSettings()
        self.data = data
        self.network = network
        network.model.eval().requires_grad_(False)
        self.key = table_key(network, data, self.settings)
        self.folder = root / self.key[:32]
        self._shapes = self._column_shapes()
        self._on_device: dict[str, Tensor] = {}
        self._too_large: set[str] = set()
        if not self.folder.exists() and (reason := why_no_room(self.num_bytes)) is not None:
            raise TableError(f"a table does not fit: {reason}", "free some space, or run it live")
        with _refusing(self.folder, self.num_bytes):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._describe()
                self._files = {role: self._open(role) for role in self._shapes}

    @property
    def source(self) -> str:
        """For the record of a result."""
        return f"table {self.settings.storage}"

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        size = DTYPES[self.settings.storage].itemsize
        return size * sum(int(np.prod(shape)) for shape in self._shapes.values())

    @property
    def num_damaged(self) -> int:
        """Entries that failed their checksum when they were last verified."""
        return sum(file.damaged for file in self._files.values())

    def missing(self, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Those of the entries ``wanted`` ``(N, V)`` that are not filled."""
        filled = np.logical_and.reduce([file.filled for file in self._files.values()])
        lacking: NDArray[np.bool_] = wanted & ~filled
        return lacking

    def fill(self, wanted: NDArray[np.bool_], progress: Progress = lambda done, total: None) -> int:
        """Compute those of the entries ``wanted`` ``(N, V)`` that are missing; returns how many.

        One process fills at a time, the others wait for it and then find its work done. A kill
        loses at most the work of ``SAVE_EVERY_S``.

        Raises:
            TableError: an output is too large for the storage, or the folder cannot be written.
        """
        if not self.missing(wanted).any():
            return 0
        with _refusing(self.folder, self.num_bytes), self._locked():
            for file in self._files.values():
                file.refresh()
            index, view = np.nonzero(self.missing(wanted))
            try:
                self._fill(index, view, progress)
            finally:
                for file in self._files.values():
                    file.save()
        self._on_device.clear()
        return len(index)

    def __call__(self, batch: Batch) -> Outputs:
        """Look up all that is kept of a batch; float32.

        Raises:
            DataError: the batch does not say its views, or was not filled.
        """
        return self.read(batch, self.settings.pooled)

    def read(self, batch: Batch, pooled: bool) -> Outputs:
        """Look up logits, and pooled features if they are asked for; errors as for a call."""
        if batch.view is None:
            raise DataError("a table needs batches that know their views", "use ResidentBatches")
        logits = self._look_up(LOGITS, batch.index, batch.view)
        feature = self._look_up(POOLED, batch.index, batch.view) if pooled else None
        return Outputs(logits, pooled=feature)

    def reader(self, pooled: bool) -> Reader:
        """The table as one stage reads it: only the columns that it asks for."""
        return Reader(self, pooled)

    def close(self) -> None:
        """Nothing to let go of: the pages belong to the system."""

    def _look_up(self, role: str, index: Tensor, view: Tensor) -> Tensor:
        if index.device.type == "cpu" or not self._fits(role, index.device):
            return self._look_up_here(role, index.cpu(), view.cpu()).to(index.device)
        if role not in self._on_device:
            self._on_device[role] = self._upload(role, index.device)
        return self._on_device[role][index, view].float()

    def _look_up_here(self, role: str, index: Tensor, view: Tensor) -> Tensor:
        file = self._files[role]
        rows, columns = index.numpy(), view.numpy()
        if not file.filled[rows, columns].all():
            raise DataError("the table lacks views of this batch", "fill() it for its epochs")
        return torch.from_numpy(file.entries[rows, columns]).float()

    def _fits(self, role: str, device: torch.device) -> bool:
        """Whether a column may lie on the GPU; decided when it is first read there."""
        if role not in self._on_device and role not in self._too_large:
            free, _ = torch.cuda.mem_get_info(device)
            if self._files[role].num_bytes > GPU_SHARE * free:
                self._too_large.add(role)
        return role not in self._too_large

    def _upload(self, role: str, device: torch.device) -> Tensor:
        # Not filled becomes NaN, which ends an epoch loudly, without a check in every step.
        file = self._files[role]
        table = torch.from_numpy(np.asarray(file.entries)).to(device)
        empty = torch.from_numpy(~file.filled).to(device)
        return table.masked_fill_(empty.unsqueeze(-1), torch.nan)

    def _fill(self, index: NDArray[np.int64], view: NDArray[np.int64], progress: Progress) -> None:
        roles = frozenset(self._shapes) - {LOGITS}
        size = CHUNK[self.data.labels.device.type]
        saved = time.perf_counter()
        model = self.network.model
        with (
            eval_mode(model),
            tensor_cores(self.settings.precision),
            TappedModel(model, self.network.taps, roles) as tapped,
        ):
            for start in range(0, len(index), size):
                self._compute(tapped, index[start : start + size], view[start : start + size])
                progress(min(start + size, len(index)), len(index))
                if time.perf_counter() - saved > SAVE_EVERY_S:
                    for file in self._files.values():
                        file.save()
                    saved = time.perf_counter()

    @torch.no_grad()
    def _compute(
        self, tapped: TappedModel, index: NDArray[np.int64], view: NDArray[np.int64]
    ) -> None:
        device = self.data.labels.device
        images = self.data.cut(*(torch.from_numpy(x).to(device) for x in (index, view)))
        # One shape, so that a sample's bits do not depend on its company.
        images = _padded(images, CHUNK[device.type])
        with autocast(self.settings.precision, device):
            said = tapped(images)
        outputs = {LOGITS: said.logits, POOLED: said.pooled}
        for role, file in self._files.items():
            values = outputs[role]
            assert values is not None
            with np.errstate(over="ignore"):  # looked for right here
                stored = values[: len(index)].cpu().numpy().astype(file.dtype)
            if not np.isfinite(stored).all():
                raise TableError(
                    f"{role} of the frozen network do not fit into {self.settings.storage}",
                    "store fp32, or run it live",
                )
            file.write(index, view, stored)

    def _column_shapes(self) -> dict[str, tuple[int, int, int]]:
        roles = frozenset({POOLED}) if self.settings.pooled else frozenset()
        one = torch.zeros(1, dtype=torch.int64, device=self.data.labels.device)
        shapes = probe(self.network.model, self.network.taps, roles, self.data.cut(one, one))
        size = self.data.num_samples, self.data.augment.num_views
        columns = {LOGITS: (*size, shapes.num_classes)}
        return columns | ({POOLED: (*size, shapes.pooled)} if roles else {})

    def _open(self, role: str) -> EntryFile:
        dtype = DTYPES[self.settings.storage]
        return EntryFile(self.folder / f"{role}.bin", self._shapes[role], dtype)

    def _describe(self) -> None:
        path = self.folder / "table.json"
        if path.exists():
            return
        what: Mapping[str, object] = {
            "format": FORMAT,
            "key": self.key,
            "network": type(self.network.model).__name__,
            "columns": {role: list(shape) for role, shape in self._shapes.items()},
            "storage": self.settings.storage,
            "precision": self.settings.precision,
            "device": _device_name(self.data.labels.device),
            "torch": torch.__version__,
        }
        write_json(path, what)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the table; the lock is the kernel's and ends with the process."""
        with (self.folder / "lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Reader:
    """A table as a :class:`~smskd.frozen.Frozen` of one stage."""

    table: OutputTable
    pooled: bool

    @property
    def source(self) -> str:
        """For the record of a result."""
        return self.table.source

    def __call__(self, batch: Batch) -> Outputs:
        """Look a batch up."""
        return self.table.read(batch, self.pooled)

    def close(self) -> None:
        """Nothing to let go of."""


def looked_up(
    frozen: Frozen,
    table_of: Callable[[Live], OutputTable | None],
    wanted: Callable[[], NDArray[np.bool_]],
    refused: Callable[[str], None],
    progress: Progress = lambda done, total: None,
) -> Frozen:
    """A filled table in place of a live network; the network itself where there cannot be one.

    Args:
        frozen: One network of a stage; one of which feature maps are read stays live.
        table_of: Opens its table; None if it is to stay live.
        wanted: The entries ``(N, V)`` that will be read.
        refused: Told why there is no table, which is no reason to stop.
        progress: Told of filling.
    """
    if not isinstance(frozen, Live) or frozen.network.roles - {POOLED, CLASSIFIER}:
        return frozen
    try:
        if (table := table_of(frozen)) is None:
            return frozen
        table.fill(wanted(), progress)
    except TableError as error:
        refused(f"{error.message}; the network is run live instead")
        return frozen
    frozen.close()
    return table.reader(POOLED in frozen.network.roles)


def drawn(data: ResidentBatches, epochs: range) -> NDArray[np.bool_]:
    """Which views ``(N, V)`` the training set shows in these epochs."""
    wanted = np.zeros((data.num_samples, data.augment.num_views), bool)
    everyone = np.arange(data.num_samples)
    for epoch in epochs:
        wanted[everyone, data.views(epoch)] = True
    return wanted


def table_key(network: Network, data: ResidentBatches, settings: TableSettings) -> str:
    """SHA-256 over all that decides the numbers in a table.

    Weights and architecture, images and their normalisation, views, precision and storage, device
    and torch version (both round in their own way).
    """
    augment, normalise = data.augment, data.normalise
    device = data.labels.device
    facts = {
        "format": FORMAT,
        "architecture": repr(network.model),
        "views": [augment.pad, augment.flip],
        "normalise": [*normalise.mean, *normalise.std] if normalise else None,
        "pooled": network.taps.pooled if settings.pooled else None,
        "precision": settings.precision,
        "storage": settings.storage,
        "device": _device_name(device),
        "torch": torch.__version__,
        "says": _says(network, data),
    }
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in _state(network.model).items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().cpu().numpy().tobytes())
    images = data.images
    sha.update(f"{images.dtype} {tuple(images.shape)}".encode())
    sha.update(images.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def _says(network: Network, data: ResidentBatches) -> list[str]:
    """Logits for a few images, roughly: what neither weights nor layers show of a forward pass."""
    count = min(4, data.num_samples)
    first = torch.arange(count, device=data.labels.device)
    with eval_mode(network.model), tensor_cores("fp32"):
        logits = network.model(data.cut(first, torch.zeros_like(first))).float()
    scale = float(logits.abs().max()) or 1.0
    return [f"{scale:.1e}", *(f"{z:.0f}" for z in (100.0 * logits / scale).flatten().tolist())]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _padded(images: Tensor, size: int) -> Tensor:
    """Repeat the last image until there are ``size``."""
    lacking = size - len(images)
    return torch.cat([images, images[-1:].expand(lacking, -1, -1, -1)]) if lacking else images


@contextmanager
def _refusing(folder: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TableError(
            f"a table of {num_bytes / 2**30:.2f} GiB cannot be written in {folder.parent}: "
            f"{error.strerror or error}",
            "free some space, or run the network live",
        ) from None
