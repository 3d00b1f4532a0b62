"""Rows from a hand-filled store, and the same rows in every format."""

import csv
import io
import json
import platform
import statistics

import numpy as np
import pytest
import torch
from filled import fill
from matrices import PAIR, plan_of
from rich.console import Console
from smskd_bench.cost import epoch_macs, network_cost
from smskd_bench.environment import code_revision, machine, package_versions
from smskd_bench.measurements import measurement_folder, new_folder
from smskd_bench.progress import ProgressDisplay, duration
from smskd_bench.report.rows import best_cell, leaderboard_rows
from smskd_bench.report.tables import FOOTNOTE, FORMATS, human, print_table, render, terminal_table
from smskd_bench.store import RESULT, Store
from smskd_export import load_target
from smskd_export.judging import Judged, JudgedRow, write_judged
from smskd_export.latency import Flag, LatencySummary
from smskd_export.machine import Machine
from smskd_export.paired import PairedChange
from smskd_export.parity import Parity
from smskd_export.report import ExportReport, HostCheck, write_report

from smskd.errors import StoreError

ROWS = [
    {"stages": ["scratch"], "name": "student"},
    {"stages": ["kd"], "name": "kd | 240 epochs, with a long name"},
    {"stages": ["fitnet", "kd"], "name": "smskd", "controls": ["kd | 240 epochs, with a long name", "no reference"], "note": "a, \"b\""},
    {"stages": ["fitnet", "kd"], "name": "no reference", "reference": None},
    [["fitnet", "kd"]],
    {"stages": ["at", "sp", "dkd"], "name": "fitnet_with_hints>logit_standardised_kd>dkd"},
    {"stages": ["rkd"], "name": "never [/trained]"},
]  # fmt: skip
SEEDS = [0, 1, 2]
TOP1 = {
    "student": [70.0, 71.5, 72.25],
    "kd | 240 epochs, with a long name": [75.0, 75.5, 74.0],
    "smskd": [77.0, 76.0, 78.5],
    "no reference": [74.0, 76.5, 76.0],
    "fitnet+kd": [60.0, 61.0],
    "fitnet_with_hints>logit_standardised_kd>dkd": [65.0],
}


@pytest.fixture(scope="module")
def plan():
    return plan_of(rows=ROWS, seeds=SEEDS)


@pytest.fixture
def store(tmp_path, plan):
    """Teacher at 90, rows as in TOP1; smskd kept 80, 90 and 100 percent; failures among the rest."""
    store = Store.open(tmp_path / "runs")
    fill(store, plan, plan.cells[0].teacher, 90.0)
    for cell in plan.cells:
        numbers = TOP1.get(cell.row, [])
        if cell.seed < len(numbers):
            kept = (
                {"same": 50.0, "kept": 80.0 + 10.0 * cell.seed, "gained": 1.0}
                if cell.row == "smskd"
                else None
            )
            fill(store, plan, cell.stages[-1], numbers[cell.seed], kept=kept)
    broken = cell_of(plan, "fitnet_with_hints>logit_standardised_kd>dkd", 1)
    store.begin(plan.nodes[broken.stages[1]])
    store.fail(broken.stages[1], "diverged", "loss term [sp] became NaN\nin epoch 3 | or so", 2)
    return store


def cell_of(plan, row, seed=0):
    return next(c for c in plan.cells if (c.row, c.seed) == (row, seed))


@pytest.fixture
def rows(plan, store):
    return leaderboard_rows(plan, store)


def named(rows, name):
    return next(row for row in rows if row.row == name)


# --------------------------------------------------------------------------------------- the rows


def test_means_and_deviations(rows):
    for name, numbers in TOP1.items():
        row = named(rows, name)
        assert list(row.top1.values()) == numbers
        assert row.mean == pytest.approx(np.mean(numbers))
        if len(numbers) > 1:
            assert (
                row.std
                == pytest.approx(np.std(numbers, ddof=1))
                == pytest.approx(statistics.stdev(numbers))
            )
        else:
            assert row.std is None


def test_the_best_comes_first_and_what_has_no_number_last(rows):
    means = [row.mean for row in rows]
    assert means[:-1] == sorted(means[:-1], reverse=True)
    assert rows[0].row == "smskd"
    assert (rows[-1].row, rows[-1].mean) == ("never [/trained]", None)
    assert len(rows) == len(ROWS)


def test_kinds(rows):
    kinds = {row.row: row.kind for row in rows}
    assert kinds == {
        "student": "student", "kd | 240 epochs, with a long name": "single", "smskd": "smskd", "no reference": "staged",
        "fitnet+kd": "joint", "fitnet_with_hints>logit_standardised_kd>dkd": "smskd", "never [/trained]": "single",
    }  # fmt: skip


