"""Which shortcuts a result was made with, as its record says."""

from __future__ import annotations

from smskd_bench.store import Record

SHORTCUTS = ("teacher", "reference", "folded", "compiled")


def shortcuts_of(sessions: list[Record]) -> Record:
    """Which shortcuts a result was made with; a list where its sessions took different ones."""
    found: Record = {}
    for name in SHORTCUTS:
        values = list(dict.fromkeys(s[name] for s in sessions if name in s))
        if values:
            found[name] = values[0] if len(values) == 1 else values
    return found


def took_shortcuts(sessions: list[Record]) -> bool:
    """Whether any session took a shortcut that ``--exact`` does not take."""
    return takes_shortcuts(shortcuts_of(sessions))


def takes_shortcuts(paths: Record) -> bool:
    """Whether a result's ``fast_paths`` name any shortcut."""
    plain: Record = {"teacher": "live", "reference": "live", "folded": 1, "compiled": False}
    return any(value != plain.get(name) for name, value in paths.items())
