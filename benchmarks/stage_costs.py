"""What each stage run of a plan costs on one device, from speeds that were measured there."""

from __future__ import annotations

import time
from collections.abc import Callable

from smskd_bench.calibration import Calibration
from smskd_bench.cost import stage_macs
from smskd_bench.plan import Plan
from smskd_bench.prediction import Machine, Predictor, Tables
from smskd_bench.speed import Workload, as_measured, measure
from smskd_bench.tables import TablePlan, expected_views, num_views

from benchmarks.simulated_cluster import Costs

Say = Callable[[str], None]

EACH_S = 1.0
"""Measuring time of one kind of work after its warm-up."""


def wanted(predictor: Predictor, tables: Tables) -> list[Workload]:
    """Every kind of work of a plan, with tables and without."""
    bill = predictor.bill(predictor.plan.nodes)
    bill.add(predictor.bill(predictor.plan.nodes, tables))
    return list(dict.fromkeys(as_measured(w, predictor.machine.device) for w in bill.images))


def measured_speeds(work: list[Workload], machine: Machine, say: Say) -> dict[Workload, float]:
    """Milliseconds an image of every kind of work.

    One thread of a CPU is measured in processor time, which other programs hardly change.
    """
    alone = machine.device == "cpu" and machine.threads == 1
    clock = time.process_time if alone else time.perf_counter
    speeds: dict[Workload, float] = {}
    for number, one in enumerate(work, start=1):
        speeds[one] = measure(one, machine.device, EACH_S, clock)
        say(f"{number} of {len(work)}: {one}: {speeds[one]:.3f} ms an image")
    return speeds


def with_live_networks(predictor: Predictor, speeds: Calibration) -> Costs:
    """Every stage run with its teachers and reference run live."""
    nodes = predictor.plan.nodes.items()
    return {key: predictor.stage(spec).seconds(speeds) for key, spec in nodes}


def with_tables(predictor: Predictor, tables: Tables, speeds: Calibration) -> Costs:
    """Every stage run with frozen networks looked up, and its share of the filling of tables.

    Users of a table fill what those before them, in plan order, have left.
    """
    plan = predictor.plan
    costs = {key: predictor.stage(s, tables).seconds(speeds) for key, s in plan.nodes.items()}
    for table in tables.values():
        forwards_s = predictor.filling(table).seconds(speeds)
        for key, share in fill_shares(table, plan).items():
            costs[key] += share * forwards_s
    return costs


def fill_shares(table: TablePlan, plan: Plan) -> dict[str, float]:
    """What part of a table's filling falls to each of its users; the parts add up to 1."""
    views = num_views(plan.nodes[table.network].dataset)
    drawn: set[tuple[int, int]] = set()
    filled, shares = 0.0, {}
    for key in table.users:
        spec = plan.nodes[key]
        first = spec.first_epoch + 1
        drawn |= {(spec.seed, epoch) for epoch in range(first, first + spec.training.epochs)}
        now = expected_views(views, len(drawn))
        shares[key], filled = (now - filled) / table.epochs_built, now
    return shares


def by_macs(plan: Plan, total_s: float) -> Costs:
    """``total_s`` shared out by multiply-accumulates, as if every network were as efficient."""
    macs = {key: stage_macs(spec, plan) for key, spec in plan.nodes.items()}
    rate = total_s / sum(macs.values())
    return {key: count * rate for key, count in macs.items()}