def test_the_control_is_the_strongest_and_is_paired_by_seed(rows):
    row = named(rows, "smskd")
    # 74.83 against 75.5: the row without reference is the stronger control.
    assert row.versus.control == "no reference"
    differences = [77.0 - 74.0, 76.0 - 76.5, 78.5 - 76.0]
    assert row.versus.difference == pytest.approx(statistics.fmean(differences))
    assert row.versus.std == pytest.approx(statistics.stdev(differences))
    assert row.versus.std != pytest.approx(row.std)
    assert row.versus.n == 3
    assert all(other.versus is None for other in rows if other.row != "smskd")


def test_a_control_with_fewer_seeds_is_compared_on_those_that_both_have(tmp_path):
    rows = [{"stages": ["kd"], "controls": ["at", "sp"]}, ["at"], ["sp"]]
    plan, store = plan_of(rows=rows, seeds=[0, 1, 2]), Store.open(tmp_path)
    for row, seed, top1 in (("kd", 0, 50.0), ("kd", 1, 60.0), ("at", 1, 58.0), ("at", 2, 90.0)):
        fill(store, plan, cell_of(plan, row, seed).stages[-1], top1)
    versus = named(leaderboard_rows(plan, store), "kd").versus
    assert (versus.control, versus.difference, versus.std, versus.n) == ("at", 2.0, None, 1)


def test_a_control_without_a_common_seed_is_no_comparison(tmp_path):
    rows = [{"stages": ["kd"], "controls": ["at"]}, ["at"]]
    plan, store = plan_of(rows=rows, seeds=[0, 1]), Store.open(tmp_path)
    fill(store, plan, cell_of(plan, "kd", 0).stages[-1], 50.0)
    fill(store, plan, cell_of(plan, "at", 1).stages[-1], 50.0)
    assert named(leaderboard_rows(plan, store), "kd").versus is None


def test_statuses(rows):
    assert named(rows, "smskd").status == "done"
    assert named(rows, "fitnet+kd").status == "partial: 2 of 3 seeds"
    assert named(rows, "never [/trained]").status == "missing"
    failed = named(rows, "fitnet_with_hints>logit_standardised_kd>dkd").status
    assert failed.startswith("s1 diverged: loss term [sp] became NaN")


def test_a_failed_teacher_is_said_in_every_row_that_needs_it(tmp_path):
    plan, store = plan_of(rows=[["kd"], ["at"]]), Store.open(tmp_path)
    teacher = plan.cells[0].teacher
    store.begin(plan.nodes[teacher])
    store.fail(teacher, "out_of_memory", "too large", 0)
    for row in leaderboard_rows(plan, store):
        assert row.status == "s0 out_of_memory: too large"
        assert row.teacher_top1 is None


def test_epochs_cost_teacher_and_what_was_kept(rows):
    row = named(rows, "smskd")
    cost = network_cost("resnet8_quarter", "digits")
    assert (row.epochs, row.parameters, row.macs) == (3, cost.parameters, cost.macs)
    assert row.teacher_top1 == 90.0
    assert row.kept == pytest.approx(90.0)
    assert named(rows, "student").kept is None
    assert row.note == 'a, "b"'
    assert named(rows, "fitnet_with_hints>logit_standardised_kd>dkd").epochs == 4


def test_pairs_stay_in_the_order_of_the_file(tmp_path):
    pairs = [
        {"teacher": "resnet20", "student": "resnet8_half"},
        {"teacher": "resnet14_half", "student": "resnet8_quarter"},
    ]
    plan, store = plan_of(pairs=pairs, rows=[["kd"], ["at"]]), Store.open(tmp_path)
    for cell in plan.cells:
        fill(store, plan, cell.stages[-1], 50.0 + (cell.pair == PAIR) * 20 + (cell.row == "at"))
    found = [(row.pair, row.row) for row in leaderboard_rows(plan, store)]
    assert found == [
        ("resnet20>resnet8_half", "at"),
        ("resnet20>resnet8_half", "kd"),
        (PAIR, "at"),
        (PAIR, "kd"),
    ]


def test_only_what_was_chosen_is_shown(store):
    chosen = plan_of(rows=ROWS, seeds=SEEDS, only="smskd/s1")
    (row,) = leaderboard_rows(chosen, store)
    assert (row.row, row.top1, row.seeds, row.status) == ("smskd", {1: 76.0}, 1, "done")


