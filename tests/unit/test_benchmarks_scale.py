"""The simulated cluster against a plain replay and its bounds; the scale benchmark on a small store."""

import json
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import plan_of
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.prediction import Machine, Predictor
from smskd_bench.speed import Workload
from smskd_bench.store import Store
from smskd_bench.tables import plan_tables

from benchmarks import scale, simulate
from benchmarks.made_store import make
from benchmarks.page_part import rewrite
from benchmarks.scale_page import verdict
from benchmarks.scale_runs import Measured, Use, use_of
from benchmarks.simulated_cluster import longest_chain, schedules
from benchmarks.simulated_cluster import simulate as simulated
from benchmarks.stage_costs import by_macs, fill_shares, wanted, with_live_networks, with_tables
from smskd.errors import ConfigError, RunError

PLAN = plan_of(
    seeds=[0, 1],
    rows=[["scratch"], ["kd"], ["fitnet", "kd"], ["fitnet", "sp"], ["fitnet", "sp", "kd"]],
    pairs=[
        {"teacher": "resnet14_half", "student": "resnet8_quarter"},
        {"teacher": "resnet8", "student": "resnet8_quarter"},
    ],
)
SECONDS = st.one_of(st.just(1.0), st.floats(0.001, 1000.0))
COSTS = st.fixed_dictionaries(dict.fromkeys(PLAN.nodes, SECONDS))


def replay(plan, costs, devices):
    """The policy once more, from the definition: at every end of a stage run, each free device
    takes the first stage run of the plan that is not begun and whose dependencies are over."""
    starts, ends, now = {}, {}, 0.0
    while len(ends) < len(plan.nodes) or any(end > now for end in ends.values()):
        for key, spec in plan.nodes.items():
            busy = sum(end > now for end in ends.values())
            over = all(ends.get(before, now + 1.0) <= now for before in spec.depends_on)
            if key not in starts and over and busy < devices:
                starts[key], ends[key] = now, now + costs[key]
        now = min((end for end in ends.values() if end > now), default=now)
    return starts, now


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, devices=st.integers(1, 40))
def test_a_simulation_is_the_replay_of_its_policy(costs, devices):
    found = simulated(PLAN, costs, devices)
    starts, makespan = replay(PLAN, costs, devices)
    assert found.starts == starts
    assert found.makespan_s == makespan


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, devices=st.integers(1, 40))
def test_no_schedule_is_shorter_than_its_bound_or_longer_than_grahams(costs, devices):
    found = simulated(PLAN, costs, devices)
    assert found.makespan_s >= found.bound_s * (1.0 - 1e-12)
    # Graham (1966): whatever the order, a device is idle only while the critical path advances.
    longest = found.work_s / devices + found.longest_chain_s * (1.0 - 1.0 / devices)
    assert found.makespan_s <= longest * (1.0 + 1e-12)
    assert 0.0 < found.efficiency <= 1.0 + 1e-12


@settings(max_examples=30, deadline=None)
@given(costs=COSTS)
def test_one_device_takes_all_the_work_and_many_the_critical_path(costs):
    one, many = schedules(PLAN, costs, [1, len(PLAN.nodes)])
    assert one.makespan_s == pytest.approx(one.work_s, rel=1e-12)
    assert list(one.starts) == list(PLAN.nodes)  # in plan order
    assert many.makespan_s == pytest.approx(many.longest_chain_s, rel=1e-12)


def test_the_longest_chain_is_a_chain():
    costs = dict.fromkeys(PLAN.nodes, 1.0)
    chain = longest_chain(PLAN, costs)
    assert len(chain) == 4  # teacher and three stages
    for before, after in pairwise(chain):
        assert before in PLAN.nodes[after].depends_on


def predicted(**entries):
    plan = plan_of(
        dataset={"name": "digits", "train_size": 200}, recipe={"epochs": [20]}, **entries
    )
    predictor = Predictor(plan, Machine("cpu", 1, 1))
    tables = {place: table for place, table in plan_tables(plan).items() if table.pays}
    return plan, predictor, tables


def speeds_of(predictor, tables):
    from smskd_bench.calibration import Calibration

    work = wanted(predictor, tables)
    return Calibration("cpu", "a CPU", {one: 0.5 + number for number, one in enumerate(work)})


def test_costs_add_up_to_the_bill_of_the_prediction():
    plan, predictor, tables = predicted(seeds=[0, 1], rows=[["kd"], ["dkd", "kd"]])
    speeds = speeds_of(predictor, tables)
    assert tables
    live = with_live_networks(predictor, speeds)
    assert sum(live.values()) == pytest.approx(predictor.bill(plan.nodes).seconds(speeds))
    looked_up = with_tables(predictor, tables, speeds)
    whole = predictor.bill(plan.nodes, tables).seconds(speeds)
    assert sum(looked_up.values()) == pytest.approx(whole)
    assert sum(by_macs(plan, 7.0).values()) == pytest.approx(7.0)


