"""Whether a result that was trained again is the recorded one: in its bits, else in its accuracy.

Training amplifies rounding, so a result in other bits is another draw of the same, as another seed
is. Two rules say whether its accuracy is still what was recorded; one of them is enough:

- on the same test images, an exact McNemar test does not tell the two apart (p at least 0.01);
- it lies in the 95 percent prediction interval for one more draw from the row's recorded seeds,
  mean +- t * s * sqrt(1 + 1 / n), of which there have to be three.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smskd_export.paired import PairedChange, paired_change
from torch import Tensor

from smskd_bench.store import Record

Verdict = Literal["same bits", "other bits, accuracy agrees", "differs"]

ENOUGH_P = 0.01
"""From this p on, chance alone could have made the difference."""

FEWEST_SEEDS = 3
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""0.975 quantiles of Student's t distribution for 1, 2, ... degrees of freedom."""

T_LATER = 2.2622
"""For more of them: that of nine is a little wider than theirs."""

TIMED = ("seconds", "images_per_s")
"""What a row of the history says about time, which no repetition repeats."""

RELATIVE = 1e-6


@dataclass(frozen=True)
class Outputs:
    """What a finished stage run left.

    Attributes:
        record: Its result.
        files: SHA-256 by name of the files with weights and predictions, as they are now.
        predictions: Predicted classes of the test images ``(N,)``.
    """

    record: Record
    files: dict[str, str]
    predictions: Tensor


@dataclass(frozen=True)
class Comparison:
    """What became of it, and the numbers behind that, a line each."""

    verdict: Verdict
    lines: tuple[str, ...] = ()


def compare(
    recorded: Outputs, again: Outputs, labels: Tensor, seeds: Sequence[float]
) -> Comparison:
    """Compare a recorded result with one that was trained again.

    Args:
        recorded: From the store.
        again: Trained now.
        labels: Classes of the test images ``(N,)``.
        seeds: Recorded test accuracies in percent of the row's seeds, this one included.
    """
    if recorded.predictions.shape != labels.shape:
        return Comparison("differs", (f"it predicts {len(recorded.predictions)} test images",))
    change = paired_change(
        (again.predictions == labels).numpy(), (recorded.predictions == labels).numpy()
    )
    told, own = _top1(recorded.record), _percent_right(recorded, labels)
    if told is None or abs(told - own) > 1e-6:
        return Comparison(
            "differs", (f"the record says {told} %, its own predictions are right in {own:.4f} %",)
        )
    if recorded.files == again.files:
        return _same_bits(recorded, again)
    return _other_bits(recorded, again, change, seeds)


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 percent interval of one more draw beside ``values``; None if these are too few."""
    n = len(values)
    if n < FEWEST_SEEDS:
        return None
    t = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else T_LATER
    half = t * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _same_bits(recorded: Outputs, again: Outputs) -> Comparison:
    wrong = [name for name in ("test", "kept", "history") if not _alike(recorded, again, name)]
    if not wrong:
        return Comparison("same bits", ("weights, predictions and the numbers of the record",))
    return Comparison(
        "differs",
        (f"weights and predictions are the same bits, but not its {' and '.join(wrong)}",),
    )


def _other_bits(
    recorded: Outputs, again: Outputs, change: PairedChange, seeds: Sequence[float]
) -> Comparison:
    before, now = _top1(recorded.record), _top1(again.record)
    assert before is not None
    assert now is not None
    lines = [
        f"{before:.2f} % recorded, {now:.2f} % again; of {change.n:,} images {change.gained} "
        f"gained, {change.lost} lost: exact McNemar p = {change.p:.2g} (agrees from {ENOUGH_P})"
    ]
    agrees = change.p >= ENOUGH_P
    interval = prediction_interval(seeds)
    if interval is None:
        lines.append(f"recorded seeds of the row: {len(seeds)}, too few for an interval of theirs")
    else:
        low, high = interval
        agrees = agrees or low <= now <= high
        lines.append(
            f"one more draw from its {len(seeds)} seeds lies within {low:.2f} to {high:.2f} % "
            "19 times in 20"
        )
    verdict: Verdict = "other bits, accuracy agrees" if agrees else "differs"
    return Comparison(verdict, tuple(lines))


def _top1(record: Record) -> float | None:
    test = record.get("test")
    value = test.get("top1") if isinstance(test, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _percent_right(outputs: Outputs, labels: Tensor) -> float:
    return 100.0 * float((outputs.predictions == labels).double().mean())


def _alike(one: Outputs, other: Outputs, name: str) -> bool:
    return _close(one.record.get(name), other.record.get(name))


def _close(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal but for times, and for the last digits of numbers."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = (one.keys() | other.keys()) - set(TIMED)
        return all(_close(one.get(name), other.get(name)) for name in names)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=RELATIVE) if numbers else bool(one == other)