def test_an_empty_store(tmp_path, plan):
    rows = leaderboard_rows(plan, Store.peek(tmp_path / "none"))
    assert {row.status for row in rows} == {"missing"}
    assert [row.row for row in rows] == [
        r["name"] if isinstance(r, dict) else "fitnet+kd" for r in ROWS
    ]


def test_a_damaged_result_is_one_message(plan, store):
    (store.folder(cell_of(plan, "smskd").stages[-1]) / RESULT).write_text('{"test": {')
    with pytest.raises(StoreError, match="is damaged"):
        leaderboard_rows(plan, store)


def test_the_exported_cell_is_the_lowest_seed_that_is_done(plan, store):
    assert best_cell(plan, store, PAIR, "smskd").seed == 0
    store.folder(cell_of(plan, "smskd", 0).stages[-1]).joinpath(RESULT).unlink()
    assert best_cell(plan, store, PAIR, "smskd").seed == 1
    assert best_cell(plan, store, PAIR, "never [/trained]") is None


# -------------------------------------------------------------------------------- exported numbers


def export(store, key, target="cpu", p50_ns=1_500_000, quick=False, measured=True):
    """An export with nothing but its report and, if it was measured, the verdict."""
    change = PairedChange(797, 4, 0, 0.5, 0.1, 1.0, 0.125)
    parity = Parity(797, 76.0, 76.5, change, 100.0, 1e-6, 1e-7, 1.0, True, "equal")
    profile = load_target("cpu")
    report = ExportReport(
        schema=2, name="x", created_utc="2025-01-01T00:00:00Z", seconds=1.0, bundle_id="0" * 64, target=profile, image_shape=(1, 8, 8),
        num_classes=10, parameters=10, macs=20, torch_top1=76.0,
        checks=(HostCheck("fp32", 123_456, parity, None),), left_out={},
        machine=Machine("cpu", "x86_64", 2, 2, "Linux", "3.11", None), versions={}, provenance={},
    )  # fmt: skip
    where = store.export_folder(key, target)
    where.mkdir(parents=True, exist_ok=True)
    write_report(where, report)
    if measured:
        folder = new_folder(measurement_folder(store.root, key, target), None)
        folder.mkdir(parents=True)
        write_judged(folder, verdict(key, target, p50_ns, quick, change))


def verdict(key, target, p50_ns, quick, change):
    bounds = (p50_ns, p50_ns * 2, p50_ns * 3)
    host = LatencySummary(
        100, p50_ns - 1, p50_ns, p50_ns, p50_ns, *bounds, p50_ns * 4, 1.0, 0.01, (1.0,), ()
    )
    row = JudgedRow(
        "fp32", 1, "single_stream", False, "ok", "", 76.5, change, host, None, 600.0, None, None, 0.123456, 0.0,
        (Flag("noisy", "it was noisy", "measure again"),),
    )  # fmt: skip
    return Judged(
        schema=1, name="x", key=key, bundle_id="0" * 64, target=target, runtime="onnxruntime 1", threads=1,
        protocol="quick" if quick else "cpu-v1", device="local", board="cpu", measured_utc=f"2025-01-01T00:00:0{p50_ns % 7}Z",
        torch_top1=76.0, parameters=10, macs=20, rankable=not quick, rows=(row,),
    )  # fmt: skip


def test_exported_numbers_join_their_row(plan, store):
    export(store, cell_of(plan, "smskd").stages[-1])
    rows = leaderboard_rows(plan, store)
    (numbers,) = named(rows, "smskd").exported
    assert (numbers.target, numbers.top1, numbers.size_mb) == ("cpu", 76.5, 0.123456)
    assert (numbers.p50_ms, numbers.p90_ms, numbers.p99_ms) == (1.5, 3.0, 4.5)
    assert numbers.flags == ("it was noisy; measure again",)
    assert all(not row.exported for row in rows if row.row != "smskd")
    assert "1.500 / 3.000 / 4.500" in render(rows, "markdown")
    line = next(r for r in csv.DictReader(io.StringIO(render(rows, "csv"))) if r["row"] == "smskd")
    assert (line["target"], line["p50_ms"], line["exported_top1"]) == ("cpu", "1.5", "76.5")


def test_an_export_that_was_not_timed_has_a_size_and_no_time(plan, store):
    export(store, cell_of(plan, "smskd").stages[-1], measured=False)
    row = named(leaderboard_rows(plan, store), "smskd")
    assert row.exported[0].p50_ms is None
    assert row.exported[0].size_mb == 0.123456
    for form in ("markdown", "csv", "json"):
        assert "None /" not in render([row], form)


