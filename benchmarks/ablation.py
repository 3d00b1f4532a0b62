"""What each technique of our step is worth: on and off, folded seeds, processes on one device.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --pair 'resnet110>resnet20' --part techniques --compile

"Everything off" is our step in fp32, in torch's order of memory (NCHW; copying the batch into it is
in the time), with a live teacher and eager networks. Each row below switches one thing on, the last
ones all (TF32 not, which bf16 replaces). Seeds one after another take the same time an image
however many there are, so one row stands for all of them. Processes divide the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.command import common_options, publish, run, set_up
from benchmarks.expected import (
    ABLATION,
    ALL_BUT_COMPILED,
    ALL_OFF,
    ALL_ON,
    ALONE,
    PAIRS,
    SEEDS,
    SMALL_PAIR,
    TF32,
    TINY_PAIR,
    ablation_groups,
    seeds_name,
)
from benchmarks.interleave import WARMUP_ROUNDS, Contestant, interleave
from benchmarks.record import Group
from benchmarks.timing import COMPILE_MISSING, STEPS, Timing

if TYPE_CHECKING:
    import torch

    from benchmarks.images import TrainImages
    from benchmarks.ours import Options, OurLoop
    from benchmarks.pair import Pair
    from smskd.frozen import Frozen

TECHNIQUES, FOLDED, PROCESSES = "techniques", "folded", "processes"
SHARES = {TECHNIQUES: 0.55, FOLDED: 0.25, PROCESSES: 0.2}
"""Of the time budget."""

FOLDED_BATCHES = {"cpu": 8, "cuda": 80}
"""Batches of one turn, of all seeds together."""

TINY_TIMES = 5
"""So many times more of the 8x8 digits, so that a turn is not too short to time."""

EXCLUDED = (
    "reading the data set",
    "building networks and stage",
    "filling the teacher's table",
    "compiling (below its table)",
    "starting processes",
    "the first round",
)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@common_options(rounds=20, seconds=200)
@click.option("--pair", default=PAIRS[0], show_default=True)
@click.option("--small-pair", default=SMALL_PAIR, show_default=True,
              help="Of the folded seeds and the processes.")  # fmt: skip
@click.option("--part", "parts", type=click.Choice(list(SHARES)), multiple=True,
              default=list(SHARES), show_default=True)  # fmt: skip
@click.option("--compile/--no-compile", "compiled", default=None,
              help="Measure compiled networks; default on a GPU only.")  # fmt: skip
def main(
    device: str, threads: int | None, rounds: int, seconds: float, batch_size: int,
    data_root: Path | None, output: Path | None, pair: str, small_pair: str,
    parts: tuple[str, ...], compiled: bool | None,
) -> None:  # fmt: skip
    """Time every part and write the result."""
    from benchmarks.images import load_digits, load_images
    from benchmarks.numerics import unchanged_numerics
    from benchmarks.pair import known_pair

    place, clock = set_up(device, threads)
    big, small = known_pair(pair), known_pair(small_pair)
    compiled = device == "cuda" if compiled is None else compiled
    share = seconds / sum(SHARES[part] for part in parts)
    settings = Timing(place, batch_size, rounds, share, compiled, clock)
    data = load_images(data_root)
    first, folded, tiny, processes = ablation_groups(pair, small_pair, device)
    with unchanged_numerics():
        if TECHNIQUES in parts:
            first = techniques(first, big, data, settings)
        if FOLDED in parts:
            folded = seeds(folded, small, data, settings)
            tiny = seeds(tiny, known_pair(TINY_PAIR), load_digits(), settings)
        if PROCESSES in parts:
            processes = workers(processes, small, settings)
    shown = {
        "batch": batch_size, "steps_a_turn": STEPS[device], "images": data.source,
    }  # fmt: skip
    publish(ABLATION, device, [first, folded, tiny, processes], shown, EXCLUDED, output)


def techniques(group: Group, pair: Pair, data: TrainImages, settings: Timing) -> Group:
    """Time each switch by itself, and all of them."""
    from benchmarks.bench_pair import BenchPair, turns_of
    from benchmarks.same_work import check_same_work

    s, steps = settings, STEPS[settings.device.type]
    images = (s.rounds + WARMUP_ROUNDS) * steps * s.batch_size
    with BenchPair(pair, data, s.batch_size, s.device) as bench:
        ways = switches(bench.teacher_table(images), s.device)
        possible = {name: ways[name] for name in group.expected if not _left_out(ways[name], s)}
        missing = {name: _left_out(ways[name], s) for name in group.expected}
        seconds = {n: _compile_s(partial(bench.loop, o)) for n, o in possible.items() if o.compiled}
        loops = [bench.loop(options) for options in possible.values()]
        batch = bench.plain_batch()
        notes = {"one_step": check_same_work(loops, batch.images, batch.labels, batch.index)}
        budget = SHARES[TECHNIQUES] * s.seconds - sum(seconds.values())
        rounds = interleave(turns_of(loops, steps), s.rounds, budget, clock=s.clock)
    took = ", ".join(f"{name} {t:.0f} s" for name, t in seconds.items())
    said = [f"Compiling, once a process: {took}."] if took else []
    return replace(
        group, rounds=rounds, notes=notes | {"compile_s": seconds}, remarks=said,
        missing={name: why for name, why in missing.items() if why},
    )  # fmt: skip


def switches(table: Frozen, device: torch.device) -> dict[str, Options]:
    """Our ways to train by their name in the table."""
    from benchmarks.ours import Options
    from smskd.precision import why_not

    off = Options(channels_last=False, title=ALL_OFF)
    narrow = off if why_not("bf16", device) else replace(off, precision="bf16")
    most = replace(narrow, channels_last=True, table=table)
    ways = {
        ALL_OFF: off,
        "channels last": replace(off, channels_last=True),
        "table": replace(off, table=table),
        "bf16": replace(off, precision="bf16"),
        "compiled": replace(off, compiled=True),
        TF32: replace(off, precision="tf32"),
        ALL_BUT_COMPILED: most,
        ALL_ON: replace(most, compiled=True),
    }
    return {name: replace(options, title=name) for name, options in ways.items()}


def _left_out(options: Options, settings: Timing) -> str | None:
    """Why one of the ways is not measured, or None."""
    from smskd.precision import why_not

    if options.compiled and not settings.compiled:
        return COMPILE_MISSING
    return why_not(options.precision, settings.device)


def _compile_s(make: Callable[[], OurLoop]) -> float:
    """Seconds that the first step takes longer than the second; later loops reuse the code."""
    loop = make()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        batch = next(loop.source)
        loop.step(batch).item()
        times.append(time.perf_counter() - began)
    return times[0] - times[1]


def seeds(group: Group, pair: Pair, data: TrainImages, settings: Timing) -> Group:
    """Time 2, 4 and 8 folded seeds beside one after another."""
    from benchmarks.bench_pair import BenchPair
    from benchmarks.folded_loop import FoldedLoop
    from benchmarks.images import DIGITS, INFO
    from benchmarks.numerics import EXACT
    from benchmarks.ours import Options

    s, tiny = settings, data.source == DIGITS.name
    batches = FOLDED_BATCHES[s.device.type] * (TINY_TIMES if tiny else 1)
    info = DIGITS if tiny else INFO
    EXACT.apply()
    with BenchPair(pair, data, s.batch_size, s.device, info) as bench:
        turns = [Contestant(ALONE, partial(bench.loop(Options()).train, batches))]
        for count in SEEDS:
            teacher = bench.networks.teacher()
            loop = FoldedLoop([bench.loop(Options(), seed, teacher) for seed in range(count)])
            turns.append(Contestant(seeds_name(count), partial(loop.train, batches // count)))
        rounds = interleave(turns, s.rounds, SHARES[FOLDED] * s.seconds / 2, clock=s.clock)
    return replace(group, rounds=rounds)


def workers(group: Group, pair: Pair, settings: Timing) -> Group:
    """Time 2, 4 and 8 processes beside one that has all cores."""
    import torch

    from benchmarks.crew_turns import crew_turns

    s = settings
    with ExitStack() as stack:
        turns, missing = crew_turns(
            pair, s.batch_size, s.device.type, torch.get_num_threads(), stack
        )
        rounds = interleave(turns, s.rounds, SHARES[PROCESSES] * s.seconds, clock=s.clock)
    return replace(group, rounds=rounds, missing=missing)


if __name__ == "__main__":
    run(main)
