"""What must hold between the values of a well-formed matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smskd_export.yaml_reader import DocPath

from smskd.datasets import DATASETS
from smskd.errors import ConfigError, did_you_mean
from smskd.schedule import equal_budget
from smskd.settings import Optimizer, Reference, Schedule
from smskd_bench.matrix import (
    PAIR,
    AssistantSection,
    DatasetSection,
    EpochsSection,
    Matrix,
    PairSection,
    RowSection,
    StageSection,
)
from smskd_bench.naming import row_name
from smskd_bench.problems import Problems


def check_values(matrix: Matrix, problems: Problems) -> None:
    """Note every value of ``matrix`` that cannot work."""
    for key in ("pairs", "seeds", "rows"):
        if not getattr(matrix, key):
            problems.add((key,), "is empty; give at least one")
    if not matrix.name.strip():
        problems.add(("name",), "is empty")
    _check_printable(matrix.name, ("name",), problems)
    _check_unique("seeds", matrix.seeds, problems)
    _check_unique("pairs", [pair.name for pair in matrix.pairs], problems)
    _check_unique("rows", [row_name(row) for row in matrix.rows], problems)
    for i, seed in enumerate(matrix.seeds):
        _check_seed(seed, ("seeds", i), problems)
    _check_seed(matrix.dataset.split_seed, ("dataset", "split_seed"), problems)
    if matrix.teacher.seed is not None:
        _check_seed(matrix.teacher.seed, ("teacher", "seed"), problems)
    _check_dataset(matrix.dataset, problems)
    _check_recipe(matrix, problems)
    _check_reference(matrix.reference, ("reference",), problems)
    for i, pair in enumerate(matrix.pairs):
        _check_pair(pair, ("pairs", i), problems)
    _check_assistants(matrix, problems)
    names = {row_name(row) for row in matrix.rows}
    for i, row in enumerate(matrix.rows):
        _check_row(matrix, row, ("rows", i), names, problems)


def _check_pair(pair: PairSection, path: DocPath, problems: Problems) -> None:
    if pair.lr is not None:
        _positive(pair.lr, (*path, "lr"), problems)
    if not pair.teacher:
        problems.add((*path, "teacher"), "is empty; name at least one model")
    if len(set(pair.teacher)) < len(pair.teacher):
        problems.add((*path, "teacher"), "the same teacher twice")


def _check_assistants(matrix: Matrix, problems: Problems) -> None:
    for name, section in matrix.assistants.items():
        path: DocPath = ("assistants", name)
        _check_printable(name, path, problems)
        if name == PAIR:
            problems.add(path, f"{PAIR!r} stands for the pair's teacher; choose another name")
        if section.lr is not None:
            _positive(section.lr, (*path, "lr"), problems)
        if section.seed_shift < 0:
            problems.add(
                (*path, "seed_shift"), f"must be 0 or more, but it is {section.seed_shift}"
            )
        _check_sequence(matrix, section, path, problems)
        if (circle := _circle(matrix, name)) is not None:
            problems.add(path, f"teaches itself: {' -> '.join(circle)}")


def _circle(matrix: Matrix, start: str) -> list[str] | None:
    """The way from an assistant over its teachers back to itself, or None."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        section = matrix.assistants.get(way[-1])
        for stage in section.stages if section else ():
            for name in stage.teacher or ():
                if name == start:
                    return [*way, name]
                if name not in seen:
                    seen.add(name)
                    ways.append([*way, name])
    return None


def _check_seed(seed: int, path: DocPath, problems: Problems) -> None:
    if not 0 <= seed < 2**63:
        problems.add(path, f"must be from 0 to 2**63 - 1, but it is {seed}")


