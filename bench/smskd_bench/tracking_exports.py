"""Mirrors a measurement to Weights & Biases: its rows as a summary, its files as artifacts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

from smskd_export.judging import JUDGED, Judged, JudgedRow
from smskd_export.measurement import RESULT

from smskd_bench.store import WEIGHTS, Store
from smskd_bench.tracking import ArtifactRef, OutputRef, RunCard, Tracker, make_tracker

TIMEOUT_S = 60.0


def mirror_measurement(
    kind: str, project: str, root: Path, export: Path, folder: Path, judged: Judged
) -> list[str]:
    """Record one measurement.

    Args:
        kind: "wandb" or "none".
        project: W&B project.
        root: The store.
        export: Folder of the export: report, bundle, test set.
        folder: Folder of the measurement.
        judged: What it came to.

    Returns:
        Messages for the user.
    """
    tracker = make_tracker(cast(Literal["wandb", "none"], kind))
    _record(tracker, project, root, export, folder, judged)
    return [f"tracking: {message}" for message in tracker.close(TIMEOUT_S)]


def measurement_key(judged: Judged) -> str:
    """Identifies a measurement wherever it is mirrored."""
    text = f"{judged.bundle_id} {judged.device} {judged.measured_utc}"
    return hashlib.sha256(text.encode()).hexdigest()


def _record(
    tracker: Tracker, project: str, root: Path, export: Path, folder: Path, judged: Judged
) -> None:
    key, short = measurement_key(judged), judged.bundle_id[:16]
    weights = Store.peek(root).folder(judged.key) / WEIGHTS
    tracker.begin(
        RunCard(
            key=key,
            name=f"{judged.name} on {judged.target}",
            project=project,
            group=judged.target,
            job_type="measurement",
            folder=root / "wandb",
            tags=(judged.target, judged.protocol),
            config={
                "bundle_id": judged.bundle_id, "student_key": judged.key, "target": judged.target,
                "device": judged.device, "board": judged.board, "runtime": judged.runtime,
                "threads": judged.threads, "protocol": judged.protocol,
            },
            inputs=(ArtifactRef("parent", judged.key, weights),) if weights.exists() else (),
        )
    )  # fmt: skip
    tracker.end(
        key,
        "done",
        {"rankable": judged.rankable, **_summary(judged)},
        None,
        (
            OutputRef(
                f"bundle-{short}", "bundle", export / "bundle", files_below(export / "bundle")
            ),
            OutputRef(f"measurement-{key[:16]}", "measurement", folder, tuple(_raw(folder))),
            OutputRef(f"engines-{key[:16]}", "engine-facts", folder, (RESULT, JUDGED)),
        ),
    )


def _summary(judged: Judged) -> dict[str, object]:
    """Flat fields to sort by: one group of names for each row of the table."""
    fields: dict[str, object] = {"torch_top1": judged.torch_top1, "parameters": judged.parameters}
    for row in judged.rows:
        fields |= {f"{_name(row)}/{name}": value for name, value in _numbers(row)}
    return fields


def _name(row: JudgedRow) -> str:
    return f"{row.precision}-b{row.batch}" + ("-graph" if row.cuda_graph else "")


def _numbers(row: JudgedRow) -> Iterator[tuple[str, object]]:
    yield "status", row.status
    yield "size_mb", row.size_mb
    for name in ("top1", "samples_per_s", "gross_mj"):
        if getattr(row, name) is not None:
            yield name, getattr(row, name)
    if row.change is not None:
        yield from (("change", row.change.difference), ("change_p", row.change.p))
    if row.host is not None:
        for name in ("p50_ns", "p90_bound_ns", "p99_bound_ns"):
            if (ns := getattr(row.host, name)) is not None:
                yield name.replace("_ns", "_ms"), ns / 1e6


def files_below(folder: Path) -> tuple[str, ...]:
    """Paths of all files below a folder, sorted."""
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))


def _raw(folder: Path) -> Iterator[str]:
    """Raw samples and events; the records are an artifact of their own."""
    yield from (name for name in files_below(folder) if name not in {RESULT, JUDGED})
