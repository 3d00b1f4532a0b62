"""A stage run's folder as one object, for machines that do not see the same store.

Only files of known names travel. What arrives is read back as data, checked against the hashes in
its result, and written by the store itself: complete or absent, the result last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load

from smskd.errors import StoreError
from smskd_bench.sealed import load_whole
from smskd_bench.spec import StageSpec
from smskd_bench.store import (
    CHECKPOINT,
    FAILED,
    INFERENCE,
    PREDICTIONS,
    RESULT,
    SPEC,
    WEIGHTS,
    Record,
    Store,
    place_of,
)

FINISHED = (SPEC, WEIGHTS, PREDICTIONS, INFERENCE, RESULT)
UNFINISHED = (SPEC, CHECKPOINT, FAILED)

LOOK_AGAIN_S = 0.1
"""How often to see whether another process has written a parcel."""


@dataclass(frozen=True)
class Parcel:
    """What a stage run's folder holds: the result, or how far it has come.

    Attributes:
        key: Of the stage run.
        files: Contents by name.
    """

    key: str
    files: dict[str, bytes]


def pack(store: Store, key: str) -> Parcel:
    """Everything that another machine needs of a stage run."""
    names = FINISHED if store.is_done(key) else UNFINISHED
    folder, files = store.folder(key), {}
    for name in names:
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"{folder / name} cannot be read: {error.strerror}") from None
    return Parcel(key, files)


def unpack(store: Store, parcel: Parcel) -> None:
    """Write a parcel into a store; what is there and further on stays. Hold the key's lock.

    Raises:
        StoreError: it is damaged, or the store cannot be written.
    """
    try:
        if RESULT in parcel.files:
            _unpack_result(store, parcel)
        elif SPEC in parcel.files and not store.is_done(parcel.key):
            _unpack_state(store, parcel)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"what a node sent of stage run {parcel.key} is damaged: {error}",
            "run again; if it stays, look at the memory and disks of the nodes",
        ) from None


def unpack_all(store: Store, parcels: Iterable[Parcel]) -> None:
    """Write finished parcels that other processes may be writing too; one of them does it."""
    for parcel in parcels:
        while not _is_here(store, parcel):
            with store.try_lock(parcel.key) as ours:
                if ours:
                    unpack(store, parcel)
            if not ours:
                time.sleep(LOOK_AGAIN_S)


def _is_here(store: Store, parcel: Parcel) -> bool:
    here = store.result(parcel.key)
    return here is not None and here["files"] == _record(parcel, RESULT)["files"]


def _unpack_result(store: Store, parcel: Parcel) -> None:
    result = _record(parcel, RESULT)
    hashes = result.pop("files")
    if result["key"] != parcel.key:
        raise ValueError(f"its result has the key {result['key']}")
    for name, written in hashes.items():
        if hashlib.sha256(parcel.files[name]).hexdigest() != written:
            raise ValueError(f"{name} has another SHA-256 than its result says")
    if _is_here(store, parcel):
        return
    _begin(store, parcel)
    inference = load(parcel.files[INFERENCE]) if INFERENCE in hashes else None
    predictions = load(parcel.files[PREDICTIONS])["predictions"]
    store.complete(parcel.key, result, load(parcel.files[WEIGHTS]), predictions, inference)


def _unpack_state(store: Store, parcel: Parcel) -> None:
    _begin(store, parcel)
    state, here = _state(parcel), store.checkpoint(parcel.key)
    if state is not None and (here is None or place_of(here) < place_of(state)):
        store.save_checkpoint(parcel.key, state)
    if FAILED in parcel.files:
        failure = _record(parcel, FAILED)
        store.fail(parcel.key, failure["status"], failure["reason"], failure["epoch"])


def _begin(store: Store, parcel: Parcel) -> None:
    document = _record(parcel, SPEC)
    document.pop("key")
    spec = StageSpec.from_document(document)
    if spec.key != parcel.key:
        raise ValueError(f"its specification has the key {spec.key}")
    store.begin(spec)


def _record(parcel: Parcel, name: str) -> Record:
    record: Record = json.loads(parcel.files[name])
    return record


def _state(parcel: Parcel) -> Record | None:
    """The resume state in it; as in a store, one that cannot be read is as good as none."""
    try:
        state: Record = load_whole(parcel.files[CHECKPOINT])
        place_of(state)
    except Exception:  # torch raises many kinds
        return None
    return state
