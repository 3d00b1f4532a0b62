"""Plan: expand a matrix into cells, and cells into a graph of shared stage runs.

Pure: no tensor, no store, no data. A cell (pair, row, seed) is a path in the graph; cells that
begin alike share their beginning, because equal specifications have equal keys.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from smskd_export.records import adapter

from smskd.datasets import dataset_info
from smskd.errors import ConfigError, did_you_mean
from smskd.methods.base import Method, Modifier
from smskd.models import model_entry
from smskd.schedule import equal_budget, stage_epochs
from smskd.settings import Reference, Training
from smskd_bench.collector import collector_paused
from smskd_bench.config import Document, LoadedMatrix
from smskd_bench.matrix import (
    PAIR,
    STUDENT,
    AssistantSection,
    Matrix,
    PairSection,
    RowSection,
    StageSection,
)
from smskd_bench.matrix_checks import weights_file
from smskd_bench.naming import cell_name, row_name
from smskd_bench.spec import (
    DataSpec,
    MethodSpec,
    NamedSettings,
    StageSpec,
    canonical_reference,
    canonical_schedule,
    canonical_split,
)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Attributes:
        pair: Name of the pair.
        row: Name of the row.
        seed: Of the student.
        teachers: Keys of the pair's teachers.
        stages: Keys in the order of the stages, the last one the result.
        assistants: Keys of all stages of the assistants that teach it.
    """

    pair: str
    row: str
    seed: int
    teachers: tuple[str, ...]
    stages: tuple[str, ...]
    assistants: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``teacher>student/row/s0``."""
        return cell_name(self.pair, self.row, self.seed)

    @property
    def teacher(self) -> str:
        """The first (usually the only) of the pair's teachers."""
        return self.teachers[0]

    @property
    def everything(self) -> tuple[str, ...]:
        """Keys of all that it is made of, teachers included."""
        return (*self.teachers, *self.assistants, *self.stages)


@dataclass(frozen=True)
class Plan:
    """Stage runs by key, in an order in which every one comes after what it depends on.

    Attributes:
        loaded: The matrix.
        nodes: All stage runs.
        cells: All cells.
        weights: Files of imported weights, by key.
    """

    loaded: LoadedMatrix
    nodes: dict[str, StageSpec]
    cells: list[Cell]
    weights: dict[str, Path] = field(default_factory=dict)

    @property
    def matrix(self) -> Matrix:
        """The matrix this plan was made from."""
        return self.loaded.matrix

    def stages_before_sharing(self) -> int:
        """Stage runs if every cell trained its own teacher and all of its stages."""
        return len(self.run_alone())

    def run_alone(self) -> list[str]:
        """Keys of what runs if every cell is trained alone, its teacher included."""
        keys = [key for cell in self.cells for key in cell.everything]
        return [key for key in keys if key in self.nodes]


def make_plan(loaded: LoadedMatrix, only: str | None = None) -> Plan:
    """Expand a matrix; ``only`` is a shell pattern on cell names (``*`` matches anything).

    Raises:
        ConfigError: no cell matches ``only``.
    """
    planner = _Planner(loaded)
    with collector_paused():
        cells = [
            planner.cell(pair, index, seed)
            for pair, index, seed in _places(loaded.matrix)
            if only is None or _wanted(_cell_name(loaded.matrix, pair, index, seed), only)
        ]
    if not cells:
        raise _no_match(loaded.matrix, only or "")
    return Plan(loaded, _needed(planner.nodes, cells), cells, planner.weights)


def _needed(nodes: dict[str, StageSpec], cells: list[Cell]) -> dict[str, StageSpec]:
    """The stage runs that the cells depend on: a plain student needs no teacher."""
    needed: set[str] = set()
    waiting = [key for cell in cells for key in cell.stages]
    while waiting:
        key = waiting.pop()
        if key not in needed:
            needed.add(key)
            waiting.extend(nodes[key].depends_on)
    return {key: spec for key, spec in nodes.items() if key in needed}


def _places(matrix: Matrix) -> Iterator[tuple[PairSection, int, int]]:
    """Pair, index of the row, and seed of every cell."""
    for pair in matrix.pairs:
        for index, row in enumerate(matrix.rows):
            if not row.only or pair.name in row.only:
                yield from ((pair, index, seed) for seed in matrix.seeds)


def _cell_name(matrix: Matrix, pair: PairSection, index: int, seed: int) -> str:
    return cell_name(pair.name, row_name(matrix.rows[index]), seed)


def _wanted(name: str, only: str) -> bool:
    # fnmatch reads brackets as sets of characters; here they are themselves.
    return fnmatch.fnmatchcase(name, f"*{only.replace('[', '[[]')}*")


def _no_match(matrix: Matrix, only: str) -> ConfigError:
    names = [_cell_name(matrix, *place) for place in _places(matrix)]
    close = difflib.get_close_matches(only, names, n=3, cutoff=0.5)
    hint = did_you_mean(only, close) if close else f"cells are named like {names[0]!r}"
    return ConfigError(f"no cell matches {only!r}", hint)


