"""The runs of the matrix benchmark, and what their stores say."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from smskd_bench.config import load_matrix
from smskd_bench.environment import code_revision
from smskd_bench.plan import Cell, Plan, make_plan
from smskd_bench.store import WEIGHTS, Record, Store
from smskd_export.yaml_reader import read_yaml

from benchmarks.interleave import Clock
from benchmarks.timed_run import Timed, timed_run
from smskd.atomic import write_json
from smskd.errors import ConfigError, RunError

RUN = (sys.executable, "-m", "smskd_bench.cli", "run")
GIVEN = "given.yaml"


@dataclass(frozen=True)
class CellAlone:
    """One cell in a store of its own.

    Attributes:
        name: ``teacher>student/row/s0``.
        timed: Of its process.
        teacher_s: Seconds of reading and evaluating the given teacher, reading data included.
        stages_s: Seconds of its own stage runs together.
        top1: Test accuracy of its student in percent.
        top1_together: Of the student of the same key in the run of all cells.
        same_bits: Whether both students' weights are equal bit by bit.
    """

    name: str
    timed: Timed
    teacher_s: float
    stages_s: float
    top1: float
    top1_together: float
    same_bits: bool


@dataclass(frozen=True)
class MeasuredRound:
    """One round.

    Attributes:
        trained: All cells in one run that trains the teacher.
        together: All cells in one run that is given the teacher.
        teacher_s: Seconds of training the teacher in the first of them.
        cells: Each cell alone.
        fast_paths: Which shortcuts the stage runs of ``together`` took, and how many did.
    """

    trained: Timed
    together: Timed
    teacher_s: float
    cells: list[CellAlone]
    fast_paths: dict[str, int]


class Arena:
    """Where the runs of one matrix take place.

    Args:
        matrix: The matrix file; it has one pair, one teacher and no weights.
        work: Folder of everything that is made.
        common: Options of all runs.
        alone: Further options of a cell alone.
        clock: For wall and processor time.
        say: Told what is going on.

    Raises:
        ConfigError: the matrix is not fit for this benchmark.
    """

    def __init__(
        self,
        matrix: Path,
        work: Path,
        common: tuple[str, ...],
        alone: tuple[str, ...],
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self.matrix, self.work, self.common, self.alone = matrix.resolve(), work, common, alone
        self.clock, self.say = clock, say
        loaded = load_matrix(matrix)
        self.plan = make_plan(loaded)
        teachers = {key for cell in self.plan.cells for key in cell.teachers}
        if len(teachers) != 1 or loaded.matrix.teacher.weights:
            raise ConfigError(
                f"{matrix} has {len(teachers)} teachers or names weights",
                "give a matrix of one pair with teacher: {seed: 0} and no weights",
            )
        (self.teacher,) = teachers
        self.title = loaded.matrix.name
        section = loaded.matrix.dataset
        self.images = f"{section.name} {section.train_size or 'all'}"

    def round(self, number: int) -> MeasuredRound:
        """Run what is not there yet of one round and read all of it."""
        folder = self.work / f"round-{number}"
        trained = self._run(self.matrix, folder / "trained", ())
        first = Store.peek(self.work / "round-1" / "trained" / "store")
        plan = self._give_teacher(first.folder(self.teacher) / WEIGHTS)
        given = plan.loaded.file
        together = self._run(given, folder / "together", ())
        cells = [
            self._cell(plan, given, folder, i, cell) for i, cell in enumerate(plan.cells, start=1)
        ]
        teacher = _result(Store.peek(folder / "trained" / "store"), self.teacher)
        store = Store.peek(folder / "together" / "store")
        paths = _fast_paths(_result(store, key) for key in plan.nodes)
        return MeasuredRound(trained, together, teacher["wall_seconds_last_session"], cells, paths)

    def _cell(self, plan: Plan, matrix: Path, folder: Path, number: int, cell: Cell) -> CellAlone:
        place = folder / f"alone-{number:02d}"
        only = make_plan(plan.loaded, cell.name)
        if [c.name for c in only.cells] != [cell.name]:
            raise ConfigError(f"{cell.name} is part of another cell's name", "rename its row")
        timed = self._run(matrix, place, ("--only", cell.name, *self.alone))
        alone, together = (Store.peek(f / "store") for f in (place, folder / "together"))
        mine, theirs = (_result(store, cell.stages[-1]) for store in (alone, together))
        seconds = {key: _result(alone, key)["wall_seconds_last_session"] for key in only.nodes}
        return CellAlone(
            cell.name, timed, seconds.get(cell.teachers[0], 0.0),
            sum(seconds[key] for key in cell.stages),
            mine["test"]["top1"], theirs["test"]["top1"],
            mine["files"][WEIGHTS] == theirs["files"][WEIGHTS],
        )  # fmt: skip

    def _give_teacher(self, weights: Path) -> Plan:
        """The plan of the same matrix with the teacher's weights given; its file is written."""
        content: dict[str, Any] = dict(read_yaml(self.matrix).content)
        file = self.work / "teacher.safetensors"
        shutil.copyfile(weights, file)
        model = self.plan.nodes[self.teacher].model
        content["teacher"] = {**content.get("teacher", {}), "weights": {model: file.name}}
        write_json(self.work / GIVEN, content)  # JSON is YAML too
        return make_plan(load_matrix(self.work / GIVEN))

    def _run(self, matrix: Path, folder: Path, options: Sequence[str]) -> Timed:
        store = ("--store", str((folder / "store").resolve()))
        asked = (*self.common, *options)
        command = (*RUN, "--matrix", str(matrix.resolve()), *store, *asked)
        timed = timed_run(command, folder, self._identity(matrix, asked), self.clock)
        name = " ".join((folder.parent.name, folder.name))
        self.say(f"{name}: {timed.wall_s:.1f} s, {timed.cpu_s:.1f} CPU s")
        return timed

    def _identity(self, matrix: Path, options: Sequence[str]) -> str:
        """What a finished run was, so that an older one is not taken for it."""
        teacher = self.work / "teacher.safetensors"
        weights = teacher.read_bytes() if matrix.name == GIVEN else b""
        facts = [code_revision(), torch.__version__, list(options), matrix.read_text("utf-8")]
        return hashlib.sha256(json.dumps(facts).encode() + weights).hexdigest()


def _result(store: Store, key: str) -> Record:
    if (result := store.result(key)) is None:
        raise RunError(
            f"{store.root} has no result of {key}", "delete that folder and measure again"
        )
    return result


def _fast_paths(results: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for result in results:
        said = json.dumps(result.get("fast_paths", {}), sort_keys=True)
        counts[said] = counts.get(said, 0) + 1
    return counts
