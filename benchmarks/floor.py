"""How near a training step comes to the least time that this device could need for it.

    python -m benchmarks.floor
    python -m benchmarks.floor --device cuda --pair 'resnet110>resnet20'

The least time follows from multiply-accumulates and bytes, layer by layer (:mod:`benchmarks.counts`
says what is counted), and from what the device does with a large matrix product and a large copy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.command import common_options, publish, run, set_up
from benchmarks.expected import COMPILED, FLOOR, PAIRS, SOURCES, floor_group, floor_name
from benchmarks.floor_group import FloorGroup
from benchmarks.interleave import WARMUP_ROUNDS, interleave
from benchmarks.timing import COMPILE_MISSING, STEPS, Timing

if TYPE_CHECKING:
    from benchmarks.bench_pair import BenchPair
    from benchmarks.counts import Floor, Peaks
    from benchmarks.images import TrainImages
    from benchmarks.ours import Options
    from benchmarks.pair import Pair
    from smskd.settings import Precision

NO_PRECISION = "the device does not have this precision"
EXCLUDED = (
    "reading the data set",
    "building networks and stage",
    "filling the teacher's table",
    "compiling",
    "the first round",
)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@common_options(rounds=20, seconds=90)
@click.option("--pair", "pairs", multiple=True, default=PAIRS[:1], show_default=True)
@click.option("--compile/--no-compile", "compiled", default=None,
              help="Measure compiled networks; default on a GPU only.")  # fmt: skip
def main(
    device: str, threads: int | None, rounds: int, seconds: float, batch_size: int,
    data_root: Path | None, output: Path | None, pairs: tuple[str, ...], compiled: bool | None,
) -> None:  # fmt: skip
    """Measure peaks and steps and write the result."""
    from benchmarks.images import load_images
    from benchmarks.numerics import unchanged_numerics
    from benchmarks.pair import known_pair
    from benchmarks.peaks import measured_peaks
    from smskd.precision import why_not

    place, clock = set_up(device, threads)
    known = [known_pair(pair) for pair in pairs]
    compiled = device == "cuda" if compiled is None else compiled
    settings = Timing(place, batch_size, rounds, seconds / len(pairs), compiled, clock)
    data = load_images(data_root)
    precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
    with unchanged_numerics():
        peaks = measured_peaks([p for p in precisions if not why_not(p, place)], place, clock)
        groups = [measure(pair, data, settings, peaks) for pair in known]
    shown = {"batch": batch_size, "steps_a_turn": STEPS[device], "images": data.source}
    publish(FLOOR, device, groups, shown, EXCLUDED, output)


def measure(
    pair: Pair, data: TrainImages, settings: Timing, peaks: dict[Precision, Peaks]
) -> FloorGroup:
    """Count and time all kinds of step of one pair."""
    from benchmarks.bench_pair import BenchPair, turns_of
    from benchmarks.same_work import check_same_work

    s, steps = settings, STEPS[settings.device.type]
    group = floor_group(str(pair), s.device.type)
    images = (s.rounds + WARMUP_ROUNDS) * steps * s.batch_size
    with BenchPair(pair, data, s.batch_size, s.device) as bench:
        ways = kinds(bench, images, tuple(peaks), s.compiled)
        floors = {way.name: floor_of_way(bench, way, peaks[way.precision]) for way in ways}
        loops = [bench.loop(way) for way in ways]
        batch = bench.plain_batch()
        same = check_same_work(loops, batch.images, batch.labels, batch.index)
        rounds = interleave(turns_of(loops, steps), s.rounds, s.seconds, clock=s.clock)
    lacking = [name for name in group.expected if name not in floors]
    eager = {name for name in lacking if name.endswith(COMPILED) and not s.compiled}
    missing = {name: COMPILE_MISSING if name in eager else NO_PRECISION for name in lacking}
    notes = {"one_step": same, "peaks": {p: vars(peak) for p, peak in peaks.items()}}
    return replace(
        group, steps=steps, floors=floors, rounds=rounds, missing=missing,
        notes=notes, remarks=[peaks_text(peaks)],
    )  # fmt: skip


def kinds(
    bench: BenchPair, images: int, precisions: tuple[Precision, ...], compiled: bool
) -> list[Options]:
    """Our ways to train, one a row of the table."""
    from benchmarks.ours import Options

    tables = {"live": None, "table": bench.teacher_table(images)}
    ways: list[tuple[Precision, bool]] = [(precision, False) for precision in precisions]
    ways += [("bf16", True)] if compiled and "bf16" in precisions else []
    return [
        Options(p, tables[source], compiled=on, title=floor_name(p, source, on))
        for p, on in ways
        for source in SOURCES
    ]


def floor_of_way(bench: BenchPair, way: Options, peaks: Peaks) -> Floor:
    """Least work and time of one kind of step."""
    from benchmarks.counts import floor_of, step_kernels

    student, teacher = (
        network.to(bench.device) for network in (bench.networks.student(), bench.networks.teacher())
    )
    live = None if way.table else teacher
    batch_size = bench.batches.batch_size
    return floor_of(step_kernels(student, live, bench.image(), batch_size, way.precision), peaks)


def peaks_text(peaks: dict[Precision, Peaks]) -> str:
    """The measured peaks in words."""
    said = [f"{p} {2e-12 * peak.macs_per_s:.3g} TFLOP/s" for p, peak in peaks.items()]
    copied = 1e-9 * max(peak.bytes_per_s for peak in peaks.values())
    return f"Measured peaks: {', '.join(said)} (two FLOP a MAC); memory {copied:.3g} GB/s."


if __name__ == "__main__":
    run(main)