def test_the_first_reader_of_a_table_fills_most_of_it():
    plan, _, tables = predicted(seeds=[0], rows=[["kd"], ["dkd"]])
    (table,) = tables.values()
    first, second = fill_shares(table, plan).values()
    assert (first, second) == (pytest.approx(1.0), pytest.approx(0.0))  # the same seed, same views


def test_simulate_writes_its_page_and_picture(tmp_path):
    page, picture = tmp_path / "page.md", tmp_path / "picture.svg"
    page.write_text("before\n<!-- simulation: begin -->old<!-- simulation: end -->\nafter\n")
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(
        "name: tiny\ndataset: {name: digits}\n"
        "pairs: [{teacher: resnet8, student: resnet8_quarter}]\nseeds: [0]\nrows: [[kd]]\n"
        "recipe: {epochs: [2]}\nteacher: {epochs: 2}\n"
    )
    words = ["--matrix", str(matrix), "--markdown", str(page), "--picture", str(picture)]
    words += ["--output", str(tmp_path)]
    refused = CliRunner().invoke(simulate.main, [*words, "--kept"])
    assert isinstance(refused.exception, ConfigError)
    plan = make_plan(load_matrix(matrix))
    predictor = Predictor(plan, Machine("cpu", 1, 1))
    work = wanted(predictor, {p: t for p, t in plan_tables(plan).items() if t.pays})
    entries = [{"work": asdict(one), "ms_per_image": 2.0} for one in work]
    environment = {
        "machine": {"cores": 2, "python": "3"}, "packages": {"torch": "2"}, "device": "a CPU",
        "load_average": [0.5], "date": "today", "code": {"revision": None},
    }  # fmt: skip
    kept = tmp_path / "simulate-cpu.json"
    kept.write_text(json.dumps({"threads": 1, "environment": environment, "measured": entries}))
    done = CliRunner().invoke(simulate.main, [*words, "--kept"], catch_exceptions=False)
    assert done.exit_code == 0
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| 512 |" in written
    assert "old" not in written
    assert "Critical path" in written
    assert picture.read_text().startswith("<?xml")


def test_speeds_are_measured_in_processor_time():
    from benchmarks.stage_costs import measured_speeds

    work = Workload("resnet8_quarter", "digits", 8, "fp32", 1, "forward")
    told = []
    assert measured_speeds([work], Machine("cpu", 1, 1), told.append)[work] > 0.0
    assert len(told) == 1


def test_a_page_without_a_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="no place"):
        rewrite(page, "scale", "text")


def test_what_a_process_takes_is_its_own():
    use = use_of([sys.executable, "-c", "x = bytearray(50 * 2**20)"])
    assert 50.0 < use.peak_mib < 100.0  # and not what this process has
    assert use.cpu_s > 0.0
    with pytest.raises(RunError, match="failed"):
        use_of([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize(
    ("wall", "cpu", "peak", "goal", "said"),
    [
        (9.0, 8.0, 500.0, 10.0, "met"),
        (11.0, 8.0, 500.0, 10.0, "met in CPU s only"),
        (11.0, 10.5, 500.0, 10.0, "not met"),
        (9.0, 8.0, 960.0, 10.0, "not met"),
        (99.0, 99.0, 9999.0, None, ""),
    ],
)
def test_a_goal_is_met_by_every_run(wall, cpu, peak, goal, said):
    uses = [Use(1.0, 1.0, 1.0), Use(wall, cpu, peak)]
    assert verdict(Measured("what", "command", goal, uses)) == said


@pytest.mark.slow
def test_the_made_store_is_read_by_the_real_commands(tmp_path):
    made = make(tmp_path, seeds=1)
    assert (made.cells, made.stage_runs) == (2000, 2008)
    plan, store = make_plan(load_matrix(made.matrix)), Store.peek(made.store)
    assert all(store.is_done(key) for key in plan.nodes)
    page = tmp_path / "page.md"
    page.write_text("<!-- scale: begin --><!-- scale: end -->")
    words = ["--seeds", "1", "--rounds", "1", "--work", str(tmp_path), "--markdown", str(page)]
    assert CliRunner().invoke(scale.main, words, catch_exceptions=False).exit_code == 0
    assert "2,000 cells" in page.read_text()


def test_a_made_matrix_has_as_many_cells_as_it_says():
    import yaml
    from matrices import load_text

    from benchmarks.made_store import matrix_document

    plan = make_plan(load_text(yaml.safe_dump(matrix_document(2))))
    assert len(plan.cells) == 4000
    assert len({cell.stages[-1] for cell in plan.cells}) == 4000


def test_the_replay_itself_is_right_on_a_case_by_hand():
    plan = plan_of(rows=[["scratch"], ["kd"]])
    teacher, plain, taught = plan.nodes
    costs = {teacher: 3.0, plain: 2.0, taught: 1.0}
    assert replay(plan, costs, 2)[1] == 4.0
    assert simulated(plan, costs, 2).starts == {teacher: 0.0, plain: 0.0, taught: 3.0}
