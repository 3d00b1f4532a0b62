"""One row's page: everything that is known of it, from its records."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smskd_bench.plan import Cell, Plan
from smskd_bench.publishing.addresses import Addresses
from smskd_bench.publishing.names import stable_id
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.site.changes import StageChange, stage_changes
from smskd_bench.site.curves import (
    SeedCurve,
    borders,
    columns,
    mean_series,
    names_of,
    seed_curve,
)
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record

KEY_DIGITS = 12
"""Digits of a key that tell it from all others in a table."""


@dataclass(frozen=True)
class Ancestor:
    """A stage run that a row is made of.

    Attributes:
        role: ``teacher``, ``assistant`` or ``stage 2``.
        network: Name of the model.
        methods: What was trained.
        seed: Of its weights and order.
        epochs: Of this stage.
        key: Of the stage run.
        top1: Test accuracy in percent; None if it is not done.
        where: Device, threads and shortcuts of the result.
        minutes: Training time; None if it is not known.
    """

    role: str
    network: str
    methods: str
    seed: int
    epochs: int
    key: str
    top1: float | None
    where: str
    minutes: float | None


@dataclass(frozen=True)
class RowData:
    """What a row's page shows besides the row itself.

    Attributes:
        stages: Name and settings of each stage, of the first seed.
        documents: The whole specification of each stage, as JSON text.
        ancestors: Stage runs of all seeds, each once.
        changes: What each stage changed, all seeds.
        environment: Name and value of what results depend on; different values in one.
        commands: What it does, and the command.
        links: Addresses in Weights & Biases, where it was published.
        drawn: Curves, for the script.
    """

    stages: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    documents: tuple[tuple[str, str], ...]
    ancestors: tuple[Ancestor, ...]
    changes: tuple[StageChange, ...]
    environment: tuple[tuple[str, str], ...]
    commands: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    drawn: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a row comes from, as a command line names it, and where it was published."""

    plan: Plan
    matrix: Path
    store: Path
    published: Addresses = field(default_factory=Addresses)


def row_data(
    source: Source,
    row: LeaderboardRow,
    cells: Sequence[Cell],
    records: Mapping[str, Record],
    curves: Sequence[SeedCurve],
) -> RowData:
    """Everything about one row."""
    plan, first = source.plan, cells[0]
    stages = borders(plan, first)
    names = [stage.title for stage in stages]
    own = [records[key] for cell in cells for key in cell.stages if key in records]
    specs = [plan.nodes[key] for key in first.stages]
    return RowData(
        stages=tuple((f"stage {s.number}", tuple(_settings(s))) for s in specs),
        documents=tuple((f"stage {s.number}", json.dumps(s.document(), indent=1)) for s in specs),
        ancestors=tuple(_ancestors(plan, cells, records)),
        changes=tuple(c for cell in cells for c in stage_changes(plan, cell, records, names)),
        environment=tuple(_environment(own)),
        commands=tuple(_commands(source, row, cells)),
        links=tuple(_links(source, row, cells)),
        drawn={
            "stages": [[s.number, s.title, s.start, s.end] for s in stages],
            **drawn_curves(curves),
        },
    )