def _check_row(
    matrix: Matrix, row: RowSection, path: DocPath, names: set[str], problems: Problems
) -> None:
    _check_printable(row.name, (*path, "name"), problems)
    _check_sequence(matrix, row, path, problems)
    for j, control in enumerate(row.controls):
        if control not in names:
            hint = did_you_mean(control, names)
            problems.add((*path, "controls", j), f"no row is named {control!r}; {hint}")
        elif control == row_name(row):
            problems.add((*path, "controls", j), "a row cannot be its own control")
    pairs = [pair.name for pair in matrix.pairs]
    for j, pair in enumerate(row.only):
        if pair not in pairs:
            problems.add((*path, "only", j), f"no pair {pair!r}; {did_you_mean(pair, pairs)}")


def _check_sequence(
    matrix: Matrix, row: RowSection | AssistantSection, path: DocPath, problems: Problems
) -> None:
    """What a row and an assistant have in common: stages, epochs, reference."""
    if not row.stages:
        problems.add((*path, "stages"), "is empty; give at least one stage")
        return
    epochs, place = (row.epochs, path) if row.epochs else (matrix.recipe.epochs, ("recipe",))
    _check_epochs(epochs, len(row.stages), (*place, "epochs"), row.epochs is not None, problems)
    for j, stage in enumerate(row.stages):
        _check_stage(matrix, stage, (*path, "stages", j), problems)
    partial = problems.validate(Reference, row.reference, (*path, "reference"))
    if partial is not None:
        _check_reference(partial, (*path, "reference"), problems)


def _check_stage(matrix: Matrix, stage: StageSection, path: DocPath, problems: Problems) -> None:
    if not stage.method:
        problems.add((*path, "method"), "is empty; name a method")
    if len(set(stage.method)) < len(stage.method):
        problems.add((*path, "method"), "the same method twice in one joint stage")
    for j, name in enumerate(stage.teacher or ()):
        if name not in (PAIR, *matrix.assistants):
            hint = did_you_mean(name, [PAIR, *matrix.assistants])
            problems.add((*path, "teacher", j), f"no assistant is named {name!r}; {hint}")
    if stage.teacher is not None and not stage.teacher:
        problems.add((*path, "teacher"), "is empty; leave it out for the pair's teacher")
    if stage.epochs is not None:
        _positive(stage.epochs, (*path, "epochs"), problems)
    if stage.schedule:
        _check_schedule(stage.schedule, (*path, "schedule"), problems)
    for key in ("method_weight", "ce_weight"):
        weight = getattr(stage, key)
        if weight is not None and weight < 0.0:
            problems.add((*path, key), f"must be 0 or more, but it is {weight}")
    if stage.reference is not None:
        partial = problems.validate(Reference, stage.reference, (*path, "reference"))
        if partial is not None:
            _check_reference(partial, (*path, "reference"), problems)
    carry = stage.carry or matrix.recipe.carry
    if carry == "best_on_dev" and matrix.dataset.dev_size == 0:
        problems.add(
            (*path, "carry"), "best_on_dev needs a development split; set dataset.dev_size"
        )


def _check_dataset(dataset: DatasetSection, problems: Problems) -> None:
    entry = DATASETS.get(dataset.name)
    if entry is None:
        return
    classes, available = entry.info.num_classes, entry.info.num_train
    for key, size in (("train_size", dataset.train_size), ("dev_size", dataset.dev_size)):
        if size is not None and (size < 0 or size % classes or (key == "train_size" and not size)):
            message = f"must be a multiple of the {classes} classes, but it is {size}"
            problems.add(("dataset", key), message)
    asked = (dataset.train_size or classes) + dataset.dev_size
    if asked > available:
        problems.add(
            ("dataset",), f"{asked} training and development images, but there are {available}"
        )