class _Planner:
    """Builds stage runs and remembers those it has built."""

    def __init__(self, loaded: LoadedMatrix) -> None:
        self.loaded = loaded
        self.matrix = loaded.matrix
        self.nodes: dict[str, StageSpec] = {}
        self.weights: dict[str, Path] = {}
        self.dataset = _data_spec(self.matrix)
        self.methods = {
            name: _method_spec(method, loaded.modifiers.get(name, ()))
            for name, method in loaded.methods.items()
        }
        self._stages: dict[tuple[object, ...], _Stage] = {}
        self._templates: dict[tuple[int, float | None], StageSpec] = {}
        raw = loaded.raw
        self.rows = [self._resolve(row, raw["rows"][i]) for i, row in enumerate(self.matrix.rows)]
        self._names = [row_name(row) for row in self.matrix.rows]
        self.assistants = {
            name: self._resolve(section, raw["assistants"][name])
            for name, section in self.matrix.assistants.items()
        }
        self._teachers: dict[tuple[str, int], str] = {}
        self._built: dict[tuple[object, ...], str] = {}
        self._lessons: dict[tuple[str, _Lesson], tuple[str, ...]] = {}

    def cell(self, pair: PairSection, row: int, seed: int) -> Cell:
        teachers = tuple(self._teacher(model, seed) for model in pair.teacher)
        lesson = _Lesson(pair.student, pair.lr, seed, teachers)
        assistants, keys = self._sequence(self.rows[row], lesson, lesson)
        return Cell(pair.name, self._names[row], seed, teachers, keys, assistants)

    def _sequence(
        self, stages: list[_Stage], lesson: _Lesson, pair: _Lesson
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Keys of the assistants that a sequence needs, and of its own stages."""
        assistants: dict[str, None] = {}
        keys: list[str] = []
        for stage in stages:
            chains = {name: self._assistant(name, pair) for name in stage.assistants}
            assistants |= dict.fromkeys(key for chain in chains.values() for key in chain)
            teachers: list[str] = []
            for name in stage.section.teacher or (PAIR,):
                teachers += chains[name][-1:] if name in chains else pair.teachers
            keys.append(self._stage(lesson, stage, tuple(teachers), keys[-1] if keys else None))
        return tuple(assistants), tuple(keys)

    def _assistant(self, name: str, pair: _Lesson) -> tuple[str, ...]:
        """Keys of an assistant's stages, those of its own assistants first."""
        if (name, pair) not in self._lessons:
            section = self.matrix.assistants[name]
            same = section.model == STUDENT
            lesson = replace(
                pair,
                model=pair.model if same else section.model,
                lr=section.lr or (pair.lr if same else None),
                seed=pair.seed + section.seed_shift,
            )
            assistants, keys = self._sequence(self.assistants[name], lesson, pair)
            self._lessons[name, pair] = (*assistants, *keys)
        return self._lessons[name, pair]

    def _teacher(self, model: str, seed: int) -> str:
        section = self.matrix.teacher
        seed = seed if section.seed is None else section.seed
        if (model, seed) not in self._teachers:
            spec, file = self._teacher_spec(model, seed)
            self._teachers[model, seed] = self._add(spec)
            if file:
                self.weights[spec.key] = file
        return self._teachers[model, seed]

    def _teacher_spec(self, model: str, seed: int) -> tuple[StageSpec, Path | None]:
        section, recipe = self.matrix.teacher, self.matrix.recipe
        rate = section.lr or recipe.optimizer.lr
        optimizer = replace(recipe.optimizer, lr=rate)
        schedule = canonical_schedule(section.schedule or recipe.first_stage, section.epochs)
        training = Training(
            section.epochs, optimizer, schedule, recipe.batch_size, recipe.precision
        )
        file = section.weights.get(model)
        path = weights_file(file, self.loaded.file) if file else None
        return StageSpec(
            dataset=self.dataset,
            model=model,
            model_version=model_entry(model).version,
            seed=0 if path else seed,
            methods=(self.methods["scratch"],),
            training=Training(0) if path else training,
            imported=_file_sha256(path) if path else None,
        ), path

    def _stage(
        self, lesson: _Lesson, stage: _Stage, teachers: tuple[str, ...], parent: str | None
    ) -> str:
        # Same parent, same stage, same student: the same run, without hashing it again.
        memo = (lesson, stage.identity, teachers, parent)
        key = self._built.get(memo)
        if key is None:
            key = self._add(self._stage_spec(lesson, stage, teachers, parent))
            self._built[memo] = key
        return key

    def _stage_spec(
        self, lesson: _Lesson, stage: _Stage, teachers: tuple[str, ...], parent: str | None
    ) -> StageSpec:
        return self._template(stage, lesson.lr).sibling(
            lesson.model,
            model_entry(lesson.model).version,
            lesson.seed,
            parent,
            teachers if stage.needs_teacher else (),
        )

    def _template(self, stage: _Stage, lr: float | None) -> StageSpec:
        memo = (stage.identity, lr)
        if memo not in self._templates:
            self._templates[memo] = self._of_nobody(stage, lr)
        return self._templates[memo]

    def _of_nobody(self, stage: _Stage, lr: float | None) -> StageSpec:
        """A stage of no student in particular, under a rate if one is given."""
        training = stage.training
        if lr is not None:
            training = replace(training, optimizer=replace(training.optimizer, lr=lr))
        return StageSpec(
            dataset=self.dataset,
            model="",
            model_version=0,
            seed=0,
            methods=stage.methods,
            training=training,
            number=stage.number,
            first_epoch=stage.first_epoch,
            method_weight=stage.section.method_weight,
            ce_weight=stage.section.ce_weight,
            reference=stage.reference,
        )

    def _add(self, spec: StageSpec) -> str:
        self.nodes.setdefault(spec.key, spec)
        return spec.key

    def _resolve(self, row: RowSection | AssistantSection, raw_row: Document) -> list[_Stage]:
        """The stages of one row with every default filled in."""
        recipe = self.matrix.recipe
        epochs = _row_epochs(self.matrix, row)
        resolved: list[_Stage] = []
        for i, section in enumerate(row.stages):
            default = recipe.first_stage if i == 0 else recipe.later_stages
            reference = self._reference(raw_row, raw_row["stages"][i])
            training = Training(
                epochs=epochs[i],
                optimizer=recipe.optimizer,
                schedule=canonical_schedule(section.schedule or default, epochs[i]),
                batch_size=recipe.batch_size,
                precision=recipe.precision,
                carry=section.carry or recipe.carry,
                init=(section.init or recipe.init) if i else "warm",
            )
            methods = tuple(self.methods[name] for name in section.method)
            needs = any(self.loaded.methods[name].needs.teacher for name in section.method)
            stage = _Stage(
                section, i + 1, sum(epochs[:i]), training, methods,
                canonical_reference(reference, i + 1), needs,
            )  # fmt: skip
            # Rows that begin alike get the very same stages, so that these are built once.
            alike = (self._of_nobody(stage, None).key, section.teacher, needs)
            resolved.append(self._stages.setdefault(alike, stage))
        return resolved

    def _reference(self, row: Document, stage: Document) -> Reference:
        merged = merge(self.loaded.raw.get("reference") or {}, row.get("reference") or {})
        merged = merge(merged, stage.get("reference") or {})
        return adapter(Reference).validate_python(merged)


@dataclass(frozen=True)
class _Lesson:
    """Who is taught by whom: the student of a pair, or an assistant of it."""

    model: str
    lr: float | None
    seed: int
    teachers: tuple[str, ...]


@dataclass(frozen=True)
class _Stage:
    section: StageSection
    number: int
    first_epoch: int
    training: Training
    methods: tuple[MethodSpec, ...]
    reference: Reference | None
    method_needs_teacher: bool

    @property
    def identity(self) -> int:
        # Kept by the planner, and the same for all rows, so identity is enough within one plan.
        return id(self)

    @property
    def assistants(self) -> tuple[str, ...]:
        """Names of the assistants that teach it, if it needs a teacher."""
        named = self.section.teacher or ()
        return tuple(n for n in named if n != PAIR) if self.needs_teacher else ()

    @property
    def needs_teacher(self) -> bool:
        weights_do = self.reference is not None and self.reference.weighting.map != "constant"
        return self.method_needs_teacher or weights_do


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    """``base`` with the entries of ``over`` in place of its own, also inside nested mappings."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _row_epochs(matrix: Matrix, row: RowSection | AssistantSection) -> tuple[int, ...]:
    section, count = row.epochs or matrix.recipe.epochs, len(row.stages)
    if section.total is not None:
        epochs = equal_budget(section.total, count)
    else:
        epochs = stage_epochs(section.per_stage or (), count)
    return tuple(s.epochs or e for s, e in zip(row.stages, epochs, strict=True))


def _data_spec(matrix: Matrix) -> DataSpec:
    section, info = matrix.dataset, dataset_info(matrix.dataset.name)
    return canonical_split(
        DataSpec(
            info.name, info.version, info.fingerprint,
            section.train_size, section.dev_size, section.split_seed,
        )
    )  # fmt: skip


def _method_spec(method: Method, modifiers: tuple[Modifier, ...]) -> MethodSpec:
    named = tuple(NamedSettings(m.name, m.version, _settings(m)) for m in modifiers)
    return MethodSpec(method.name, method.version, _settings(method), named)


def _settings(method: Method | Modifier) -> Document:
    # Through the declared types, so that 2 and 2.0 give one key.
    return asdict(adapter(type(method)).validate_python(asdict(method)))


@lru_cache(maxsize=64)
def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
