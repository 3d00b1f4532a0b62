"""Which runs are recorded on disk and wait for `wandb sync`, so that none is recorded twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from smskd.atomic import write_json

LEDGER = "offline.json"


class OfflineLedger:
    """Digest and folder of each recorded run, for one project of one entity.

    A damaged or missing ledger costs a second recording under the same ids, nothing else.

    Args:
        folder: Of all publications of a store.
        place: Entity and project.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.folder = folder
        self.place = place
        self._entries = _read(folder / LEDGER)

    def known(self) -> dict[str, str]:
        """Digests of the runs that are there, by id."""
        here = self._entries.get(self.place, {})
        return {run: digest for run, (digest, name) in here.items() if self._holds(name)}

    def add(self, recorded: Iterable[tuple[str, str, Path]]) -> None:
        """Note recordings, and delete those that they replace."""
        here = self._entries.setdefault(self.place, {})
        replaced = []
        for run, digest, path in recorded:
            if run in here and here[run][1] != path.name:
                replaced.append(here[run][1])
            here[run] = (digest, path.name)
        write_json(self.folder / LEDGER, self._entries)
        for name in replaced:
            shutil.rmtree(self.folder / "wandb" / name, ignore_errors=True)

    def _holds(self, name: str) -> bool:
        return any((self.folder / "wandb" / name).glob("*.wandb"))


def _read(path: Path) -> dict[str, dict[str, tuple[str, str]]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            place: {run: (digest, Path(name).name) for run, (digest, name) in runs.items()}
            for place, runs in document.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
