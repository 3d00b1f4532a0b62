"""Who works on a stage run: one process at a time, on one machine or on several.

Two locks, because neither is enough. ``flock`` ends with the process, however that ends, but a
shared file system may not carry it to other machines. A lease is a file made exclusively, which
every file system does, that its owner changes every ten seconds; one that stays the same for a
minute, by the watcher's own clock, belongs to nobody any more. A machine that slept through its
lease finds another name in it and stops.

    <folder>/lock        held by the kernel
    <folder>/lease.json  {"host": ..., "pid": ..., "token": ..., "beat": ...}
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from io import IOBase
from pathlib import Path

from smskd.strict_json import parse_json

LOCK, LEASE = "lock", "lease.json"
BEAT_S = 10.0
STALE_S = 60.0


class LeaseLostError(Exception):
    """Another machine took a stage run over, because ours did not show itself for a minute."""


@dataclass(frozen=True)
class Owner:
    """What a lease says.

    Attributes:
        host: Machine, told apart by its boot too.
        name: Its host name, for people.
        pid: Process.
        token: Of this very lease.
        beat: Counts up while the owner lives.
    """

    host: str
    name: str
    pid: int
    token: str
    beat: int = 0


DAMAGED = Owner("", "", 0, "")
"""A lease that cannot be read: just made, or hit by a power cut."""


@dataclass
class Held:
    """A stage run that this process holds.

    Attributes:
        folder: Of the stage run.
        owner: We, as the lease says.
        lost: Another machine took it, as ours did not show itself for a minute.
    """

    folder: Path
    owner: Owner
    handle: IOBase
    lost: bool = False


class LeaseBook:
    """The leases of this process, kept alive by one thread; pickled, it arrives empty.

    Args:
        host: What to call this machine in them; default: its name and boot.
    """

    def __init__(self, host: str | None = None) -> None:
        self._host = host or this_host()
        self._held: dict[str, Held] = {}
        self._seen: dict[str, tuple[Owner, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[LeaseBook], tuple[()]]:
        return (LeaseBook, ())

    def take(self, folder: Path) -> Held | None:
        """Hold the stage run in ``folder``, or None if somebody else does.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a")
        try:
            owner = self._claim(folder) if try_lock(handle.fileno()) else None
        except BaseException:
            handle.close()
            raise
        if owner is None:
            handle.close()
            return None
        held = Held(folder, owner, handle)
        with self._lock:
            self._held[str(folder)] = held
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)
                self._thread.start()
        return held

    def give_back(self, held: Held) -> None:
        """Let others have it."""
        with self._lock:
            self._held.pop(str(held.folder), None)
        if not held.lost:
            with suppress(OSError):  # read-only by now: it ends with us, or after a minute
                (held.folder / LEASE).unlink()
        held.handle.close()

    def lost(self, folder: Path) -> bool:
        """Whether a stage run that we took has another owner by now."""
        held = self._held.get(str(folder))
        return held is not None and held.lost

    def _claim(self, folder: Path) -> Owner | None:
        """Make the lease ours; None if a machine that seems alive has it."""
        path = folder / LEASE
        ours = Owner(self._host, socket.gethostname(), os.getpid(), secrets.token_hex(16))
        if path.exists():
            found = read_owner(path) or DAMAGED
            # On our own machine the kernel's lock has told that its owner is gone.
            if found.host != ours.host and not self._is_stale(path, found):
                return None
            _take_away(path, found)
        return ours if _write_new(path, ours) else None

    def _is_stale(self, path: Path, found: Owner) -> bool:
        owner, since = self._seen.get(str(path), (None, 0.0))
        now = time.monotonic()
        if owner != found:
            self._seen[str(path)] = (found, now)
            return False
        return now - since > STALE_S

    def _keep(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self._lock:
                held = list(self._held.values())
            for one in held:
                with suppress(OSError):  # a full disk: the next beat may do
                    self._beat(one)

    def _beat(self, held: Held) -> None:
        path = held.folder / LEASE
        found = read_owner(path)
        with self._lock:
            if str(held.folder) not in self._held:
                return  # given back meanwhile
            if found is None or found.token != held.owner.token:
                held.lost = True
                return
            held.owner = replace(held.owner, beat=held.owner.beat + 1)
            _write(path, held.owner)


def holder(folder: Path) -> Owner | None:
    """Who holds a stage run now, as far as can be seen without waiting; None if nobody does."""
    owner = read_owner(folder / LEASE)
    lock = folder / LOCK
    if not lock.exists():
        return None
    with lock.open() as handle:
        if not try_lock(handle.fileno()):
            return owner or Owner("", "this machine", 0, "")
    if owner is None or owner.host == this_host():
        return None  # its process is gone
    with suppress(OSError):
        if time.time() - (folder / LEASE).stat().st_mtime < 2 * STALE_S:
            return owner
    return None


def read_owner(path: Path) -> Owner | None:
    """What a lease says; None if there is none, or nothing that can be read."""
    try:
        owner = Owner(**parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    texts, counts = (owner.host, owner.name, owner.token), (owner.pid, owner.beat)
    known = all(isinstance(text, str) for text in texts) and all(type(n) is int for n in counts)
    return owner if known else None


def try_lock(handle: int) -> bool:
    """Take the kernel's lock, if nobody has it; a file system without any has it free always."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _write_new(path: Path, owner: Owner) -> bool:
    """Write a lease where there is none, in one step; False if somebody was faster."""
    temporary = path.with_name(f".{path.name}.{owner.token}.tmp")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    try:
        os.link(temporary, path)  # whole at once: a kill leaves no lease of nobody
    except FileExistsError:
        return False
    except OSError:  # not every file system has hard links
        return _write_new_in_two_steps(path, owner)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_new_in_two_steps(path: Path, owner: Owner) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    _write(path, owner)
    return True


def _write(path: Path, owner: Owner) -> None:
    """Write a lease so that nobody ever reads half of it."""
    temporary = path.with_name(f".{path.name}.{owner.token}.tmp")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    temporary.replace(path)


def _take_away(path: Path, found: Owner) -> None:
    """Remove the lease that was found, and no newer one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    moved = read_owner(aside)
    if moved is not None and moved.token != found.token:
        with suppress(OSError):  # somebody was faster than we: it is theirs
            os.link(aside, path)
    aside.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def this_host() -> str:
    """This machine since it was started: containers of one host share the boot, not the name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
