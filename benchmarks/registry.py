"""The benchmarks of this folder, for the command that runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_S = 5.0


@dataclass(frozen=True)
class Entry:
    """One benchmark.

    Attributes:
        name: Its module; a command that takes ``--device`` and ``--seconds``.
        share: Of the time that is measured.
        setup_s: By device that it applies to, about how long it takes before and around that.
        options: By device, further words of its command line.
        reads_images: Whether it takes ``--data-root``.
        in_gpu_run: Whether it belongs to the short run on a GPU.
    """

    name: str
    share: float
    setup_s: Mapping[str, float]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads_images: bool = True
    in_gpu_run: bool = True


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--pair", name))


THREE_PAIRS = _pairs("resnet32x4>resnet8x4", "resnet110>resnet20", "ResNet50>MobileNetV2")

BENCHMARKS = (
    Entry("kd_step", 3.0, {"cpu": 30.0, "cuda": 60.0}, {"cuda": THREE_PAIRS}),
    Entry("ablation", 3.0, {"cpu": 60.0, "cuda": 90.0}),
    Entry("floor", 1.5, {"cpu": 20.0, "cuda": 70.0}),
    Entry("reference_cost", 2.0, {"cpu": 20.0, "cuda": 40.0}, {"cuda": THREE_PAIRS}),
    Entry("data_path", 1.0, {"cpu": 15.0, "cuda": 15.0}),
    Entry("matrix_cost", 0.0, {}),  # a quarter of an hour, by itself
    Entry("learning", 0.0, {}),  # an hour or more, by itself
)
"""In the order in which they run. What is slow to set up on a GPU is so because it compiles."""


@dataclass(frozen=True)
class Planned:
    """One benchmark with its part of the time."""

    entry: Entry
    seconds: float
    total_s: float


def plan(device: str, minutes: float) -> list[Planned]:
    """The benchmarks that apply to a device, each with its share of the time.

    What remains of the time after setting all of them up is divided by their shares; each gets at
    least :data:`LEAST_S`, even if the sum is then more.
    """
    chosen = [
        entry for entry in BENCHMARKS
        if device in entry.setup_s and (entry.in_gpu_run or device != "cuda")
    ]  # fmt: skip
    measured_s = 60.0 * minutes - sum(entry.setup_s[device] for entry in chosen)
    part = measured_s / sum(entry.share for entry in chosen)
    seconds = [max(LEAST_S, entry.share * part) for entry in chosen]
    return [
        Planned(entry, s, s + entry.setup_s[device])
        for entry, s in zip(chosen, seconds, strict=True)
    ]
