"""How a result was made, as its record says: what has to be the same for the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smskd.errors import StoreError
from smskd.output_table import Storage
from smskd_bench.shortcuts import SHORTCUTS
from smskd_bench.store import RETRAIN, Record
from smskd_bench.table_shelf import STORED

LIVE = "live"
REPEATED = ("threads", "folded", "compiled", "teacher", "reference")
"""What a repetition tries to have as it was."""


@dataclass(frozen=True)
class Manner:
    """What a stage run was trained with.

    Attributes:
        threads: CPU threads; None where nothing was trained.
        folded: Seeds in one network.
        compiled: Whether networks were compiled.
        teacher: Source of the teachers' outputs (``live``, ``table fp16``, ``table fp32``, or
            several joined by "and"); empty without teachers.
        reference: The same of the reference.
        mixed: Why it cannot be repeated: sessions of different manners; empty if it can.
    """

    threads: int | None = None
    folded: int = 1
    compiled: bool = False
    teacher: str = ""
    reference: str = ""
    mixed: str = ""

    @property
    def storage(self) -> Storage | None:
        """How tables stored outputs; None without tables."""
        sources = [
            source for text in (self.teacher, self.reference) for source in text.split(" and ")
        ]
        found = {STORED[source] for source in sources if source in STORED}
        return found.pop() if found else None

    def text(self) -> str:
        """In words, e.g. ``1 thread, teacher table fp16, 3 seeds as one network``."""
        words = [f"{self.threads or 0} thread{'' if self.threads == 1 else 's'}"]
        words += [f"{n} {s}" for n in ("teacher", "reference") if (s := getattr(self, n))]
        words += [f"{self.folded} seeds as one network"] if self.folded > 1 else []
        words += ["compiled"] if self.compiled else []
        return ", ".join(words)


def manner_of(record: Record) -> Manner:
    """The manner of a result; one of several manners is answered by that of ``--exact``.

    Raises:
        StoreError: the record does not hold what every record holds.
    """
    try:
        each = [_of_session(session) for session in record["sessions"]]
        if not each:
            return Manner()
        if mixed := ", ".join(_mixed(record["sessions"])):
            last = each[-1]
            sources = (LIVE if last.teacher else "", LIVE if last.reference else "")
            return Manner(last.threads, 1, False, *sources, mixed=f"its sessions differ in {mixed}")
        return each[0]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the record of {str(record.get('key'))[:12]} is damaged: {error!r}", RETRAIN
        ) from None


def _of_session(session: dict[str, Any]) -> Manner:
    return Manner(
        threads=int(session["threads"]),
        folded=int(session.get("folded", 1)),
        compiled=bool(session.get("compiled")),
        teacher=str(session.get("teacher", "")),
        reference=str(session.get("reference", "")),
    )


def _mixed(sessions: list[Record]) -> Iterator[str]:
    for name in ("threads", "device", *SHORTCUTS):
        if len({str(session.get(name)) for session in sessions}) > 1:
            yield name


def differences(recorded: Record, again: Record) -> list[str]:
    """What two results were made with differently, in words: it may change how they are rounded."""
    before, now = manner_of(recorded), manner_of(again)
    theirs, ours = _facts(recorded), _facts(again)
    if not before.mixed:
        theirs |= {name: getattr(before, name) for name in REPEATED}
        ours |= {name: getattr(now, name) for name in REPEATED}
    found = [
        f"{name}: {theirs.get(name)} recorded, {ours.get(name)} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    if _code(recorded).get("dirty") or _code(again).get("dirty"):
        found.append("code was changed since its revision, there or here")
    return [*found, f"{before.mixed}, which cannot be repeated"] if before.mixed else found


def _facts(record: Record) -> dict[str, Any]:
    """What the record says about code, packages and machine, under one name each."""
    environment = _section(record, "environment")
    machine = _section(environment, "machine")
    return {
        "revision": _code(record).get("revision"),
        **_section(environment, "packages"),
        **{name: machine.get(name) for name in ("processor", "system", "python")},
        "device": environment.get("device"),
    }


def _code(record: Record) -> dict[str, Any]:
    return _section(_section(record, "environment"), "code")


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
