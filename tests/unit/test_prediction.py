"""Predicted times, counted by hand from made-up speeds, and the dry run that shows them."""

import io
import re
from dataclasses import replace

import pytest
from matrices import plan_of, specs, write_matrix
from rich.console import Console
from smskd_bench.calibration import FILE, Calibration
from smskd_bench.dry_run import dry_run, duration_text
from smskd_bench.fast_paths import FastPaths
from smskd_bench.folds import fold_groups, folded_with
from smskd_bench.prediction import (
    EPOCH_S,
    STAGE_RUN_S,
    Machine,
    Parallel,
    Predictor,
    left_s,
    savings,
)
from smskd_bench.running import RunRequest
from smskd_bench.speed import as_measured
from smskd_bench.store import Store
from smskd_bench.tables import expected_views, plan_tables

N, TEST = 200, 797
TEACHER, STUDENT = "resnet14_half", "resnet8_quarter"
TRAIN_MS, FORWARD_MS = {TEACHER: 6.0, STUDENT: 3.0}, {TEACHER: 2.0, STUDENT: 1.0}


def planned(**entries):
    plan = plan_of(
        **{"dataset": {"name": "digits", "train_size": N}, "recipe": {"epochs": [20]}, **entries}
    )
    predictor = Predictor(plan, Machine("cpu", 4))
    return plan, predictor, {k: t for k, t in plan_tables(plan).items() if t.pays}


def speeds_for(predictor, *tables):
    """Every kind of work at the speeds above, whatever its batch."""
    keys = list(predictor.plan.nodes)
    folds = folded_with(fold_groups(predictor.plan))
    works = {
        w for t in ({}, *tables) for f in ({}, folds)
        for w in predictor.bill(keys, t, folds=f).images
    }  # fmt: skip
    ms = {"train": TRAIN_MS, "forward": FORWARD_MS}
    return Calibration(
        "cpu", "a CPU", {as_measured(w, "cpu"): ms[w.role][w.model] / w.folded for w in works}
    )


def fixed(stage_runs, epochs):
    return stage_runs * STAGE_RUN_S + epochs * EPOCH_S


def test_a_sequence_counted_by_hand():
    plan, predictor, tables = planned(rows=[["fitnet", "kd"]])
    speeds = speeds_for(predictor, tables)
    first, second = specs(plan, "fitnet>kd")

    def seconds(spec, used):
        return predictor.stage(spec, used).seconds(speeds)

    # Live: student step 3, teacher 2, reference 1; maps keep the teacher of the first stage live.
    live = fixed(1, 20) + 20 * N * (3 + 2 + 1) / 1000 + 2 * TEST / 1000
    assert seconds(second, {}) == pytest.approx(live)
    assert seconds(second, tables) == pytest.approx(live - 20 * N * (2 + 1) / 1000)
    both = fixed(1, 20) + 20 * N * (3 + 2) / 1000 + TEST / 1000
    assert seconds(first, {}) == seconds(first, tables) == pytest.approx(both)
    shown = round(expected_views(9, 20) * N)
    filling = [predictor.filling(table).seconds(speeds) for table in tables.values()]
    assert sorted(filling) == pytest.approx([shown * 1 / 1000, shown * 2 / 1000])
    teacher = fixed(1, 3) + 3 * N * 6 / 1000 + TEST * 2 / 1000
    whole = predictor.bill(plan.nodes, tables).seconds(speeds)
    assert whole == pytest.approx(
        teacher + seconds(first, tables) + seconds(second, tables) + sum(filling)
    )


def test_each_saving():
    plan, predictor, tables = planned(rows=[["kd", "kd"], ["kd", "dkd"]], seeds=[0, 1])
    speeds = speeds_for(predictor, tables)
    folds = folded_with(fold_groups(plan))
    lines = savings(predictor, tables, speeds, Parallel(folds, workers=3))
    names = [line.name for line in lines]
    assert names == [
        "every cell alone", "+ prefixes shared", "+ teacher tables", "+ reference tables",
        "+ folded seeds", "+ 3 workers",
    ]  # fmt: skip
    alone, shared, teacher, reference, folded, workers = (line.seconds for line in lines)
    assert alone > shared > teacher > reference > folded >= workers
    # Alone, each of the 4 cells has its teacher and two stages.
    stage = N * 20 * (3 + 2) / 1000 + TEST / 1000
    second = stage + N * 20 / 1000 + TEST / 1000
    own_teacher = 3 * N * 6 / 1000 + TEST * 2 / 1000
    assert alone == pytest.approx(4 * (own_teacher + stage + second) + fixed(12, 4 * 43))
    assert shared == pytest.approx(own_teacher + 2 * stage + 4 * second + fixed(7, 3 + 6 * 20))
    assert folded == pytest.approx(reference - 6 * N * 20 * 3 / 2 / 1000)
    chain = predictor.longest_chain_s(plan.nodes, tables, speeds)
    assert workers == pytest.approx(max(folded / 3, min(chain, folded)))


def test_workers_wait_for_the_longest_chain():
    plan, predictor, _ = planned(rows=[["kd", "kd"]])
    speeds = speeds_for(predictor)
    many = Parallel(workers=100, worker_speedup=100.0)
    everything = predictor.bill(plan.nodes).seconds(speeds)
    # One cell is one chain: its teacher, its first stage, its second.
    assert left_s(predictor, {}, set(), speeds, many) == pytest.approx(everything)


