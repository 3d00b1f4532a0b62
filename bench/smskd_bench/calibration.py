"""What the device at hand was measured to do, kept in the store so that it is measured once.

A calibration predicts times and decides nothing else, so a file of it that is lost, damaged or of
another version is simply measured anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smskd.atomic import write_json
from smskd.strict_json import parse_json
from smskd_bench.environment import device_name
from smskd_bench.problems import read_strictly
from smskd_bench.speed import Workload, as_measured, measure
from smskd_bench.store import Store

FILE = "calibration.json"
FORMAT = 1
"""Raised when a change of the code makes old measurements wrong."""

EACH_S = 0.6
"""Measuring time of one workload after its warm-up."""

BUDGET_S = 15.0
"""Time for all of them together; what is not reached by then is estimated until the next time."""

Progress = Callable[[int, int, str], None]
"""Called before each measurement: how many are over, how many there are, what is measured now."""

_Place = tuple[str, str, Workload]
"""Device's human name, torch version, what was measured."""


@dataclass(frozen=True)
class Calibration:
    """Speeds of one device.

    Attributes:
        device: torch device string.
        name: The device's human name.
        measured: Milliseconds an image.
        failed: What could not be measured, and why.
        estimated: Milliseconds an image of what there was no time for, by its MACs.
        seconds: How long measuring took; 0 if all was known.
    """

    device: str
    name: str
    measured: dict[Workload, float]
    failed: dict[Workload, str] = field(default_factory=dict)
    estimated: dict[Workload, float] = field(default_factory=dict)
    seconds: float = 0.0

    def ms_per_image(self, work: Workload) -> float | None:
        """Milliseconds an image, or None if it could not be measured."""
        work = as_measured(work, self.device)
        return self.measured.get(work, self.estimated.get(work))


def calibrate(
    wanted: Iterable[Workload],
    device: str,
    store: Store | None = None,
    progress: Progress = lambda done, total, what: None,
    each_s: float = EACH_S,
) -> Calibration:
    """Look up or measure workloads on a device.

    Args:
        wanted: What is to be known, the most important first.
        device: torch device string.
        store: Where measurements are kept, if it is there already.
        progress: Told before each measurement.
        each_s: Measuring time of each.
    """
    started, name = time.perf_counter(), device_name(device)
    todo = list(dict.fromkeys(as_measured(work, device) for work in wanted))
    kept = _read(store.root / FILE) if store else {}
    here = {work: ms for (n, v, work), ms in kept.items() if (n, v) == (name, torch.__version__)}
    missing = [work for work in todo if work not in here]
    if not missing:
        return Calibration(device, name, here)
    failed = _measure_all(missing, here, device, progress, each_s)
    if store:
        _keep(store, kept | {(name, torch.__version__, work): ms for work, ms in here.items()})
    estimated = _estimate([w for w in missing if w not in here and w not in failed], here)
    return Calibration(device, name, here, failed, estimated, time.perf_counter() - started)


def _measure_all(
    missing: list[Workload],
    found: dict[Workload, float],
    device: str,
    progress: Progress,
    each_s: float,
) -> dict[Workload, str]:
    """Measure into ``found`` until the time is over; returns what could not be, and why."""
    end, failed = time.perf_counter() + BUDGET_S, dict[Workload, str]()
    for done, work in enumerate(missing):
        left_s = end - time.perf_counter()
        if left_s < 0.0:
            break
        progress(done, len(missing), str(work))
        try:
            found[work] = measure(work, device, min(each_s, left_s / (len(missing) - done)))
        except RuntimeError as error:  # torch's errors of memory and of the device are of this kind
            failed[work] = str(error).splitlines()[0]
            _free_memory(device)
    return failed


def _estimate(late: list[Workload], measured: dict[Workload, float]) -> dict[Workload, float]:
    """As long for each MAC as what was measured, at the same kind of work if possible."""
    rates: dict[str, list[float]] = {"train": [], "forward": []}
    for work, ms in measured.items():
        rates[work.role].append(ms / work.macs)
    known = [*rates["train"], *rates["forward"]]
    return {work: work.macs * median(rates[work.role] or known) for work in late if known}


def _read(path: Path) -> dict[_Place, float]:
    """All measurements in a file; none if it is not there or cannot be understood."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        document = parse_json(path.read_text(encoding="utf-8"), bounded=True)
        if document["format"] == FORMAT:
            return dict(_entry(entry) for entry in document["measured"])
    return {}


def _entry(entry: dict[str, Any]) -> tuple[_Place, float]:
    work = read_strictly(Workload, entry["work"])
    ms = float(entry["ms_per_image"])
    if not (math.isfinite(ms) and ms > 0.0):
        raise ValueError(f"{ms} ms an image")
    return (str(entry["device"]), str(entry["torch"]), work), ms


def _keep(store: Store, measured: dict[_Place, float]) -> None:
    """Write the file, if there is a store; that it cannot be written hurts nobody."""
    entries = [
        {"device": name, "torch": version, "work": asdict(work), "ms_per_image": round(ms, 6)}
        for (name, version, work), ms in measured.items()
    ]
    if store.is_there():
        with suppress(OSError):
            write_json(store.root / FILE, {"format": FORMAT, "measured": entries})


def _free_memory(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
