"""Where in W&B a store's boards and stage runs were published, for pages that point there."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from smskd.atomic import write_json
from smskd.strict_json import parse_json

FOLDER = Path("wandb") / "published"
"""Of all publications of a store, within it."""

ONLINE = "online.json"


@dataclass(frozen=True)
class Addresses:
    """What the last publication of a matrix left on a server.

    Attributes:
        project: Address of the project; empty if the matrix was never published online.
        runs: Ids of the runs that are there.
        report: Address of the report; empty if there is none.
    """

    project: str = ""
    runs: tuple[str, ...] = ()
    report: str = ""

    def of_run(self, run: str) -> str:
        """Address of a run; empty if it was not published."""
        there = self.project and run in self.runs
        return f"{self.project}/runs/{urllib.parse.quote(run)}" if there else ""


def note_addresses(store: Path, matrix: str, addresses: Addresses) -> None:
    """Keep the addresses of a matrix beside what was sent."""
    path = store / FOLDER / ONLINE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_read(path), matrix: asdict(addresses)})


def read_addresses(store: Path, matrix: str) -> Addresses:
    """Addresses of a matrix; none if it was never published online, or the file is damaged."""
    found = _read(store / FOLDER / ONLINE).get(matrix)
    if not isinstance(found, dict):
        return Addresses()
    runs = found.get("runs")
    return Addresses(
        _https(found.get("project")),
        tuple(_texts(runs)) if isinstance(runs, list) else (),
        _https(found.get("report")),
    )


def _read(path: Path) -> dict[str, object]:
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _https(value: object) -> str:
    """An address that a browser may be sent to."""
    return value if isinstance(value, str) and value.startswith(("https://", "http://")) else ""


def _texts(values: Iterable[object]) -> list[str]:
    return [value for value in values if isinstance(value, str)]
