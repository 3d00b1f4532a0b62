"""What the reference costs in a later stage, and what weighting it by 1-TCP adds.

    python -m benchmarks.reference_cost
    python -m benchmarks.reference_cost --pair 'resnet110>resnet20' --pair 'ResNet50>MobileNetV2'

A stage of KD with a live teacher or its table, without a reference and with one: a differently
seeded student, its samples weighted equally or by 1-TCP. "By arithmetic" is one forward of the
student over the multiply-accumulates of the step without it, a backward pass counting as two
forward passes: s / (3s + t) with a live teacher, s / 3s with its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.cells import quartiles
from benchmarks.command import common_options, publish, run, set_up
from benchmarks.cost_group import CostGroup, costs
from benchmarks.expected import (
    CONSTANT,
    NO_REFERENCE,
    PAIRS,
    REFERENCE_COST,
    SOURCES,
    TCP,
    TCP_TABLE,
    cost_group,
    cost_name,
)
from benchmarks.interleave import WARMUP_ROUNDS, Clock, Rounds, Spread, interleave, spread
from benchmarks.timing import STEPS

if TYPE_CHECKING:
    import torch

    from benchmarks.bench_pair import BenchPair
    from benchmarks.images import TrainImages
    from benchmarks.ours import Options, OurLoop
    from benchmarks.pair import Pair
    from benchmarks.same_work import Difference
    from smskd.data import Batch
    from smskd.settings import Precision

PREVIOUS_SEED = 1
EXCLUDED = (
    "reading the data set",
    "building networks and stage",
    "filling the tables of teacher and reference",
    "the first round",
)


@dataclass(frozen=True)
class Settings:
    """What is the same for all pairs; ``seconds`` of one."""

    device: torch.device
    batch_size: int
    rounds: int
    seconds: float
    precision: Precision
    clock: Clock


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@common_options(rounds=20, seconds=150)
@click.option("--pair", "pairs", multiple=True, default=PAIRS[:1], show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32",
              show_default=True)  # fmt: skip
def main(
    device: str, threads: int | None, rounds: int, seconds: float, batch_size: int,
    data_root: Path | None, output: Path | None, pairs: tuple[str, ...], precision: Precision,
) -> None:  # fmt: skip
    """Time every kind of stage of every pair and write the result."""
    from benchmarks.images import load_images
    from benchmarks.numerics import unchanged_numerics
    from benchmarks.pair import known_pair

    place, clock = set_up(device, threads)
    known = [known_pair(pair) for pair in pairs]
    data = load_images(data_root)
    settings = Settings(place, batch_size, rounds, seconds / len(pairs), precision, clock)
    with unchanged_numerics():
        groups = [measure(pair, data, settings) for pair in known]
    shown = {
        "batch": batch_size, "precision": precision, "steps_a_turn": STEPS[device],
        "images": data.source,
    }  # fmt: skip
    publish(REFERENCE_COST, device, groups, shown, EXCLUDED, output)


def measure(pair: Pair, data: TrainImages, settings: Settings) -> CostGroup:
    """Time all kinds of stage of one pair in turn."""
    from benchmarks.bench_pair import BenchPair, turns_of
    from smskd.cost import model_cost

    s, steps = settings, STEPS[settings.device.type]
    images = (s.rounds + WARMUP_ROUNDS) * steps * s.batch_size
    with BenchPair(pair, data, s.batch_size, s.device) as bench:
        shape = tuple(bench.image().shape[1:])
        student, teacher = (
            model_cost(network, (shape[0], shape[1], shape[2])).macs
            for network in (bench.networks.student(), bench.networks.teacher())
        )
        notes: dict[str, Any] = {"student_macs": student, "teacher_macs": teacher}
        loops = [bench.loop(options) for options in kinds(bench, images, s.precision)]
        notes |= {"one_step": check_kinds(loops, bench.plain_batch())}
        rounds = interleave(turns_of(loops, steps), s.rounds, s.seconds, clock=s.clock)
    weighting = weighting_costs(rounds)
    notes |= {"weighting_percent": {source: asdict(cost) for source, cost in weighting.items()}}
    said = ", ".join(f"teacher {name} {quartiles(asdict(c), 1)}" for name, c in weighting.items())
    return replace(
        cost_group(str(pair)), rounds=rounds, notes=notes, bounds=bounds(student, teacher),
        remarks=[f"Weighting by 1-TCP costs over constant weights, in percent: {said}."],
    )  # fmt: skip


def weighting_costs(rounds: Rounds) -> dict[str, Spread]:
    """What 1-TCP costs over constant weights in percent, by the source of the teacher."""
    timed = rounds.timed
    return {
        source: spread(costs(timed[cost_name(source, TCP)], timed[cost_name(source, CONSTANT)]))
        for source in SOURCES
    }


def check_kinds(loops: Sequence[OurLoop], batch: Batch) -> dict[str, Difference]:
    """Check that stages with the same kind of reference do the same, live or looked up.

    Raises:
        RefusedError: two of them do not.
    """
    from benchmarks.same_work import check_same_work

    found: dict[str, Difference] = {}
    for kind in (NO_REFERENCE, CONSTANT, TCP):
        same = [loop for loop in loops if kind in loop.name]
        found |= check_same_work(same, batch.images, batch.labels, batch.index)
    return found


def kinds(bench: BenchPair, images: int, precision: Precision) -> list[Options]:
    """Our ways to train, one a row of the table."""
    from benchmarks.ours import Held, Options
    from smskd.settings import Reference, Weighting

    previous = bench.networks.previous_student(PREVIOUS_SEED)
    constant = Held(previous, Reference(weighting=Weighting(map="constant")))
    weighted = Held(previous, Reference())
    looked_up = replace(weighted, table=bench.student_table(previous, images))
    table = bench.teacher_table(images)
    ways = []
    for source in SOURCES:
        teacher = table if source == "table" else None
        held = {NO_REFERENCE: None, CONSTANT: constant, TCP: weighted}
        held |= {TCP_TABLE: looked_up} if teacher else {}
        for kind, reference in held.items():
            title = cost_name(source, kind)
            ways.append(Options(precision, teacher, held=reference, title=title))
    return ways


def bounds(student_macs: int, teacher_macs: int) -> Mapping[str, float]:
    """By row, the cost in percent that multiply-accumulates alone lead to expect."""
    step = {"live": 3 * student_macs + teacher_macs, "table": 3 * student_macs}
    found = {
        cost_name(source, kind): 100.0 * student_macs / step[source]
        for source in SOURCES
        for kind in (CONSTANT, TCP)
    }
    return found | {cost_name("table", TCP_TABLE): 0.0}


if __name__ == "__main__":
    run(main)
