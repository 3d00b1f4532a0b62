"""What a store could do without: what no matrix refers to, and what kills left behind.

Only what this program makes is ever named: folders and files whose names have the store's own form.
Anything else, and all that is reached through a symbolic link, is left alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from smskd.errors import SmskdError
from smskd_bench.leases import LOCK, try_lock
from smskd_bench.spec import StageSpec
from smskd_bench.store import CHECKPOINT, FAILED, KEY, PREVIOUS, Store
from smskd_bench.table_shelf import WHOSE
from smskd_bench.usage import DEAD_S, User, dead_users, users

GONE, SCRATCH = ".gone", "verify"
"""Folders of a store: what is being removed, and where ``verify`` trains."""

OLD_S = 24 * 3600.0
"""Unfinished files without a lock may be in work, or wait for ``--resume``, unless so old."""

UNFINISHED = re.compile(r"\..+\.tmp|\..+\.partial-[0-9a-f]{12}|\.fetching-.+")
TABLE = re.compile("[0-9a-f]{32}")
PICTURE = re.compile(r"(.+)-devices\.(png|html)")
TEST_SETS = "test_sets"


@dataclass(frozen=True)
class Garbage:
    """One thing that could be removed.

    Attributes:
        kind: What it is, in words.
        path: A file or folder in the store.
        label: More about it.
        key: Of the stage run whose lock protects it, if one does.
        lock: File whose kernel lock protects it, if one does.
    """

    kind: str
    path: Path
    label: str = ""
    key: str = ""
    lock: Path | None = None


@dataclass(frozen=True)
class Needed:
    """What is kept.

    Attributes:
        keys: Stage runs that a matrix refers to, or a running process.
        boards: Names of the matrices.
        in_work: Stage runs that are kept only for running processes.
        users: Processes that use the store.
    """

    keys: frozenset[str]
    boards: frozenset[str]
    in_work: frozenset[str]
    users: tuple[User, ...]


def needed(store: Store, wanted: Collection[str], boards: Iterable[str]) -> Needed:
    """What matrices and running processes refer to, with all that it builds on.

    Args:
        store: Where to look for running processes.
        wanted: Keys of the matrices' plans.
        boards: Their names.

    Raises:
        StoreError: what a running process needs cannot be read.
    """
    at_work = users(store.root)
    known = set(wanted).union(*(user.keys for user in at_work))
    for folder in store.stage_folders():
        if folder.name not in known and store.is_running(folder.name):
            known |= _with_foundations(store, folder.name)
    in_work = frozenset(known - set(wanted))
    return Needed(frozenset(known), frozenset(boards), in_work, tuple(at_work))


def unreferred(store: Store, kept: Needed) -> Iterator[Garbage]:
    """What belongs to no stage run that is kept, and pictures of other matrices."""
    for folder in store.stage_folders():
        key = folder.name
        if key not in kept.keys and _plain(folder, store.root):
            yield Garbage("stage run", folder, _stage_label(store, key), key=key)
    for kind, place in (("exports", "exports"), ("measurements", "measurements")):
        for folder in _inside(store.root, place):
            if KEY.fullmatch(folder.name) and folder.name not in kept.keys:
                yield Garbage(kind, folder, f"of {folder.name[:12]}")
    yield from _tables(store, kept)
    if not kept.users:  # else an export may be about to share one
        yield from _test_sets(store, kept)
    for file in _inside(store.root, "pictures"):
        if (name := PICTURE.fullmatch(file.name)) and name[1] not in kept.boards:
            yield Garbage("picture", file)


def leftovers(store: Store) -> Iterator[Garbage]:
    """What killed processes left, whatever matrix it was for."""
    for folder in store.stage_folders():
        found = [*folder.glob(".*.tmp"), *_done_with(folder)]
        if found and _plain(folder, store.root) and not store.is_running(folder.name):
            yield from (Garbage("leftover", path, key=folder.name) for path in found)
    for folder in _inside(store.root, GONE):
        yield Garbage("leftover", folder, "of an earlier gc")
    for folder in dead_users(store.root):
        yield Garbage("leftover", folder, "of a killed process")
    for folder in _inside(store.root, SCRATCH):
        if _is_old(folder, DEAD_S) and not _is_locked(folder / LOCK):  # else it may just begin
            yield Garbage("leftover", folder, "of a killed verify", lock=folder / LOCK)
    for path in _unfinished(store.root):
        yield Garbage("leftover", path, "unfinished")


def size_of(path: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Bytes of a file, or of all files in a folder; several names of one file count once.

    Args:
        path: Links are not followed.
        seen: Files that were counted already; added to.
    """
    seen = set() if seen is None else seen
    files = [path] if not path.is_dir() or path.is_symlink() else _files(path)
    total = 0
    for file in files:
        with suppress(OSError):
            info = file.lstat()
            if (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_size
    return total


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path lies in the store itself, and not behind a symbolic link."""
    return not path.is_symlink() and path.parent.resolve().is_relative_to(root.resolve())


def _with_foundations(store: Store, key: str) -> set[str]:
    """A stage run and all that it builds on, as the specifications in the store say."""
    found: set[str] = set()
    waiting = [key]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            with suppress(SmskdError, KeyError, TypeError):  # locked, its specification not written
                document = store.spec_document(key)
                waiting += [*document["teachers"], *filter(None, [document["parent"]])]
    return found


def _stage_label(store: Store, key: str) -> str:
    try:
        label = StageSpec.from_document(store.spec_document(key)).label
    except (SmskdError, ValueError):
        label = "(no readable spec.json)"
    return f"{key[:12]}  {label}" + ("" if store.is_done(key) else ", not done")


def _tables(store: Store, kept: Needed) -> Iterator[Garbage]:
    for folder in _inside(store.root, "tables"):
        whose = _read(folder / WHOSE)
        if not TABLE.fullmatch(folder.name) or whose in kept.keys:
            continue
        if not whose and not _is_old(folder):  # being made: its name is written last
            continue
        if not _is_locked(folder / LOCK):
            yield Garbage("table", folder, f"of {whose[:12] or 'nobody'}", lock=folder / LOCK)


def _test_sets(store: Store, kept: Needed) -> Iterator[Garbage]:
    """Test images that no kept bundle shares."""
    exports = _inside(store.root, "exports")
    bundles = [folder for folder in exports if folder.name in kept.keys]
    shared = {_identity(file) for folder in bundles for file in _files(folder)}
    for folder in _inside(store.root, f"exports/{TEST_SETS}"):
        if KEY.fullmatch(folder.name) and not any(_identity(f) in shared for f in _files(folder)):
            yield Garbage("test set", folder)


def _done_with(folder: Path) -> Iterator[Path]:
    """Files that a finished stage run needs no more."""
    if (folder / "result.json").exists():
        yield from (path for n in (CHECKPOINT, PREVIOUS, FAILED) if (path := folder / n).exists())


def _unfinished(root: Path) -> Iterator[Path]:
    """Unfinished files and folders outside of stage runs, old enough to be nobody's."""
    places = [path for path in root.iterdir() if path.name in ("exports", "measurements")]
    tables = _inside(root, "tables")
    single = [root, root / "pictures", root / "tables", *tables]
    near = (path for folder in single if _plain(folder, root, True) for path in folder.iterdir())
    deep = (path for place in places if _plain(place, root) for path in _entries(place))
    for path in chain(near, deep):
        if UNFINISHED.fullmatch(path.name) and _is_old(path) and is_inside(path, root):
            yield path


def _entries(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder; what is unfinished is not looked into."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))
        folders[:] = [name for name in folders if not UNFINISHED.fullmatch(name)]


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _inside(root: Path, name: str) -> list[Path]:
    """What lies in a folder of the store, if that is no link; links in it are left out."""
    folder = root / name
    if not _plain(folder, root):
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink())


def _plain(folder: Path, root: Path, itself: bool = False) -> bool:
    if itself and folder == root:
        return True
    return folder.is_dir() and is_inside(folder, root)


def _is_old(path: Path, seconds: float = OLD_S) -> bool:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > seconds
    return False


def _is_locked(path: Path) -> bool:
    """Whether a process holds the kernel's lock on a file."""
    with suppress(OSError), path.open() as handle:
        return not try_lock(handle.fileno())
    return False


def _identity(file: Path) -> tuple[int, int]:
    info = file.lstat()
    return info.st_dev, info.st_ino


def _read(path: Path) -> str:
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").strip()
    return ""
