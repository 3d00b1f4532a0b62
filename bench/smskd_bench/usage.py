"""Which processes use a store, and for what, so that nobody takes away what another one needs.

A process that trains or exports names the stage runs that it may need before it looks which of them
are there. Who removes something, or changes the format, first takes the one lease of maintenance
and then looks who is there. So either sees the other: the newcomer waits until that is over, and
what was named by somebody who came before is left alone.

    <store>/users/<process>-<token>/  keys.json, lock, lease.json (leases.py)
    <store>/maintenance/              lock, lease.json
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from smskd.atomic import write_json
from smskd.errors import StoreError
from smskd_bench.leases import LEASE, STALE_S, Held, LeaseBook, Owner, holder, read_owner, this_host

USERS, MAINTENANCE, KEYS = "users", "maintenance", "keys.json"
DEAD_S = 600.0
"""From what age on a folder without a lease of this machine is what a kill left."""

LOOK_AGAIN_S = 0.1
TRIES = 20
"""How often something is tried that others keep for an instant, such as a lock they look at."""


@dataclass(frozen=True)
class User:
    """A process that uses the store now, and the stage runs that it may need."""

    owner: Owner
    keys: frozenset[str]


@contextmanager
def in_use(
    root: Path, keys: Iterable[str], book: LeaseBook, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Keep stage runs from being removed, and the store from being migrated, in this block.

    Args:
        root: The store.
        keys: All that may be needed, with all that it builds on.
        book: The leases of this process.
        waiting: Called once if somebody is at maintenance, which is waited for.

    Raises:
        OSError: the store cannot be written.
    """
    folder = root / USERS / f"{os.getpid()}-{secrets.token_hex(8)}"
    _clear_dead(root)
    folder.mkdir(parents=True)
    held = None
    try:
        held = _take(folder, book)
        if held is None:
            raise StoreError(f"{folder} cannot be locked", "see that its file system has locks")
        write_json(folder / KEYS, sorted(keys))
        _wait_for_maintenance(root, waiting)
        yield
    finally:
        if held is not None:
            book.give_back(held)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def maintenance(root: Path, book: LeaseBook) -> Iterator[None]:
    """Let nobody begin to use the store in this block; look for users inside of it.

    Raises:
        StoreError: somebody else is at it.
        OSError: the store cannot be written.
    """
    held = _take(root / MAINTENANCE, book)
    if held is None:
        raise StoreError(
            f"another process cleans up or migrates the store {root}", "try again when it is over"
        )
    try:
        yield
    finally:
        book.give_back(held)


def _take(folder: Path, book: LeaseBook) -> Held | None:
    """Take a lease, also one that nobody seems to have any more, which is sure after a minute."""
    seen_alive, until = 0, time.monotonic() + 1.2 * STALE_S
    while seen_alive < TRIES and time.monotonic() < until:
        if (held := book.take(folder)) is not None:
            return held
        seen_alive += holder(folder) is not None
        time.sleep(LOOK_AGAIN_S)
    return None


def users(root: Path) -> list[User]:
    """All processes that use the store now.

    Raises:
        StoreError: what one of them needs cannot be read.
    """
    found = []
    for folder in sorted((root / USERS).glob("*")):
        owner = holder(folder)
        if owner is not None and (keys := _keys(folder)) is not None:
            found.append(User(owner, keys))
    return found


def dead_users(root: Path) -> list[Path]:
    """Folders that processes left which were killed."""
    return [path for path in (root / USERS).glob("*") if path.is_dir() and _is_dead(path)]


def _is_dead(folder: Path) -> bool:
    if holder(folder) is not None:
        return False
    owner = read_owner(folder / LEASE)
    if owner is not None and owner.host == this_host():
        return True  # the kernel has told
    with suppress(OSError):
        return time.time() - folder.stat().st_mtime > DEAD_S
    return False


def _clear_dead(root: Path) -> None:
    for folder in dead_users(root):
        shutil.rmtree(folder, ignore_errors=True)


def _keys(folder: Path) -> frozenset[str] | None:
    """What a process needs, which it writes as soon as it is seen; None if it ended meanwhile."""
    reason = ""
    for _ in range(TRIES):
        try:
            return frozenset(json.loads((folder / KEYS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            reason = str(error)
        if not folder.exists() or holder(folder) is None:
            return None
        time.sleep(LOOK_AGAIN_S)
    raise StoreError(
        f"{folder / KEYS} is damaged: {reason}",
        "it says what a running process needs: wait for that process to end",
    )


def _wait_for_maintenance(root: Path, waiting: Callable[[], None]) -> None:
    told = False
    while holder(root / MAINTENANCE) is not None:
        if not told:
            waiting()
            told = True
        time.sleep(LOOK_AGAIN_S)