def test_what_is_left():
    plan, predictor, tables = planned(rows=[["kd"], ["dkd"]])
    speeds = speeds_for(predictor, tables)
    one = Parallel()
    (kd,) = specs(plan, "kd")
    whole = left_s(predictor, tables, set(), speeds, one)
    assert whole == predictor.bill(plan.nodes, tables).seconds(speeds)
    # The one that is done has filled the table with all that the other will read.
    rest = left_s(predictor, tables, {kd.key, *kd.teachers}, speeds, one)
    assert rest == pytest.approx(fixed(1, 20) + 20 * N * 3 / 1000 + TEST / 1000)
    assert left_s(predictor, tables, set(plan.nodes), speeds, one) == 0.0


def test_evaluations():
    _, predictor, _ = planned(
        dataset={"name": "digits", "train_size": N, "dev_size": 50},
        rows=[["scratch", "kd"]], evaluate_every=4,
    )  # fmt: skip
    first, second = specs(predictor.plan, "scratch>kd")
    # Curves after 4, 8, 12 and 16 of 20 epochs; the end is the test itself.
    assert predictor.evaluated(first) == 5 * TEST + 20 * 50
    assert predictor.evaluated(second) == 6 * TEST + 20 * 50


def test_threads_are_the_workers():
    _, predictor, _ = planned(rows=[["kd"]])
    assert {work.threads for work in predictor.bill(predictor.plan.nodes).images} == {1}
    plan = plan_of(
        dataset={"name": "cifar100"}, pairs=[{"teacher": "resnet20", "student": "resnet14"}]
    )
    works = Predictor(plan, Machine("cpu", 4)).bill(plan.nodes).images
    assert {work.threads for work in works} == {4}
    works = Predictor(plan, Machine("cpu", 4, threads=2)).bill(plan.nodes).images
    assert {work.threads for work in works} == {2}


def test_work_that_was_not_measured_counts_nothing():
    plan, predictor, _ = planned(rows=[["scratch"]])
    nothing = Calibration("cpu", "a CPU", {})
    assert predictor.bill(plan.nodes).seconds(nothing) == fixed(1, 20)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (42, "42.0 s"), (114, "1.9 min"), (12240, "3.4 h"), (8.64e7, "1,000.0 days")],
)
def test_durations_for_people(seconds, text):
    assert duration_text(seconds) == text


# ---------------------------------------------------------------------------------------- dry run


def shown(request, **options):
    out, notes = io.StringIO(), io.StringIO()
    dry_run(request, Console(file=out), Console(file=notes), **options)
    return out.getvalue(), notes.getvalue()


@pytest.fixture
def request_of(tmp_path):
    def make(**entries):
        file = write_matrix(tmp_path, dataset={"name": "digits", "train_size": 100}, **entries)
        return RunRequest(file, tmp_path / "store", device="cpu", threads=1)

    return make


def test_dry_run_measures_once(request_of):
    request = request_of(rows=[["kd", "kd"], ["dkd"]], recipe={"epochs": [9]})
    Store.open(request.store)
    out, notes = shown(request)
    assert notes.startswith("measuring the speed of this device: ")
    assert f"kept in {request.store / FILE}" in out
    again, notes = shown(request)
    assert notes == ""
    assert f"before: {request.store / FILE}" in again
    assert again.splitlines()[:-1] == out.splitlines()[:-1]


def test_dry_run_shows_what_savings_bring(request_of):
    request = request_of(rows=[["kd", "kd"], ["dkd"]], recipe={"epochs": [9]}, seeds=[0, 1])
    out, _ = shown(replace(request, paths=FastPaths(fold_seeds="on", workers=2)))
    assert "tables      3 of 3 frozen networks are worth one: " in out
    assert re.search(r"^predicted   [\d.]+ s for what is left: \S+ device-hours on ", out, re.M)
    factors = re.findall(r"^  (.+?)  +[\d.,]+ \w+ +([\d.]+)$", out, re.M)
    assert [name for name, _ in factors] == [
        "every cell alone", "+ prefixes shared", "+ teacher tables", "+ reference tables",
        "+ folded seeds", "+ 2 workers",
    ]  # fmt: skip
    values = [float(value) for _, value in factors]
    assert values[0] == 1.0
    assert values[:4] == sorted(values[:4])  # folding is not always faster
    assert not request.store.exists()


def test_dry_run_without_tables(request_of):
    out, _ = shown(request_of(rows=[["fitnet"]]))
    assert "tables      0 of 1 frozen networks are worth one\n" in out
    assert "            1 live: its maps are read, which no table holds\n" in out
    out, _ = shown(request_of(rows=[["scratch"]]))
    assert "tables      none: no stage run reads a frozen network\n" in out


def test_dry_run_says_where_tables_do_not_fit(request_of, monkeypatch):
    request = request_of(rows=[["kd"], ["dkd"]], recipe={"epochs": [9]})
    monkeypatch.setattr("smskd_bench.tables.RESERVE_BYTES", 2**60)
    out, _ = shown(request)
    assert "1 do not fit and are run live: needs " in out
