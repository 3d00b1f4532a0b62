"""Who is told what happens in an execution, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from smskd.meter import Row
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record

Status = Literal["done", "diverged", "incompatible", "out_of_memory", "failed", "blocked"]


class Observer(Protocol):
    """Is told what happens; progress displays and trackers are observers.

    Several stage runs may be under way at once: what is told of one may come between what is told
    of another.
    """

    def begin(self, spec: StageSpec) -> None:
        """A stage run starts or goes on."""

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """An epoch is done and its checkpoint written."""

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """A stage run ended, well or not."""

    def waiting(self, spec: StageSpec) -> None:
        """Another process is training this stage run."""

    def skip(self, spec: StageSpec, reason: str) -> None:
        """A stage run that was missing is not run: it cannot, or another process finished it."""

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """A stage run was cut short through no fault of its own, and will begin again."""

    def note(self, spec: StageSpec, text: str) -> None:
        """Something a user should know about how a stage run is done; it goes on."""

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """A table that a stage run reads is filled before it trains: so many of its entries."""


@dataclass(frozen=True)
class Observers:
    """Several observers as one; each is told in turn."""

    each: Sequence[Observer]

    def begin(self, spec: StageSpec) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.begin(spec)

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.epoch(spec, row)

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.end(spec, status, result, reason)

    def waiting(self, spec: StageSpec) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.waiting(spec)

    def skip(self, spec: StageSpec, reason: str) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.skip(spec, reason)

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.put_back(spec, reason)

    def note(self, spec: StageSpec, text: str) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.note(spec, text)

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """See :class:`Observer`."""
        for observer in self.each:
            observer.filling(spec, done, total)
