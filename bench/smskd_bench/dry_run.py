"""``smskd-bench run --dry-run``: what a run would do, its time, what savings bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console

from smskd_bench.calibration import FILE, Calibration, Progress, calibrate
from smskd_bench.compatibility import check_plan
from smskd_bench.config import load_matrix
from smskd_bench.cost import plan_cost
from smskd_bench.folds import choose_folds, folded_with
from smskd_bench.importing import check_imports
from smskd_bench.parallel import choose_workers
from smskd_bench.plan import Plan, make_plan
from smskd_bench.prediction import (
    Machine,
    Parallel,
    Predictor,
    Saving,
    Tables,
    left_s,
    savings,
)
from smskd_bench.report.columns import human
from smskd_bench.running import RunRequest, choose_device
from smskd_bench.speed import Workload
from smskd_bench.store import Store
from smskd_bench.table_shelf import why_no_room
from smskd_bench.tables import room_for, size_text

UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def dry_run(request: RunRequest, console: Console, notes: Console) -> None:
    """Print what a run would do; nothing is written but the calibration, in a store that exists.

    Args:
        request: As for a run.
        console: For the answer.
        notes: For what is said while the device is measured.
    """
    plan, paths = make_plan(load_matrix(request.matrix), request.only), request.paths
    store = Store.peek(request.store)
    done = {key for key in plan.nodes if store.is_done(key)}
    device = choose_device(request.device)
    left = [key for key in plan.nodes if key not in done]
    check_imports(plan, left)
    check_plan(plan, left)
    spread = choose_workers(paths.workers, plan, left, device, request.threads)
    spread = replace(spread, threads=request.threads or spread.threads)
    machine = Machine(device, spread.threads or torch.get_num_threads(), request.threads)
    predictor, planned = Predictor(plan, machine), paths.possible_tables(plan, request.only)
    paying = {place: table for place, table in planned.items() if table.pays}
    tables = {p: t for p, t in paying.items() if not why_no_room(t.num_bytes, store.root)}
    with _measuring(notes) as progress:
        folds = choose_folds(paths.fold_seeds, plan, device, store, spread, progress)
        parallel = Parallel(folded_with(folds), spread.workers)
        work = _workloads(predictor, tables, parallel)
        speeds = calibrate(work, device, store, progress)
    seconds = left_s(predictor, tables, done, speeds, parallel)
    lines = [
        *_sizes(plan, done, request),
        *_tables(planned, paying, tables, store),
        f"predicted   {duration_text(seconds)} for what is left: "
        f"{_number(seconds / 3600)} device-hours on {speeds.name}",
        "",
        *_worth(savings(predictor, tables, speeds, parallel)),
        "",
        *_source(speeds, work, store),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """Seconds for a person who plans: 4.2 s, 1.9 min, 3.4 h, 12.5 days."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _number(value: float) -> str:
    """Two digits, and more where they stand before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _workloads(predictor: Predictor, tables: Tables, parallel: Parallel) -> list[Workload]:
    """All that has to be measured, without tables and with them; what costs most comes first."""
    keys = list(predictor.plan.nodes)
    total = predictor.bill(keys)
    total.add(predictor.bill(keys, tables, folds=parallel.folds))
    return sorted(total.images, key=lambda work: -work.macs * total.images[work])


def _sizes(plan: Plan, done: set[str], request: RunRequest) -> list[str]:
    cost = plan_cost(plan, done)
    saved = 100.0 * (1.0 - cost.macs / cost.macs_before)
    return [
        f"matrix      {plan.matrix.name}: {request.matrix}",
        f"cells       {cost.cells:,}",
        f"stage runs  {cost.stages:,} (of {cost.stages_before:,} if every cell ran alone)",
        f"epochs      {cost.epochs:,} (of {cost.epochs_before:,})",
        f"MACs        {human(cost.macs)} (of {human(cost.macs_before)}; "
        f"sharing saves {saved:.0f} %)",
        f"done        {cost.done:,} stage runs in {request.store}",
        f"left        {cost.stages - cost.done:,} stage runs, {cost.epochs_left:,} epochs, "
        f"{human(cost.macs_left)} MACs",
    ]


def _tables(planned: Tables, paying: Tables, fitting: Tables, store: Store) -> list[str]:
    """How many frozen networks get a table, what the tables need, and why others get none."""
    if not planned:
        return ["tables      none: no stage run reads a frozen network"]
    sizes = [table.num_bytes for table in paying.values()]
    text = f"tables      {len(paying)} of {len(planned)} frozen networks are worth one"
    size = f": {size_text(max(sizes))} at most, {size_text(sum(sizes))} in all" if sizes else ""
    lines = [text + size]
    if lacking := [size for place, size in zip(paying, sizes, strict=True) if place not in fitting]:
        why = why_no_room(max(lacking), store.root)
        lines.append(f"            {len(lacking)} do not fit and are run live: {why}")
    elif why := room_for(sum(sizes), store.root):
        lines.append(f"            not all fit at once: {why}")
    reasons = Counter(table.why_not for table in planned.values() if not table.pays)
    return lines + [f"            {n} live: {why}" for why, n in reasons.most_common(2)]


def _worth(lines: list[Saving]) -> list[str]:
    """The savings as an aligned table."""
    alone = lines[0].seconds
    head = f"{'the whole plan':<24} {'time':>10} {'factor':>8}"
    return [head] + [
        f"  {line.name:<22} {duration_text(line.seconds):>10} {alone / line.seconds:>8.1f}"
        for line in lines
    ]


def _source(speeds: Calibration, work: list[Workload], store: Store) -> list[str]:
    """On what the prediction rests, and what it lacks."""
    counts = sorted({w.threads for w in work})
    threads = f"{' or '.join(map(str, counts))} thread{'s' if counts[-1] > 1 else ''}"
    kept = f"kept in {store.root / FILE}" if store.is_there() else "kept once the store exists"
    where = (
        f"in {speeds.seconds:.1f} s; {kept}" if speeds.seconds else f"before: {store.root / FILE}"
    )
    late = ", ".join(str(work) for work in speeds.estimated)
    return [
        f"times: a prediction from speeds measured on {speeds.name}, {threads}, {where}",
        *(f"not measured, so not counted: {w}: {why}" for w, why in speeds.failed.items()),
        *([f"estimated from their MACs, for want of time: {late}"] if late else []),
    ]


@contextmanager
def _measuring(notes: Console) -> Iterator[Progress]:
    """Says that something is measured, once there is something: live on a terminal, else a line."""
    status = notes.status("", spinner="line")

    def say(done: int, total: int, what: str) -> None:
        text = f"measuring the speed of this device: {total} short trials"
        if notes.is_terminal:
            status.start()
            status.update(f"{text}, {done} done: {what}")
        elif done == 0:
            notes.print(f"{text} ...", highlight=False, markup=False, soft_wrap=True)

    try:
        yield say
    finally:
        status.stop()