def _check_recipe(matrix: Matrix, problems: Problems) -> None:
    recipe = matrix.recipe
    _positive(recipe.batch_size, ("recipe", "batch_size"), problems)
    _check_optimizer(recipe.optimizer, problems)
    _check_schedule(recipe.first_stage, ("recipe", "first_stage"), problems)
    _check_schedule(recipe.later_stages, ("recipe", "later_stages"), problems)
    _positive(matrix.teacher.epochs, ("teacher", "epochs"), problems)
    if matrix.teacher.lr is not None:
        _positive(matrix.teacher.lr, ("teacher", "lr"), problems)
    if matrix.teacher.schedule:
        _check_schedule(matrix.teacher.schedule, ("teacher", "schedule"), problems)
    for model, file in matrix.teacher.weights.items():
        if not _is_file(weights_file(file, problems.document.file)):
            problems.add(("teacher", "weights", model), f"no such file: {file}")
    if matrix.evaluate_every < 0:
        problems.add(("evaluate_every",), "must be 0 (only at the end) or more")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # e.g. a name that is too long for the file system
        return False


def weights_file(file: str, matrix_file: Path) -> Path:
    """A weights path in a matrix is relative to the matrix file."""
    return matrix_file.parent / file


def _check_optimizer(optimizer: Optimizer, problems: Problems) -> None:
    path: DocPath = ("recipe", "optimizer")
    _positive(optimizer.lr, (*path, "lr"), problems)
    if not 0.0 <= optimizer.momentum < 1.0:
        problems.add((*path, "momentum"), f"must be in [0, 1), but it is {optimizer.momentum}")
    if optimizer.weight_decay < 0.0:
        problems.add((*path, "weight_decay"), "must be 0 or more")
    if optimizer.nesterov and optimizer.momentum == 0.0:
        problems.add((*path, "nesterov"), "needs a momentum above 0")


def _check_schedule(schedule: Schedule, path: DocPath, problems: Problems) -> None:
    if schedule.kind == "step":
        fractions = list(schedule.milestones)
        if fractions != sorted(set(fractions)) or any(not 0.0 < m < 1.0 for m in fractions):
            problems.add(
                (*path, "milestones"),
                f"are fractions of the stage, rising, between 0 and 1, but they are {fractions}",
            )
        _positive(schedule.gamma, (*path, "gamma"), problems)
    _positive(schedule.start, (*path, "start"), problems)


def _check_reference(reference: Reference, path: DocPath, problems: Problems) -> None:
    if reference.weight < 0.0:
        problems.add((*path, "weight"), "must be 0 (no reference) or more")
    _positive(reference.temperature, (*path, "temperature"), problems)
    _positive(reference.weighting.temperature, (*path, "weighting", "temperature"), problems)


def _check_epochs(
    epochs: EpochsSection, num_stages: int, path: DocPath, own: bool, problems: Problems
) -> None:
    if (epochs.per_stage is None) == (epochs.total is None):
        problems.add(path, "give either a list of epochs or a total, not both or neither")
    elif epochs.total is not None:
        try:
            equal_budget(epochs.total, num_stages)
        except ConfigError as error:
            problems.add(path, error.message)
    elif not epochs.per_stage:
        problems.add(path, "is empty; give the epochs of each stage")
    else:
        for i, count in enumerate(epochs.per_stage):
            _positive(count, (*path, i), problems)
        if own and len(epochs.per_stage) > num_stages:
            problems.add(path, f"{len(epochs.per_stage)} entries for {num_stages} stages")


def _check_unique(key: str, names: Sequence[object], problems: Problems) -> None:
    seen: set[object] = set()
    for i, name in enumerate(names):
        if name in seen:
            problems.add((key, i), f"{name!r} is there twice{_rename_hint(key)}")
        seen.add(name)


def _rename_hint(key: str) -> str:
    return "; give one of them another name" if key == "rows" else ""


def _check_printable(name: str, path: DocPath, problems: Problems) -> None:
    if name != name.strip() or not name.isprintable():
        problems.add(path, f"must be one line without blanks around it, but it is {name!r}")


def _positive(value: float, path: DocPath, problems: Problems) -> None:
    if value <= 0:
        problems.add(path, f"must be above 0, but it is {value}")
