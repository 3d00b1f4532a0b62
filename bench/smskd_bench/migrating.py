"""``smskd-bench migrate``: bring a store of an older format to the one of this program.

A command of its own, and not done by the way: a store may lie in a folder that others share, whose
older programs could not read it any more. Looking at it must not do that to them.

A step may be killed at any moment. ``store.json`` says "1 to 2" meanwhile, which no command but
this one accepts, and the step is begun again: steps go on from whatever an earlier try left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from smskd.atomic import write_json
from smskd.errors import StoreError
from smskd_bench import store as stores
from smskd_bench.leases import LeaseBook
from smskd_bench.store import MARKER, Store
from smskd_bench.usage import maintenance, users

Step = Callable[[Path], None]
"""Makes a store (its folder) of one format into one of the next; may find its work half done."""

STEPS: dict[int, Step] = {}
"""By the format that a step starts from. Format 1 is the first one."""

UNDER_WAY = re.compile(r"(\d{1,9}) to (\d{1,9})")


def migrate(root: Path, console: Console) -> None:
    """Migrate a store, if it has to be.

    Raises:
        StoreError: there is none, it is in use, or its format is newer or unknown.
    """
    for line in _migrate(root):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _migrate(root: Path) -> Iterator[str]:
    wanted = stores.STORE_FORMAT
    if stores.read_marker(root) is None:
        raise StoreError(f"there is no store in {root}", "name its folder with --store DIR")
    if _steps(root, wanted) == []:
        yield f"{root} has format {wanted}, which is that of this program: nothing to do"
        return
    try:
        with maintenance(root, LeaseBook()):
            _refuse_if_used(root)
            for number in _steps(root, wanted):  # read again: another process may have been faster
                _take_step(root, number)
                yield f"{root}: format {number} -> {number + 1}"
    except OSError as error:
        raise StoreError(
            f"the store {root} cannot be written: {error.strerror or error}",
            "mend that, and run the same command again: it goes on",
        ) from None


def _steps(root: Path, wanted: int) -> list[int]:
    """The steps that are left, by the format that each starts from.

    Raises:
        StoreError: there is no way from the store's format to this program's.
    """
    marker = stores.read_marker(root) or {}
    found = format_before(marker.get("format"))
    if found is None or not all(number in STEPS for number in range(found, wanted)):
        raise stores.other_format(root, marker)
    if found > wanted or (found == wanted and marker.get("format") != wanted):
        raise stores.other_format(root, marker)
    return list(range(found, wanted))


def format_before(value: object) -> int | None:
    """The format that a store has, or had before a migration that was cut short."""
    if isinstance(value, str) and (match := UNDER_WAY.fullmatch(value)):
        before, after = int(match[1]), int(match[2])
        return before if after == before + 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _take_step(root: Path, number: int) -> None:
    backup = root / f"store.format-{number}.json"
    if not backup.exists():
        write_json(backup, {"format": number})
    write_json(root / MARKER, {"format": f"{number} to {number + 1}"})
    STEPS[number](root)
    write_json(root / MARKER, {"format": number + 1})


def _refuse_if_used(root: Path) -> None:
    store = Store(root)
    owners = [user.owner for user in users(root)]
    held = (store.holder(path.name) for path in store.stage_folders())
    owner = next((owner for owner in (*owners, *held) if owner is not None), None)
    if owner is not None:
        raise StoreError(
            f"the store {root} is in use by process {owner.pid} on {owner.name}",
            "migrate it when nothing runs in it",
        )
