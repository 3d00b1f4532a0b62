"""Observes an execution and passes it on to a tracker, in a tracker's words."""

from __future__ import annotations

from pathlib import Path

from smskd.meter import Row
from smskd_bench.executors.observing import Status
from smskd_bench.plan import Cell, Plan
from smskd_bench.spec import StageSpec
from smskd_bench.store import WEIGHTS, Record, Store
from smskd_bench.tracking import ArtifactRef, RunCard, Tracker


class MirrorObserver:
    """One tracked run a stage run; the matrix is the group."""

    def __init__(self, tracker: Tracker, plan: Plan, store: Store, project: str) -> None:
        self.tracker = tracker
        self.plan = plan
        self.store = store
        self.project = project
        self.cells = _cells(plan)
        self.teachers = {key for cell in plan.cells for key in cell.teachers}

    def begin(self, spec: StageSpec) -> None:
        """Open the run."""
        self.tracker.begin(
            RunCard(
                key=spec.key,
                name=spec.label,
                project=self.project,
                group=self.plan.matrix.name,
                job_type=self._job(spec),
                folder=self.store.root / "wandb",
                tags=self._tags(spec),
                config={**spec.document(), "key": spec.key, **self._place(spec)},
                inputs=self._inputs(spec),
            )
        )

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """Log an epoch."""
        self.tracker.log(spec.key, row, int(row["epoch"]))

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """Close the run with what a leaderboard sorts by."""
        summary: dict[str, object] = {"status": status, **self._place(spec)}
        if result is None:
            self.tracker.end(spec.key, status, {**summary, "reason": reason}, None)
            return
        summary |= {f"test_{name}": value for name, value in result["test"].items()}
        summary |= {"images_per_s": result["images_per_s"], "seconds": result["train_seconds"]}
        if result["kept"]:
            summary |= {f"reference_{name}": value for name, value in result["kept"].items()}
        weights = self.store.folder(spec.key) / WEIGHTS
        self.tracker.end(spec.key, status, summary, weights)

    def waiting(self, spec: StageSpec) -> None:
        """Nothing to tell."""

    def skip(self, spec: StageSpec, reason: str) -> None:
        """Nothing to tell."""

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """Nothing to tell: its run stays open, and goes on when it begins again."""

    def note(self, spec: StageSpec, text: str) -> None:
        """Nothing to record: the result says how it was made."""

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """Nothing to record."""

    def _job(self, spec: StageSpec) -> str:
        return "teacher" if spec.key in self.teachers else "student"

    def _tags(self, spec: StageSpec) -> tuple[str, ...]:
        methods = tuple(method.name for method in spec.methods)
        return (*methods, spec.model, spec.dataset.name, f"stage-{spec.number}")

    def _place(self, spec: StageSpec) -> dict[str, object]:
        """Where in the matrix this is: of the first cell that uses it; ``final`` marks rows."""
        cell = self.cells.get(spec.key)
        place: dict[str, object] = {"seed": spec.seed, "stage": spec.number, "model": spec.model}
        if cell:
            final = cell.stages[-1] == spec.key
            place |= {"pair": cell.pair, "row": cell.row, "final": final}
        return place

    def _inputs(self, spec: StageSpec) -> tuple[ArtifactRef, ...]:
        teachers = [ArtifactRef("teacher", key, self._weights(key)) for key in spec.teachers]
        parent = (
            [ArtifactRef("parent", spec.parent, self._weights(spec.parent))] if spec.parent else []
        )
        return (*teachers, *parent)

    def _weights(self, key: str) -> Path:
        return self.store.folder(key) / WEIGHTS


def _cells(plan: Plan) -> dict[str, Cell]:
    """For each stage run a cell it belongs to, preferably one that it finishes."""
    cells: dict[str, Cell] = {}
    for cell in plan.cells:
        for key in cell.stages:
            cells.setdefault(key, cell)
    for cell in reversed(plan.cells):
        cells[cell.stages[-1]] = cell
    return cells