def test_quick_exports_are_never_shown(plan, store):
    export(store, cell_of(plan, "smskd").stages[-1], quick=True)
    rows = leaderboard_rows(plan, store)
    assert [e.status for row in rows for e in row.exported] == ["not measured"]
    export(store, cell_of(plan, "smskd").stages[-1], p50_ns=2_000_000)
    (numbers,) = named(leaderboard_rows(plan, store), "smskd").exported
    assert numbers.p50_ms == 2.0


# ------------------------------------------------------------------------------------ the formats


def markdown_tables(text):
    """Each table as a list of rows of cells; checks that all have the same width."""
    tables, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            assert line.endswith("|")
            inner = line[1:-1].replace("\\|", "\0").split("|")
            current.append([cell.strip().replace("\0", "|") for cell in inner])
        elif current:
            tables.append(current)
            current = []
    for table in tables:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(set(cell) <= set("-:") for cell in table[1])
    return tables


def test_markdown_is_a_table(rows):
    text = render(rows, "markdown")
    (table,) = markdown_tables(text)
    head, _, *body = table
    assert head[:4] == ["#", "row", "kind", "top-1 %"]
    assert [line[1] for line in body] == [row.row for row in rows]
    assert [line[0] for line in body] == [str(i) for i in range(1, len(rows) + 1)]
    best = dict(zip(head, body[0], strict=True))
    assert best["top-1 %"] == "77.17 \u00b1 1.26"
    assert best["to beat"] == "no reference"
    assert best["difference"] == "+1.67 \u00b1 1.89"
    assert best["kept %"] == "90.0"
    assert "(teacher 90.00 %)" in text
    assert text.rstrip().endswith(FOOTNOTE)


def test_one_markdown_table_a_pair(tmp_path):
    pairs = [
        {"teacher": "resnet20", "student": "resnet8_half"},
        {"teacher": "resnet14_half", "student": "resnet8_quarter"},
    ]
    rows = leaderboard_rows(plan_of(pairs=pairs, rows=[["kd"]]), Store.peek(tmp_path))
    text = render(rows, "markdown")
    assert len(markdown_tables(text)) == 2
    assert text.count("teacher not trained yet") == 2


def test_csv_reads_back(rows):
    found = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [line["row"] for line in found] == [row.row for row in rows]
    for line, row in zip(found, rows, strict=True):
        assert None not in line
        assert None not in line.values()
        assert float(line["mean"] or "nan") == pytest.approx(
            row.mean if row.mean is not None else float("nan"), nan_ok=True
        )
        assert line["status"] == row.status
        assert line["note"] == row.note
        assert int(line["n"]) == len(row.top1)
        assert line["control"] == (row.versus.control if row.versus else "")


def test_json_reads_back(plan, store, rows):
    export(store, cell_of(plan, "smskd").stages[-1])
    found = json.loads(render(leaderboard_rows(plan, store), "json"))
    assert [line["row"] for line in found] == [row.row for row in rows]
    assert found[0]["top1"] == {"0": 77.0, "1": 76.0, "2": 78.5}
    assert found[0]["versus"]["control"] == "no reference"
    assert found[0]["exported"][0]["p50_ms"] == 1.5
    assert found[-1]["mean"] is None


def shown(rows, width):
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    print_table(rows, console)
    return console.file.getvalue()


def column(text, index):
    """The text of one column of the terminal table, its broken lines joined."""
    cells = [line.split("\u2502") for line in text.splitlines() if line.startswith("\u2502")]
    return "".join(parts[index].strip() for parts in cells)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminal_table_is_never_too_wide_and_no_name_is_cut(plan, store, width):
    export(store, cell_of(plan, "smskd").stages[-1])
    rows = leaderboard_rows(plan, store)
    text = shown(rows, width)
    assert max(map(len, text.splitlines())) <= width
    names = column(text, 2).replace(" ", "")
    for row in rows:
        assert row.row.replace(" ", "") in names, text
    assert "\u2026" not in column(text, 2)
    for row in rows:
        if row.mean is not None:
            assert f" {row.mean:.2f} " in text
    assert "no reference" in text
    assert "+1.67 \u00b1 1.89" in text
    assert "never [/trained]" in text
    assert "s1 diverged: loss term [sp] became NaN in epoch" in " ".join(text.split())


def test_a_narrow_terminal_says_what_it_leaves_out(rows):
    assert "left out here: kind, 95 %, epochs," in shown(rows, 80)
    assert "left out" not in shown(rows, 240)


