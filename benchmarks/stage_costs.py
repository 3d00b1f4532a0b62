"""What each stage run of a plan costs on one device, from speeds that were measured there."""

from __future__ import annotations

from collections.abc import Callable

from smskd_bench.calibration import Calibration, calibrate
from smskd_bench.cost import stage_macs
from smskd_bench.plan import Plan
from smskd_bench.prediction import Predictor, Tables
from smskd_bench.speed import Workload, as_measured
from smskd_bench.store import Store
from smskd_bench.tables import TablePlan, expected_views, num_views

from benchmarks.simulated_cluster import Costs

Say = Callable[[str], None]

MOST_SESSIONS = 20
"""Of calibration, each of a quarter of a minute."""


def measured_speeds(predictor: Predictor, tables: Tables, store: Store, say: Say) -> Calibration:
    """Measure every kind of work of a plan, none estimated; what a store has is not repeated."""
    device = predictor.machine.device
    bill = predictor.bill(predictor.plan.nodes)
    bill.add(predictor.bill(predictor.plan.nodes, tables))
    work: list[Workload] = list(dict.fromkeys(as_measured(w, device) for w in bill.images))
    for _ in range(MOST_SESSIONS):
        speeds = calibrate(work, device, store)
        if not speeds.estimated:
            break
        say(f"measured {len(work) - len(speeds.estimated)} of {len(work)} kinds of work")
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
