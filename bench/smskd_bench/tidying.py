"""``smskd-bench gc``: list, and remove if that is asked for, what a store could do without."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from smskd.errors import StoreError
from smskd_bench.config import load_matrix
from smskd_bench.garbage import (
    GONE,
    Garbage,
    Needed,
    is_inside,
    leftovers,
    needed,
    size_of,
    unreferred,
)
from smskd_bench.leases import try_lock
from smskd_bench.plan import make_plan
from smskd_bench.store import Store
from smskd_bench.tables import size_text
from smskd_bench.usage import maintenance


@dataclass(frozen=True)
class TidyRequest:
    """What the user asked for on the command line.

    Attributes:
        store: Its folder.
        matrices: Files whose stage runs are kept; without any, all are.
        delete: Remove what is found.
    """

    store: Path
    matrices: tuple[Path, ...] = ()
    delete: bool = False


def tidy(request: TidyRequest, console: Console) -> None:
    """Print what no matrix refers to and what kills left, with sizes; remove it if asked to.

    Raises:
        SmskdError: a matrix is wrong, or the store is unreadable, of another format, or cannot be
            written; nothing was removed.
    """
    plans = [make_plan(load_matrix(file)) for file in request.matrices]
    wanted = {key for plan in plans for key in plan.nodes}
    names = [plan.matrix.name for plan in plans]
    store = Store.peek(request.store)
    if not store.is_there():
        raise StoreError(f"there is no store in {request.store}", "name its folder with --store")
    for line in _lines(request, store, wanted, names):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(
    request: TidyRequest, store: Store, wanted: set[str], names: Sequence[str]
) -> Iterator[str]:
    with ExitStack() as held:
        if request.delete:
            try:
                held.enter_context(maintenance(store.root, store.leases))
            except OSError as error:
                raise _unwritable(store, error) from None
        kept = needed(store, wanted, names)
        found = _found(store, kept, bool(request.matrices))
        counted: set[tuple[int, int]] = set()
        sizes = [size_of(one.path, counted) for one in found]
        left = [_put_aside(store, one) if request.delete else "" for one in found]
    for one, size, why in zip(found, sizes, left, strict=True):
        yield f"  {_size(size):>10}  {_name(store, one)}" + (f": left alone, {why}" if why else "")
    if request.delete:
        _empty(store.root / GONE)
    yield from _closing(request, kept, [s for s, why in zip(sizes, left, strict=True) if not why])


def _found(store: Store, kept: Needed, has_matrices: bool) -> list[Garbage]:
    """Each thing once, even if it lies in a folder that is found as well."""
    found = [*(unreferred(store, kept) if has_matrices else ()), *leftovers(store)]
    folders = {one.path for one in found}
    return [one for one in found if folders.isdisjoint(one.path.parents)]


def _closing(request: TidyRequest, kept: Needed, sizes: Sequence[int]) -> Iterator[str]:
    if request.matrices and kept.in_work:
        yield f"kept for running processes: {len(kept.in_work)} stage runs that no matrix names"
    if not request.matrices:
        yield "only leftovers were looked for; with --matrix FILE, also what no matrix refers to"
    total = f"{len(sizes)} thing{'' if len(sizes) == 1 else 's'}, {_size(sum(sizes))}"
    if request.delete:
        yield f"{total}: deleted"
    else:
        yield f"{total}; nothing was deleted" + (": add --delete for that" if sizes else "")


def _size(num_bytes: int) -> str:
    return size_text(num_bytes) if num_bytes >= 0.1 * 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _name(store: Store, one: Garbage) -> str:
    place = one.path.relative_to(store.root)
    return f"{one.kind}  {one.label or place}" if one.kind == "stage run" else (
        f"{one.kind}  {place}" + (f"  ({one.label})" if one.label else "")
    )  # fmt: skip


def _put_aside(store: Store, one: Garbage) -> str:
    """Move it where nobody looks, in one step and under its lock; returns why it was not."""
    if not is_inside(one.path, store.root):
        return "it is behind a link by now"
    with ExitStack() as held:
        if one.key and not held.enter_context(store.try_lock(one.key)):
            return "a process works on it by now"
        if one.lock is not None and one.lock.exists():
            handle = held.enter_context(one.lock.open("a"))
            if not try_lock(handle.fileno()):
                return "a process works on it by now"
        aside = store.root / GONE / f"{secrets.token_hex(4)}-{one.path.name.lstrip('.')}"
        try:
            aside.parent.mkdir(exist_ok=True)
            if not is_inside(aside, store.root):
                return f"{GONE} is a link"
            if one.path.parent != aside.parent:
                one.path.rename(aside)
        except FileNotFoundError:
            return "it is gone by now"
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _empty(folder: Path) -> None:
    """Delete what was put aside; a kill here leaves it for the next time."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _unwritable(store: Store, error: OSError) -> StoreError:
    return StoreError(
        f"the store {store.root} cannot be written: {error.strerror or error}",
        "without --delete it is only looked at",
    )