def test_a_wide_terminal_shows_every_name_on_one_line(rows):
    lines = shown(rows, 240).splitlines()
    for row in rows:
        assert any(row.row in line for line in lines)


def test_what_is_no_terminal_gets_whole_lines(rows):
    console = Console(file=io.StringIO(), width=40)
    print_table(rows, console)
    text = console.file.getvalue()
    assert "\x1b" not in text
    for row in rows:
        assert any(row.row in line for line in text.splitlines())


def test_columns_that_say_nothing_are_left_out(tmp_path):
    plan, store = plan_of(rows=[["kd"]]), Store.open(tmp_path)
    fill(store, plan, plan.cells[0].stages[-1], 50.0)
    head = markdown_tables(render(leaderboard_rows(plan, store), "markdown"))[0][0]
    assert head == ["#", "row", "kind", "top-1 %", "n", "epochs", "params", "MACs"]


def test_no_rows_at_all():
    assert render([], "csv").count("\n") == 1
    assert json.loads(render([], "json")) == []
    assert markdown_tables(render([], "markdown")) == []
    terminal_table([], 80)


def test_formats_are_those_of_the_command_line():
    assert FORMATS == ("table", "markdown", "csv", "json", "latex")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (83892, "83.9k"), (1.5e6, "1.5M"), (2e9, "2G"), (3.21e12, "3.21T"), (4e15, "4P"),
     (999_999, "1M"), (999_999_999, "1G"), (5e21, "5e+03E")],
)  # fmt: skip
def test_counts_with_units(number, text):
    assert human(number) == text


# --------------------------------------------------------------------------------- while it runs


def watched(plan, terminal):
    """What a display shows of one teacher, two epochs of a student, and a failure."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal, color_system=None)
    cell = cell_of(plan, "never [/trained]")
    teacher, student = plan.nodes[cell.teacher], plan.nodes[cell.stages[0]]
    result = {"test": {"top1": 90.0}, "train_seconds": 1.5, "images_per_s": 12345.6}
    with ProgressDisplay(console, plan, list(plan.nodes)) as display:
        display.begin(teacher)
        display.end(teacher, "done", result, "")
        display.waiting(student)
        display.begin(student)
        for epoch in (1, 2):
            display.epoch(student, {"epoch": epoch, "images_per_s": 4321.0})
        display.live.refresh()
        display.end(student, "failed", None, "shape [64, 3] is [/bad]")
    return out.getvalue()


def test_the_display_of_a_log_has_a_line_for_each_stage_run(plan):
    lines = watched(plan, terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"[1/{len(plan.nodes)}] resnet14_half scratch s0 stage 1")
    assert "90.00 %" in lines[0]
    assert "12,346 images/s" in lines[0]
    assert "another process is training this" in lines[1]
    assert lines[2].endswith("resnet8_quarter rkd s0 stage 1: failed: shape [64, 3] is [/bad]")


def test_the_display_of_a_terminal_shows_cell_epoch_and_speed(plan):
    text = watched(plan, terminal=True)
    assert "never [/trained]/s0" in text
    assert "epoch 2/2  4,321 images/s" in text
    assert " left" in text


def test_the_display_of_several_at_once_has_a_bar_for_each(plan):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    one, other = list(plan.nodes.values())[:2]
    with ProgressDisplay(console, plan, list(plan.nodes)) as display:
        display.begin(one)
        display.begin(other)
        display.epoch(other, {"epoch": 1, "images_per_s": 10.0})
        display.epoch(one, {"epoch": 1, "images_per_s": 20.0})
        display.epoch(other, {"epoch": 2, "images_per_s": 30.0})
        shown = [task.description for task in display.live.tasks]
        assert [one.label in shown[1], other.label in shown[2], len(shown)] == [True, True, 3]
        each = {s.key: epoch_macs(s, plan) for s in (one, other)}
        assert (
            display.live.tasks[0].completed == display.spent == each[one.key] + 2 * each[other.key]
        )
        display.put_back(other, "no room")
        assert display.live.tasks[0].completed == each[one.key]
        display.end(one, "failed", None, "why")
        assert [task.description for task in display.live.tasks] == ["matrix"]
    assert f"{other.label}: no room" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (42.4, "0:42"), (59.6, "1:00"), (723, "12:03"), (10859, "3:00:59"), (-1, "0:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_environment_of_a_number():
    code, here, packages = code_revision(), machine(), package_versions()
    assert set(code) == {"revision", "dirty"}
    assert here["cores"] >= 1
    assert here["memory_gib"] > 0
    assert platform.node() not in json.dumps(here)
    assert packages["torch"] == torch.__version__
