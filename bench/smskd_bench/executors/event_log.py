"""News of jobs on other machines, through files in a folder that all of them share.

A job appends a line for each thing that an observer is to be told, and the driver reads what is new
in every file. Lines may be lost with a job, or come late over a network; what counts is the store.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd.meter import Row
from smskd_bench.executors.observing import Status
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record

ENDING = ".jsonl"


@dataclass(frozen=True)
class Event:
    """What a job said.

    Attributes:
        job: Which one, by its file's name.
        what: A call of an :class:`~smskd_bench.executors.observing.Observer`, or what became of
            the job itself: "start", "left", "stopped", "refused", "defect".
        key: Of which stage run; "" for the job itself.
        rest: With what else.
    """

    job: str
    what: str
    key: str = ""
    rest: tuple[Any, ...] = ()


class EventLog:
    """An observer that writes down what it is told; results are not copied, only that they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, what: str, key: str = "", *rest: Any) -> None:
        """Append a line; one that cannot be written is lost, which harms nobody."""
        line = json.dumps([what, key, rest])
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # a job that was killed may have left half a line

    def begin(self, spec: StageSpec) -> None:
        """See :class:`~smskd_bench.executors.observing.Observer`, as for all of these."""
        self.tell("begin", spec.key)

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """An epoch is done."""
        self.tell("epoch", spec.key, dict(row))

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """A stage run ended; its result is in the store."""
        self.tell("end", spec.key, status, reason)

    def waiting(self, spec: StageSpec) -> None:
        """Another process has it."""
        self.tell("waiting", spec.key)

    def skip(self, spec: StageSpec, reason: str) -> None:
        """It is not run here."""
        self.tell("skip", spec.key, reason)

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """It will begin again."""
        self.tell("put_back", spec.key, reason)

    def note(self, spec: StageSpec, text: str) -> None:
        """Something to know."""
        self.tell("note", spec.key, text)

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """Its table is being filled."""
        self.tell("filling", spec.key, done, total)


class EventReader:
    """Reads the files of a folder as they grow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, int] = {}

    def news(self) -> list[Event]:
        """What was said since the last call, each job's words in their order."""
        return [e for path in sorted(self.folder.glob(f"*{ENDING}")) for e in self._of(path)]

    def _of(self, path: Path) -> list[Event]:
        start = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read[path] = start + whole
        events = (_parsed(path.stem, line) for line in data[:whole].splitlines() if line)
        return [event for event in events if event is not None]


def _parsed(job: str, line: bytes) -> Event | None:
    try:
        what, key, rest = json.loads(line)
        return Event(job, what, key, tuple(rest))
    except (ValueError, TypeError):
        return None
