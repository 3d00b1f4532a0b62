"""What one publication sends, as plain data: the sender turns it into calls of wandb."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class ArtifactDocument:
    """Some files of the store under a name in W&B.

    Attributes:
        name: Of the artifact: its kind, and the key that the store knows it by.
        kind: Its type in W&B: ``stage``, ``model``, ``bundle`` or ``measurement``.
        folder: Holds the files.
        files: Which of them: path below ``folder``, and path in the artifact.
        metadata: The whole key, the SHA-256 of the content and what it came to.
    """

    name: str
    kind: str
    folder: str
    files: tuple[tuple[str, str], ...]
    metadata: Mapping[str, object]


@dataclass(frozen=True)
class TableDocument:
    """A W&B table; with ``line``, a chart of it too.

    Attributes:
        columns: Names.
        rows: Cells, a row.
        line: Columns of x, y and one line each, or nothing.
        title: Of the chart.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    line: tuple[str, str, str] | tuple[()] = ()
    title: str = ""


@dataclass(frozen=True)
class RunDocument:
    """One W&B run.

    Attributes:
        id: The same for the same thing, whenever it is published.
        name: For people.
        job_type: ``leaderboard``, ``board``, ``stage``, ``export`` or ``measurement``.
        group: The matrix; of what several matrices may share, what it is.
        tags: Labels.
        config: What it is.
        summary: What it came to; flat, finite, and without what was not measured.
        notes: A longer text.
        uses: Artifacts it builds on.
        logs: Artifacts that are its output.
        tables: By name.
        images: PNG files, by name.
        drawn: What the images show, as data; stands for them in the digest.
    """

    id: str
    name: str
    job_type: str
    group: str
    tags: tuple[str, ...]
    config: Mapping[str, object]
    summary: Mapping[str, object]
    notes: str = ""
    uses: tuple[ArtifactDocument, ...] = ()
    logs: tuple[ArtifactDocument, ...] = ()
    tables: Mapping[str, TableDocument] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    drawn: Sequence[object] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that is sent, places on this disk left out: equal means unchanged."""
        content = asdict(self)
        content["images"] = sorted(self.images)
        for artifact in (*content["uses"], *content["logs"]):
            del artifact["folder"]
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    def message(self) -> dict[str, Any]:
        """For the sender, as JSON knows it; ``digest`` included."""
        return {**asdict(self), "digest": self.digest}


def canonical(value: object) -> str:
    """JSON that does not depend on the order of mappings; NaN is refused."""
    return json.dumps(value, sort_keys=True, allow_nan=False, default=str)


def measured(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields without those that are unknown or no finite number."""
    return {name: value for name, value in fields.items() if known(value) is not None}


def known(value: Any) -> Any:
    """A value, or None for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
