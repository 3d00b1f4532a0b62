"""Reads the log of a W&B run back from disk: leveldb's log format around protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_payloads(path: Path) -> Iterator[bytes]:
    """Yield the whole records of a log; stops quietly at a cut end."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        position += CHUNK_HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


class LoggedRun:
    """What one run folder holds."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.steps: dict[str, str] = {}
        self.exit_code: int | None = None
        (path,) = folder.glob("*.wandb")
        for payload in read_payloads(path):
            self._add(Record.FromString(payload))

    def _add(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self.config.update(_values(record.run.config.update))
        elif kind == "config":
            self.config.update(_values(record.config.update))
        elif kind == "history":
            self.rows.append(_values(record.history.item))
        elif kind == "summary":
            self.summary.update(_values(record.summary.update))
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        elif kind == "metric":
            self.steps[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            self.exit_code = record.exit.exit_code


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def logged_runs(folder: Path) -> list[LoggedRun]:
    """Offline runs under a W&B folder, oldest first."""
    return [LoggedRun(path) for path in sorted(folder.glob("wandb/offline-run-*"))]
