"""The output tables that a worker has open, each filled before a stage run reads it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smskd.data import ResidentBatches
from smskd.errors import TableError
from smskd.frozen import Frozen, Live
from smskd.output_table import OutputTable, Storage, TableSettings, drawn
from smskd.taps import POOLED, Network
from smskd.train import StageRun
from smskd_bench.spec import StageSpec
from smskd_bench.tables import TableKey, TablePlan, room_for

TableChoice = Literal["auto", "off", "fp16", "fp32"]

OPEN_AT_ONCE = 4
TELL_EVERY_S = 0.5


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
        if storage is None or not isinstance(frozen, Live) or frozen.network.roles - {POOLED}:
            return frozen
        first, last = spec.first_epoch + epochs_done + 1, spec.first_epoch + spec.training.epochs
        try:
            table = self._table(network, storage, frozen, data)
            table.fill(drawn(data, range(first, last + 1)), self._progress(spec))
        except TableError as error:
            self.note(spec, f"{error.message}; the network is run live instead")
            return frozen
        frozen.close()
        return table

    def retire(self, spec: StageSpec, is_done: Callable[[str], bool]) -> None:
        """Delete tables that were read as references only and whose last user is now done."""
        for place in list(self._open):
            plan = self.planned.get(place[0])
            if plan and plan.passing and spec.key in plan.users and all(map(is_done, plan.users)):
                shutil.rmtree(self._open.pop(place).folder, ignore_errors=True)

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
            return {"table fp16": "fp16", "table fp32": "fp32"}.get(begun)  # type: ignore[return-value]
        if self.choice == "off" or network not in self.planned:
            return None
        return "fp16" if self.choice == "auto" else self.choice

    def _table(
        self, network: TableKey, storage: Storage, live: Live, data: ResidentBatches
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
                self.root, frozen, data, settings, lambda size: room_for(size, self.root)
            )
        return self._open[place]
