"""The output tables that a worker has open, each filled before a stage run reads it."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from smskd.data import ResidentBatches
from smskd.frozen import Frozen, Live
from smskd.output_table import OutputTable, Storage, TableSettings, drawn, looked_up
from smskd.taps import POOLED, Network
from smskd.train import StageRun
from smskd_bench.parallel import memory_bytes
from smskd_bench.spec import StageSpec
from smskd_bench.tables import TableKey, TablePlan, room_for, size_text

TableChoice = Literal["auto", "off", "fp16", "fp32"]

OPEN_AT_ONCE = 4
TELL_EVERY_S = 0.5
WHOSE = "network"
"""File that names the stage run whose network a table is of."""

STORED: dict[str, Storage] = {"table fp16": "fp16", "table fp32": "fp32"}
"""How a stage run's sources name a table."""

MEMORY_SHARE = 0.5
"""Of the machine's memory, what a table may take: a larger one would be read from the disk."""


@dataclass
class TableShelf:
    """Tables by network, opened when first read.

    Attributes:
        root: Folder of all tables.
        planned: Tables that are worth making (:func:`smskd_bench.tables.plan_tables`).
        choice: "auto" stores fp16; a resumed stage run goes on as it began.
        filling: Called with entries done and to do while one is filled.
        note: Called with a message when one cannot be had and the network is run live.
    """

    root: Path
    planned: Mapping[TableKey, TablePlan]
    choice: TableChoice = "auto"
    filling: Callable[[StageSpec, int, int], None] = lambda spec, done, total: None
    note: Callable[[StageSpec, str], None] = lambda spec, text: None
    _open: dict[tuple[TableKey, Storage, bool], OutputTable] = field(default_factory=dict)

    def serve(
        self, spec: StageSpec, run: StageRun, data: ResidentBatches, begun: Mapping[str, str]
    ) -> dict[str, str]:
        """Put filled tables in place of the live networks of a stage run, where that is planned.

        Args:
            spec: The stage run.
            run: Its networks; replaced in place.
            data: Its training set.
            begun: The sources it was begun with, empty if it was not.

        Returns:
            The source of the "teacher" and of the "reference", of those there are.
        """
        sources: dict[str, str] = {}
        if run.teachers:
            frozen = [
                self._replace(teacher, key, spec, data, run.epoch, begun.get("teacher"))
                for teacher, key in zip(run.teachers, spec.teachers, strict=True)
            ]
            run.teachers = frozen
            sources["teacher"] = " and ".join(dict.fromkeys(f.source for f in frozen))
        if run.anchor and spec.parent:
            run.anchor.network = self._replace(
                run.anchor.network, spec.parent, spec, data, run.epoch, begun.get("reference")
            )
            sources["reference"] = run.anchor.network.source
        return sources

    def _replace(
        self,
        frozen: Frozen,
        key: str,
        spec: StageSpec,
        data: ResidentBatches,
        epochs_done: int,
        begun: str | None,
    ) -> Frozen:
        network: TableKey = (key, spec.training.precision)
        storage = self._storage(network, begun)
        first, last = spec.first_epoch + epochs_done + 1, spec.first_epoch + spec.training.epochs
        return looked_up(
            frozen,
            lambda live: self._table(spec, network, storage, live, data) if storage else None,
            lambda: drawn(data, range(first, last + 1)),
            partial(self.note, spec),
            self._progress(spec),
        )

    def retire(self, is_over: Callable[[str], bool]) -> None:
        """Delete tables that were read as references only, once all their readers are over."""
        passing = {
            plan.network for plan in self.planned.values()
            if plan.passing and all(map(is_over, plan.users))
        }  # fmt: skip
        for place in [place for place in self._open if place[0][0] in passing]:
            self._open.pop(place)
        for path in self.root.glob(f"*/{WHOSE}"):
            if path.read_text(encoding="utf-8") in passing:
                _delete_unless_held(path.parent)

    def clear(self) -> None:
        """Close all tables; those that are needed again are opened again."""
        self._open.clear()

    def _say_whose(self, table: OutputTable, network: str) -> None:
        (table.folder / WHOSE).write_text(network, encoding="utf-8")

    def _progress(self, spec: StageSpec) -> Callable[[int, int], None]:
        """Tells of filling, but not more often than anyone can read."""
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                self.filling(spec, done, total)

        return progress

    def _storage(self, network: TableKey, begun: str | None) -> Storage | None:
        """How to store it, or None to run it live."""
        if self.choice == "auto" and begun is not None:
            return STORED.get(begun)
        if self.choice == "off" or network not in self.planned:
            return None
        return "fp16" if self.choice == "auto" else self.choice

    def _table(
        self,
        spec: StageSpec,
        network: TableKey,
        storage: Storage,
        live: Live,
        data: ResidentBatches,
    ) -> OutputTable:
        planned = self.planned.get(network)
        pooled = POOLED in live.network.roles or (planned is not None and planned.pooled)
        place = (network, storage, pooled)
        if place not in self._open:
            while len(self._open) >= OPEN_AT_ONCE:
                self._open.pop(next(iter(self._open)))
            settings = TableSettings(storage, network[1], pooled)
            frozen = Network(live.network.model, live.network.taps)
            self._open[place] = OutputTable(
                self.root,
                frozen,
                data,
                settings,
                lambda size: why_no_room(size, self.root),
                lambda: self.note(spec, "another process fills a table that this reads; waiting"),
            )
            self._say_whose(self._open[place], network[0])
        return self._open[place]


def why_no_room(table_bytes: int, folder: Path) -> str | None:
    """Why neither disk nor memory has room for a table, or None."""
    limit = MEMORY_SHARE * memory_bytes()
    if table_bytes > limit:
        return (
            f"it takes {size_text(table_bytes)}, and no more than {size_text(limit)} of this "
            "machine's memory are given to one"
        )
    return room_for(table_bytes, folder)


def _delete_unless_held(folder: Path) -> None:
    """Delete a table that no process is filling now; who has it open keeps its pages."""
    try:
        with (folder / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return