def curves_of(plan: Plan, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[SeedCurve]:
    """The curves of a row's seeds that have any stage done."""
    found = (seed_curve(plan, cell, records) for cell in cells)
    return [curve for curve in found if curve.ends or curve.series]


def drawn_curves(curves: Sequence[SeedCurve]) -> dict[str, Any]:
    """Curves of each seed; loss terms, TCP and weights as means over the seeds."""
    kinds = ("train_top1", "test_top1", "dev_top1", "loss", "lr")
    return {
        "seeds": [
            {
                "seed": curve.seed,
                "ends": columns(curve.ends),
                **{k: columns(curve.series[k]) for k in kinds if k in curve.series},
            }
            for curve in curves
        ],
        **{
            group: {name: columns(mean_series(curves, name)) for name in names_of(curves, prefix)}
            for group, prefix in (("terms", "loss/"), ("tcp", "tcp/"), ("weights", "reference/"))
        },
    }


def _settings(spec: StageSpec) -> Iterator[tuple[str, str]]:
    for method in spec.methods:
        settings = ", ".join(f"{name} {value}" for name, value in method.settings.items())
        yield "method", f"{method.name} v{method.version}" + (f": {settings}" if settings else "")
        for m in method.modifiers:
            words = ", ".join(f"{name} {value}" for name, value in m.settings.items())
            yield "modifier", f"{m.name} v{m.version}" + (f": {words}" if words else "")
    training = spec.training
    optimizer, schedule = training.optimizer, training.schedule
    yield "epochs", f"{training.epochs}, after {spec.first_epoch}"
    yield (
        "optimiser",
        (
            f"SGD, rate {optimizer.lr:g}, momentum {optimizer.momentum:g}, "
            f"weight decay {optimizer.weight_decay:g}{', nesterov' if optimizer.nesterov else ''}"
        ),
    )
    drops = ", ".join(f"{round(m * training.epochs)}" for m in schedule.milestones)
    yield (
        "schedule",
        f"{schedule.kind}, from {schedule.start:g} x rate"
        + (f", x {schedule.gamma:g} after epoch {drops}" if drops else ""),
    )
    yield "batch, precision", f"{training.batch_size}, {training.precision}"
    yield "carried on", f"{training.carry} weights; start {training.init}"
    if spec.method_weight != 1.0 or spec.ce_weight is not None:
        yield "weights", f"method {spec.method_weight:g}, cross-entropy {spec.ce_weight}"
    yield "reference", _reference(spec)


def _reference(spec: StageSpec) -> str:
    reference = spec.reference
    if reference is None:
        return "none"
    weighting = reference.weighting
    return (
        f"weight {reference.weight:g}, temperature {reference.temperature:g}, "
        f"{reference.space}; weighted by {weighting.map}, {weighting.normalise}"
    )


def _ancestors(
    plan: Plan, cells: Sequence[Cell], records: Mapping[str, Record]
) -> Iterator[Ancestor]:
    seen: set[str] = set()
    for cell in cells:
        roles = [
            *((key, "teacher") for key in cell.teachers),
            *((key, "assistant") for key in cell.assistants),
            *((key, f"stage {plan.nodes[key].number}") for key in cell.stages),
        ]
        for key, role in roles:
            if key not in seen and key in plan.nodes:
                seen.add(key)
                yield _ancestor(plan.nodes[key], role, records.get(key))


def _ancestor(spec: StageSpec, role: str, record: Record | None) -> Ancestor:
    methods = "+".join(m.name for m in spec.methods) if not spec.imported else "imported weights"
    seconds = (record or {}).get("train_seconds")
    return Ancestor(
        role=role,
        network=spec.model,
        methods=methods,
        seed=spec.seed,
        epochs=spec.training.epochs,
        key=spec.key,
        top1=None if record is None else float(record["test"]["top1"]),
        where="" if record is None else _where(record),
        minutes=seconds / 60 if isinstance(seconds, int | float) and seconds > 0 else None,
    )


def _where(record: Record) -> str:
    environment, paths = _mapping(record.get("environment")), _mapping(record.get("fast_paths"))
    words = [str(environment.get("device", ""))]
    if threads := environment.get("threads"):
        words.append(f"{threads} thread{'' if threads == 1 else 's'}")
    words += [f"{name} {value}" for name, value in paths.items() if value not in (False, None, 1)]
    return ", ".join(word for word in words if word)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _environment(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Every entry of the environment; where results differ, each value once."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in _flat(_mapping(record.get("environment"))):
            values.setdefault(name, {})[value] = None
    for name, found in values.items():
        yield name, "; ".join(found)


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, inner in value.items():
        place = f"{path}, {name}" if path else str(name)
        if isinstance(inner, dict):
            yield from _flat(inner, place)
        elif inner is not None:
            yield place, str(inner)


def _commands(
    source: Source, row: LeaderboardRow, cells: Sequence[Cell]
) -> Iterator[tuple[str, str]]:
    place = ["--matrix", str(source.matrix), "--store", str(source.store)]
    name = f"{row.pair}/{row.row}"
    first = cells[0].name
    yield "Train it, all seeds", _line("run", *place, "--only", f"{name}/s")
    yield "Train it again from its record: the same bits?", _line("verify", first, *place)
    yield (
        "Export it and measure it here",
        _line("export", "--target", "cpu", *place, "--cell", first),
    )


def _line(*words: str) -> str:
    return shlex.join(["smskd-bench", *words])


def _links(source: Source, row: LeaderboardRow, cells: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """Where the row and its stage runs were published."""
    there, matrix = source.published, source.plan.matrix.name
    if address := there.of_run(stable_id("row", matrix, row.pair, row.row)):
        yield "the row", address
    for cell in cells:
        for number, key in enumerate(cell.stages, start=1):
            if address := there.of_run(stable_id("stage", key)):
                yield f"seed {cell.seed}, stage {number}", address
