"""Measurements in the store: nodes below a bundle, each a folder that is complete or absent.

<store>/exports/<key>/<target>/            report.json, bundle/, test_set/
<store>/measurements/<key>/<target>/<device>-<number>/
result.json, raw samples               what the device brought back
judged.json                            written last: the rows of tables
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from smskd_export.judging import JUDGED, Judged, read_judged

from smskd_bench.environment import processor_name

LOCAL = "local"


def device_name(device: str | None) -> str:
    """How tables call a device: this machine by its processor, others by how they are reached."""
    return device or f"{LOCAL} ({processor_name()})"


def measurement_folder(root: Path, key: str, bundle: str) -> Path:
    """Folder of all measurements of one bundle in the store ``root``."""
    return root / "measurements" / key / bundle


def new_folder(parent: Path, device: str | None) -> Path:
    """A name for one more measurement on a device; the folder is not made."""
    slug = _slug(device)
    taken = [path.name for path in parent.glob(f"{slug}-*")] if parent.is_dir() else []
    numbers = [int(name.rpartition("-")[2]) for name in taken if name[-1].isdigit()]
    return parent / f"{slug}-{max(numbers, default=0) + 1}"


def found(parent: Path) -> Iterator[Judged]:
    """Complete measurements in ``parent``, oldest first by number.

    Raises:
        StoreError: one of them is damaged.
    """
    if not parent.is_dir():
        return
    for folder in sorted(path.parent for path in parent.glob(f"*/{JUDGED}")):
        judged = read_judged(folder)
        if judged is not None:
            yield judged


def latest(
    parent: Path, bundle_id: str, device: str | None, quick: bool, threads: int
) -> Judged | None:
    """The newest measurement of this very bundle on this device, or None."""
    fitting = [
        judged
        for judged in found(parent)
        if judged.bundle_id == bundle_id
        and judged.device == device_name(device)
        and (judged.protocol == "quick") == quick
        and judged.threads == threads
    ]
    return max(fitting, key=lambda judged: judged.measured_utc, default=None)


def _slug(device: str | None) -> str:
    """A file name for a device that no two devices share."""
    name = device_name(device)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", device or LOCAL)[:40]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
