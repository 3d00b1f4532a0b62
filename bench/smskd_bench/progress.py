"""What is going on, live: which stage runs, epoch, images a second, time left.

On a terminal bars that refresh, one for all and one for each current stage run; elsewhere one line
for each finished stage run.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from smskd.meter import Row
from smskd_bench.cost import epoch_macs
from smskd_bench.executors.observing import Status
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record


class ProgressDisplay:
    """Observes an execution and shows it; time left comes from the MACs a second reached so far."""

    def __init__(self, console: Console, plan: Plan, left: list[str]) -> None:
        self.console = console
        self.plan = plan
        self.macs = {
            key: epoch_macs(plan.nodes[key], plan) * plan.nodes[key].training.epochs for key in left
        }
        self.total = sum(self.macs.values())
        self.settled = 0  # MACs of stage runs that are over
        self.within: dict[str, int] = {}  # MACs of what is under way, earlier sessions included
        self.spent = 0  # MACs really computed in this session, by all workers together
        self.count = 0
        self.started: float | None = None  # not before the first begins: workers take seconds
        self.live = Progress(
            TextColumn("{task.description}", markup=False),  # names may hold brackets
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[info]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.cells = _cells_by_key(plan)
        self.overall: TaskID = self.live.add_task("matrix", total=max(self.total, 1), info="")
        self.current: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def begin(self, spec: StageSpec) -> None:
        """Show which cell and stage is being trained."""
        text = f"{self.cells.get(spec.key, '')} {spec.label}".strip()
        self.started = self.started or time.perf_counter()
        total = max(spec.training.epochs, 1)
        self.current[spec.key] = self.live.add_task(text, total=total, info="")

    def epoch(self, spec: StageSpec, row: Row) -> None:
        """Advance its bar and that of the matrix."""
        self.spent += epoch_macs(spec, self.plan)
        epoch = int(row["epoch"])
        info = f"epoch {epoch}/{spec.training.epochs}  {row['images_per_s']:,.0f} images/s"
        self.live.update(self.current[spec.key], completed=epoch, info=info)
        self.within[spec.key] = epoch_macs(spec, self.plan) * epoch
        self._advance()

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        """Print a line that stays."""
        self._settle(spec)
        head = f"[{self.count}/{len(self.macs)}] {spec.label}"
        if result is None:
            self._print(f"{head}: {status}: {reason}", "red")
            return
        seconds, speed = result["train_seconds"], result["images_per_s"]
        numbers = f"{result['test']['top1']:6.2f} %  {seconds:7.1f} s  {speed:9,.0f} images/s"
        self._print(f"{head:<44} {numbers}  {self._left()} left", "")

    def waiting(self, spec: StageSpec) -> None:
        """Say that another process has this stage run."""
        self._print(f"{spec.label}: another process is training this; waiting for it", "yellow")

    def skip(self, spec: StageSpec, reason: str) -> None:
        """Count a stage run that is not run here."""
        self._settle(spec)
        self._print(f"[{self.count}/{len(self.macs)}] {spec.label}: {reason}", "yellow")

    def put_back(self, spec: StageSpec, reason: str) -> None:
        """Say why it has to begin again."""
        self._hide(spec)
        self._advance()
        self._print(f"{spec.label}: {reason}", "yellow")

    def note(self, spec: StageSpec, text: str) -> None:
        """Print what is to be known."""
        self._print(f"{spec.label}: {text}", "yellow")

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        """Show how far the table is."""
        if spec.key in self.current:
            info = f"table of its teacher {100 * done // max(total, 1)} %"
            self.live.update(self.current[spec.key], info=info)

    def _settle(self, spec: StageSpec) -> None:
        self._hide(spec)
        self.count += 1
        self.settled += self.macs.get(spec.key, 0)
        self._advance()

    def _hide(self, spec: StageSpec) -> None:
        self.within.pop(spec.key, None)
        if spec.key in self.current:
            self.live.remove_task(self.current.pop(spec.key))

    def _advance(self) -> None:
        self.live.update(self.overall, completed=self._reached(), info=f"{self._left()} left")

    def _reached(self) -> int:
        return self.settled + sum(self.within.values())

    def _left(self) -> str:
        if self.started is None or not self.spent:
            return "?"
        elapsed = time.perf_counter() - self.started
        return duration((self.total - self._reached()) * elapsed / self.spent)

    def _print(self, text: str, style: str) -> None:
        self.live.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
        self.live.console.file.flush()  # a log file should show what is done now, not at the end


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:03 or 3:00:59."""
    total = max(0, round(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cells_by_key(plan: Plan) -> dict[str, str]:
    """The first cell that each stage run belongs to; a teacher belongs to its pair."""
    names: dict[str, str] = {}
    for cell in plan.cells:
        for key in cell.teachers:
            names.setdefault(key, f"{cell.pair}/teacher")
        for key in cell.assistants:
            names.setdefault(key, f"{cell.pair}/assistant/s{cell.seed}")
        for key in cell.stages:
            names.setdefault(key, cell.name)
    return names
