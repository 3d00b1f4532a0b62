"""The store: one folder a stage run, named by its key. The truth, online or not.

    <store>/store.json                   {"format": 1}
    <store>/stages/<2 digits>/<key>/
        spec.json                        the full specification
        checkpoint.pt                    resume state, replaced each epoch, gone when done
        checkpoint.previous.pt           the one before
        student.safetensors              final weights
        predictions.safetensors          predicted class of every test image
        inference.safetensors            a method's modules, only if it keeps them for inference
        result.json                      written last: its presence means done
        failed.json                      instead of a result: status and reason
        lock, lease.json                 held while somebody trains (leases.py)
    <store>/exports/<key>/<target>/      exported students: report, bundle, test set
    <store>/measurements/                what devices brought back (measurements.py)
    <store>/tables/<key>/                outputs of frozen networks (smskd/output_table.py)
    <store>/users/, maintenance/         who uses it now (usage.py)
    <store>/calibration.json             speeds measured by --dry-run; may be deleted

Everything is written aside, fsynced and renamed (``docs/store.md``).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from smskd.atomic import write_atomically, write_json
from smskd.errors import StoreError
from smskd.strict_json import parse_json
from smskd_bench.leases import LEASE, LeaseBook, Owner, holder
from smskd_bench.record_forms import FailureForm, ResultForm, problem_with
from smskd_bench.sealed import load_whole, seal
from smskd_bench.spec import StageSpec
from smskd_bench.usage import in_use

STORE_FORMAT = 1
MARKER = "store.json"
RESULT, FAILED, CHECKPOINT = "result.json", "failed.json", "checkpoint.pt"
WEIGHTS, PREDICTIONS, SPEC = "student.safetensors", "predictions.safetensors", "spec.json"
PREVIOUS = "checkpoint.previous.pt"
RETRAIN = "delete its folder, and run the matrix again"
INFERENCE = "inference.safetensors"

KEY = re.compile("[0-9a-f]{64}")

Record = dict[str, Any]

Place = tuple[int, int]
"""Where a stage run stands: epochs done, and steps of the next one."""


@dataclass(frozen=True)
class Store:
    """A folder of stage runs."""

    root: Path
    leases: LeaseBook = field(default_factory=LeaseBook, compare=False, repr=False)

    @classmethod
    def open(cls, root: Path) -> Store:
        """Open a store, making it if it is not there.

        Raises:
            StoreError: it cannot be written, or a newer version made it.
        """
        store = cls.peek(root)
        try:
            (root / "stages").mkdir(parents=True, exist_ok=True)
            if not (root / MARKER).exists():
                write_json(root / MARKER, {"format": STORE_FORMAT})
            if not os.access(root / "stages", os.W_OK):
                raise PermissionError("it is read-only")
        except OSError as error:
            raise StoreError(
                f"the store {root} cannot be written: {error.strerror or error}",
                "choose another folder with --store DIR or SMSKD_STORE",
            ) from None
        return store

    @classmethod
    def peek(cls, root: Path) -> Store:
        """Open a store for reading only; a store that is not there yet is empty."""
        marker = read_marker(root)
        if marker is not None and marker.get("format") != STORE_FORMAT:
            raise other_format(root, marker)
        return cls(root)

    def is_there(self) -> bool:
        """Whether anything was ever run in it."""
        return (self.root / MARKER).exists()

    @contextmanager
    def in_use(
        self, keys: Iterable[str], waiting: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Keep stage runs, and the format of the store, as they are in this block.

        Call it before looking which of them are done (:mod:`smskd_bench.usage`).

        Raises:
            StoreError: it cannot be written, or was migrated meanwhile.
        """
        with ExitStack() as used:
            with _writing(self.root):
                used.enter_context(in_use(self.root, keys, self.leases, waiting))
            Store.peek(self.root)
            yield

    def folder(self, key: str) -> Path:
        """The folder of one stage run."""
        return Path(f"{self._stages}{key[:2]}/{key}")

    def export_folder(self, key: str, target: str) -> Path:
        """The folder of one exported student."""
        return self.root / "exports" / key / target

    def result(self, key: str) -> Record | None:
        """The result of a finished stage run, or None."""
        record = _read_json(self.folder(key) / RESULT, form=ResultForm)
        if record is not None and record.get("key", key) != key:
            raise _damaged(self.folder(key) / RESULT, "it is another stage run's")
        return record

    def failure(self, key: str) -> Record | None:
        """Status and reason of a failed stage run, or None."""
        return _read_json(self.folder(key) / FAILED, form=FailureForm)

    def spec_document(self, key: str) -> Record:
        """The specification a stage run was begun with.

        Raises:
            StoreError: there is no such stage run.
        """
        document = _read_json(self.folder(key) / SPEC)
        if document is None:
            raise StoreError(f"no stage run {key} in {self.root}", "run the matrix first")
        document.pop("key", None)
        return document

    def is_done(self, key: str) -> bool:
        """Whether a stage run has its result; reads no file."""
        return self._has(key, RESULT)

    def begin(self, spec: StageSpec) -> Path:
        """Make the folder of a stage run and write its specification.

        Call it under the stage run's lock: unfinished writes of killed processes are removed.
        """
        folder = self.folder(spec.key)
        with _writing(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
            write_json(folder / SPEC, {"key": spec.key, **spec.document()})
        return folder

    def complete(
        self,
        key: str,
        result: Record,
        weights: dict[str, Tensor],
        predictions: Tensor,
        inference: dict[str, Tensor] | None = None,
    ) -> None:
        """Write weights, predictions and, last of all, the result.

        Args:
            key: The stage run.
            result: Its record.
            weights: State of the student.
            predictions: Predicted classes on the test set ``(N,)``.
            inference: State of the method's modules, if the method keeps them for inference.
        """
        folder = self.folder(key)
        with _writing(self.root):
            files = {
                WEIGHTS: save_weights(folder / WEIGHTS, weights, {"key": key}),
                PREDICTIONS: save_weights(
                    folder / PREDICTIONS, {"predictions": predictions.to(torch.int32)}, {}
                ),
            }
            if inference is not None:
                files[INFERENCE] = save_weights(folder / INFERENCE, inference, {"key": key})
            write_json(folder / RESULT, {**result, "files": files})
        self.sweep([key])

    def sweep(self, keys: Iterable[str]) -> None:
        """Remove what finished stage runs need no more; a kill just before may have left it."""
        with _writing(self.root):
            for key in keys:
                for name in (FAILED, CHECKPOINT, PREVIOUS):
                    path = self.folder(key) / name
                    if path.exists() and self.is_done(key):
                        path.unlink(missing_ok=True)
                if (self.folder(key) / LEASE).exists():
                    with self.try_lock(key):  # of a process that was killed: given back at once
                        pass

    def fail(self, key: str, status: str, reason: str, epoch: int) -> None:
        """Write why a stage run ended without a result; its checkpoint stays."""
        record = {"status": status, "reason": reason, "epoch": epoch, "time": time.time()}
        with _writing(self.root):
            write_json(self.folder(key) / FAILED, record)

    def forget_failure(self, key: str) -> None:
        """Make a failed stage run one that is missing."""
        with _writing(self.root):
            (self.folder(key) / FAILED).unlink(missing_ok=True)

    def weights(self, key: str) -> dict[str, Tensor]:
        """Final weights of a finished stage run.

        Raises:
            StoreError: they are missing, damaged, or not those that were written.
        """
        path = self.folder(key) / WEIGHTS
        weights = load_weights(path, RETRAIN)
        written = (self.result(key) or {}).get("files", {}).get(WEIGHTS)
        if written is not None and hashlib.sha256(path.read_bytes()).hexdigest() != written:
            raise StoreError(f"{path} is damaged: its SHA-256 is not that of its result", RETRAIN)
        return weights

    def inference_weights(self, key: str) -> dict[str, Tensor] | None:
        """State of the modules that the method keeps for inference, or None if it keeps none."""
        path = self.folder(key) / INFERENCE
        return load_weights(path) if path.exists() else None

    def predictions(self, key: str) -> Tensor:
        """Predicted classes on the test set ``(N,)``."""
        path = self.folder(key) / PREDICTIONS
        found = load_weights(path, RETRAIN).get("predictions")
        if found is None:
            raise StoreError(f"{path} is damaged: it holds no predictions", RETRAIN)
        return found

    def save_checkpoint(self, key: str, state: Record) -> None:
        """Replace the resume state of a stage run; the one before is kept too."""
        path = self.folder(key) / CHECKPOINT
        with _writing(self.root):
            # Through memory: torch does not say that a full disk is what stopped it.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            data = seal(buffer.getvalue())
            if path.exists():
                _link(path, path.with_name(PREVIOUS))
            write_atomically(path, lambda temporary: temporary.write_bytes(data))

    def checkpoint(self, key: str, place: Place | None = None) -> Record | None:
        """The newest resume state that can be read, or None.

        Args:
            key: The stage run.
            place: If given, only the state at this place will do.
        """
        for name in (CHECKPOINT, PREVIOUS):
            state = _read_checkpoint(self.folder(key) / name)
            if state is not None and place in (None, place_of(state)):
                return state
        return None

    def go_back(self, key: str, place: Place) -> None:
        """Make the state at ``place`` the newest, if it is the one before the newest.

        Otherwise the next save would keep the newer state as the one before, and a second kill at
        the same place would find no state to go back to.
        """
        path = self.folder(key) / CHECKPOINT
        newest = _read_checkpoint(path)
        if newest is None or place_of(newest) != place:
            with _writing(self.root):
                _link(path.with_name(PREVIOUS), path)

    def saved_epochs(self, key: str) -> int:
        """Epochs of the newest resume state that can be read, whose tensors are left on disk."""
        for name in (CHECKPOINT, PREVIOUS):
            state = _read_checkpoint(self.folder(key) / name, glance=True)
            if state is not None:
                return int(state["epoch"])
        return 0

    def stage_folders(self) -> Iterator[Path]:
        """Folders of all stage runs, of those too that were only locked so far."""
        for key in sorted(self.folders()):
            if KEY.fullmatch(key) and self.folder(key).is_dir():
                yield self.folder(key)

    def stage_keys(self) -> Iterator[str]:
        """Keys of all stage runs that were ever begun, sorted."""
        # A folder that was only locked so far has no specification.
        return (key for key in sorted(self.folders()) if self._has(key, SPEC))

    def folders(self) -> set[str]:
        """Keys of all stage runs that have a folder: what is not among them needs no look."""
        stages = self.root / "stages"
        heads = (head for head in _names(stages) if len(head) == 2)
        return {key for head in heads for key in _names(stages / head) if key[:2] == head}

    def _has(self, key: str, name: str) -> bool:
        # Asked of every stage run of a store; building a Path takes longer than asking.
        return os.path.exists(f"{self._stages}{key[:2]}/{key}/{name}")  # noqa: PTH110

    @cached_property
    def _stages(self) -> str:
        return f"{self.root}/stages/"

    @contextmanager
    def try_lock(self, key: str) -> Iterator[bool]:
        """Hold a stage run, so that two processes never train the same one, or be told False."""
        with _writing(self.root):
            held = self.leases.take(self.folder(key))
        try:
            yield held is not None
        finally:
            if held is not None:
                self.leases.give_back(held)

    def is_lost(self, key: str) -> bool:
        """Whether a stage run that we hold was taken by another machine meanwhile."""
        return self.leases.lost(self.folder(key))

    def is_running(self, key: str) -> bool:
        """Whether some process holds this stage run now."""
        return self.holder(key) is not None

    def holder(self, key: str) -> Owner | None:
        """The process that holds this stage run now, or None."""
        return holder(self.folder(key))


def read_marker(root: Path) -> Record | None:
    """What ``store.json`` holds; None if there is none.

    Raises:
        StoreError: it is damaged.
    """
    mend = f'if {root} is a store, write {{"format": {STORE_FORMAT}}} into that file'
    return _read_json(root / MARKER, mend)


def other_format(root: Path, marker: Record) -> StoreError:
    """Why a store of another format is refused, and what to do."""
    found = marker.get("format")
    hint = "use the version that made it, or another folder with --store DIR"
    if isinstance(found, str) and " to " in found:
        hint = (
            "its migration was cut short; go on with the version that began it: "
            f"smskd-bench migrate --store {root}"
        )
    elif isinstance(found, int) and found < STORE_FORMAT:
        hint = f"bring it up to date: smskd-bench migrate --store {root}"
    return StoreError(
        f"the store {root} has format {found!r}; this version reads format {STORE_FORMAT}", hint
    )


def place_of(state: Record) -> Place:
    """Where a resume state was taken."""
    return state["epoch"], state.get("steps", 0)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors as safetensors, atomically, and return the file's SHA-256.

    The bytes depend on the values only.
    """
    # Copied, because safetensors refuses tensors that share memory.
    layout = torch.contiguous_format
    plain = {name: t.detach().cpu().clone(memory_format=layout) for name, t in tensors.items()}
    data = to_safetensors(plain, metadata or None)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


def load_weights(path: Path, hint: str = "give a complete safetensors file") -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.
        hint: What to do if it cannot be read.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}", hint) from None


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, in place of what had it."""
    temporary = other.with_name(f".{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            temporary.hardlink_to(path)
        except OSError:  # not every file system has hard links
            shutil.copyfile(path, temporary)
        temporary.replace(other)
    finally:
        temporary.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_checkpoint(path: Path, glance: bool = False) -> Record | None:
    """A resume state, or None if there is none, or not every byte of it as it was written.

    A ``glance`` leaves the tensors on disk, and so does not look for damage in them.
    """
    try:
        if glance:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        else:
            state = load_whole(path.read_bytes())
    except Exception:  # torch raises many kinds for a damaged file; all mean it cannot be used
        return None
    return state if _is_state(state) else None


def _is_state(state: object) -> bool:
    if not isinstance(state, dict):
        return False
    counts, sessions = (state.get("epoch"), state.get("steps", 0)), state.get("sessions")
    return all(type(count) is int and count >= 0 for count in counts) and (
        sessions is None
        or (isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions))
    )


def _damaged(path: Path, reason: object, mend: str = RETRAIN) -> StoreError:
    return StoreError(f"{path} is damaged: {reason}", mend)


def _read_json(path: Path, mend: str = RETRAIN, form: type | None = None) -> Record | None:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror or error}",
            "check the path and its permissions, or choose another folder with --store DIR",
        ) from None
    except ValueError as error:
        raise _damaged(path, error, mend) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it holds no record", mend)
    if form is not None and (problem := problem_with(value, form)):
        raise _damaged(path, problem, mend)
    return value


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the store {root} cannot be written: {error.strerror or error}",
            "free some space or choose another folder with --store DIR; nothing done is lost",
        ) from None
