"""An observer in a worker process: every call becomes a message to the parent."""

from __future__ import annotations

from collections.abc import Callable

from smskd.meter import Row
from smskd_bench.executors.messages import Told
from smskd_bench.executors.observing import Status
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record


class Teller:
    """Passes on what its observers are to be told.

    Args:
        tell: Sends one message.
    """

    def __init__(self, tell: Callable[[Told], None]) -> None:
        self._tell = tell

    def begin(self, spec: StageSpec) -> None:
        """See :class:`smskd_bench.executors.observing.Observer`, here and below."""
        self._tell(Told("begin", spec.key))

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """An epoch is done."""
        self._tell(Told("epoch", spec.key, (row,)))

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """It ended, well or not."""
        self._tell(Told("end", spec.key, (status, result, reason)))

    def waiting(self, spec: StageSpec) -> None:
        """Another process has it."""
        self._tell(Told("waiting", spec.key))

    def skip(self, spec: StageSpec, reason: str) -> None:
        """It is not run here."""
        self._tell(Told("skip", spec.key, (reason,)))

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """It has to begin again."""
        self._tell(Told("put_back", spec.key, (reason,)))

    def note(self, spec: StageSpec, text: str) -> None:
        """Something to know."""
        self._tell(Told("note", spec.key, (text,)))

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """A table is filled."""
        self._tell(Told("filling", spec.key, (done, total)))
