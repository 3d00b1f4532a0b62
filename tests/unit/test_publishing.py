"""What a board sends to W&B: names, summaries, curves, lineage, the report. No process, no wandb run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from filled import fill, filled
from matrices import plan_of, write_matrix
from smskd_bench.cli import main
from smskd_bench.publishing.curves import MOST_POINTS, curve_table
from smskd_bench.publishing.documents import RunDocument, canonical, measured
from smskd_bench.publishing.ledger import OfflineLedger
from smskd_bench.publishing.names import check_project, field_name, shortened, stable_id
from smskd_bench.publishing.publication import TABLE, TABLE_COLUMNS, make_publication
from smskd_bench.publishing.summary_fields import Trained, row_summary
from smskd_bench.report.exported import ExportedNumbers
from smskd_bench.report.leaderboard import read_leaderboard
from smskd_bench.store import Store

from smskd.errors import ConfigError

ROWS = [
    {"stages": ["scratch"], "name": "student"},
    {"stages": ["fitnet", "kd"], "controls": ["student"]},
]
TOP1 = {"student": [70.0, 70.4, 70.2], "fitnet>kd": [77.0, 77.3, 77.1]}
EVIL = [
    "a" * 300, "<script>alert(1)</script>", "two\nlines\tand a tab", "\U0001f600 smile", "a/b\\c%d#e?f",
    "[red]markup[/red]", "x\" or Config('y') = 'z", "\u202eright to left", "\u0000\u001b[31m", " ",
]  # fmt: skip
EVIL_IDS = [f"evil{i}" for i in range(len(EVIL))]
POSSIBLE = [name for name in EVIL if name.isprintable() and name.strip()]
"""Of these, what a matrix lets through."""


@pytest.fixture(scope="module")
def plan():
    return plan_of(rows=ROWS, seeds=[0, 1, 2])


@pytest.fixture
def store(tmp_path, plan):
    return filled(tmp_path / "runs", plan, TOP1)


def publication_of(plan, store, **more):
    return make_publication(plan, store, read_leaderboard(plan, store), None, **more)


def row_of(publication, name):
    return next(run for run in publication.rows if run.config["row"] == name)


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", EVIL, ids=EVIL_IDS)
def test_any_name_becomes_one_that_wandb_takes(name):
    for most in (64, 128):
        short = shortened(name, most)
        assert 0 < len(short) <= most
        assert short.isprintable()
        assert short == shortened(name, most)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,60}", field_name(name))
    assert re.fullmatch(r"row-[0-9a-f]{24}", stable_id("row", name))


def test_names_that_are_cut_alike_stay_apart():
    one, other = "a" * 200 + "x", "a" * 200 + "y"
    assert shortened(one) != shortened(other)
    assert field_name("a.b") != field_name("a/b")
    assert stable_id("row", "ab", "c") != stable_id("row", "a", "bc")


@pytest.mark.parametrize("name", ["", "a/b", "a#b", "x" * 129, "a\nb"], ids=list("abcde"))
def test_projects_that_wandb_refuses_are_refused_before_anything_is_sent(name):
    with pytest.raises(ConfigError, match="no name of a W&B project"):
        check_project(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--publish", "wandb", "--only", "kd", "--format", "csv"], "leave out: --only, --format"),
        (["--publish", "wandb", "--against", "student"], "leave out: --against"),
        (["--offline"], "only with --publish wandb: --offline"),
        (["--project", "x", "--weights"], "only with --publish wandb: --project, --weights"),
        (
            ["--publish", "wandb", "--project", "a/b"],
            "'a/b' is no name of a W&B project: it holds /",
        ),
    ],
    ids=["some rows", "against", "offline", "weights", "project"],
)
def test_options_that_cannot_go_together(tmp_path, words, said):
    matrix = write_matrix(tmp_path, rows=ROWS)
    done = CliRunner().invoke(
        main, ["leaderboard", "--matrix", str(matrix), "--store", str(tmp_path), *words]
    )
    assert done.exit_code == 2
    assert said in done.output


# ---------------------------------------------------------------------------------------- summary


def test_a_row_is_made_for_ranking(plan, store):
    publication = publication_of(plan, store)
    summary = row_of(publication, "fitnet>kd").summary
    assert summary["rank"] == 1
    assert summary["accuracy/mean"] == pytest.approx(77.1333333)
    assert summary["accuracy/low"] < summary["accuracy/mean"] < summary["accuracy/high"]
    assert (summary["accuracy/n"], summary["accuracy/seeds"]) == (3, 3)
    assert (summary["control"], summary["verdict"], summary["verdict/sign"]) == (
        "student",
        "better",
        "+",
    )
    assert summary["difference/low"] < summary["difference/mean"] < summary["difference/high"]
    assert summary["store/top1"] == TOP1["fitnet>kd"]
    assert summary["store/keys"] == [c.stages[-1] for c in plan.cells if c.row == "fitnet>kd"]
    assert all(isinstance(v, str | int | float | bool | list) for v in summary.values())


def test_what_was_not_measured_is_absent(plan, store):
    publication = publication_of(plan, store)
    summary = row_of(publication, "student").summary
    absent = (
        "control",
        "accuracy/kept",
        "accuracy/teacher",
        "cost/train_seconds",
        "note",
        "missing",
    )
    assert not set(absent) & summary.keys()
    assert not [name for name in summary if name.startswith(("latency/", "device/"))]
    assert publication.table.images == {}
    assert publication.table.tables.keys() == {TABLE}  # no histories, no curves


def test_rows_without_results_have_no_rank_and_no_accuracy(tmp_path, plan):
    store = filled(tmp_path / "runs", plan, {"student": [70.0]})
    publication = publication_of(plan, store)
    empty = row_of(publication, "fitnet>kd").summary
    assert not {"rank", "accuracy/mean", "accuracy/low", "verdict"} & empty.keys()
    assert empty["status"] == "missing"
    assert "not run" in empty["missing"]
    single = row_of(publication, "student").summary
    assert single["accuracy/mean"] == 70.0
    assert not {"accuracy/std", "accuracy/low"} & single.keys()
    assert (single["status"], single["rank"]) == ("partial: 1 of 3 seeds", 1)
    (full, bare) = publication.table.tables[TABLE].rows
    assert full[TABLE_COLUMNS.index("accuracy")] == 70.0
    assert bare[TABLE_COLUMNS.index("accuracy")] is None


def test_nan_is_never_sent():
    assert measured({"a": math.nan, "b": math.inf, "c": 0.0, "d": None, "e": "x"}) == {
        "c": 0.0,
        "e": "x",
    }
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": math.nan})


def exported(target, p50, **more):
    return ExportedNumbers(
        target=target, device="board", runtime="r", threads=1, protocol="p", precision="fp32", batch=1,
        cuda_graph=False, status="ok", top1=70.0, change=None, change_low=None, change_high=None, p50_ms=p50,
        p90_ms=None, p99_ms=None, samples_per_s=None, gross_mj=None, size_mb=0.5, measured_utc="2026", **more,
    )  # fmt: skip


def test_latency_is_by_target_and_only_where_it_was_measured(plan, store):
    board = read_leaderboard(plan, store)
    row = replace(board.rows[0], exported=[exported("cpu", 0.5), exported("a/b.c", None)])
    summary = row_summary(row, 1, board.basis, [])
    odd = field_name("a/b.c")
    assert summary["latency/cpu/p50_ms"] == 0.5
    assert not {"latency/cpu/p90_ms", f"latency/{odd}/p50_ms"} & summary.keys()
    assert summary[f"device/{odd}/size_mb"] == 0.5


def test_training_time_is_said_of_whole_rows_only(plan, store):
    board, cell = read_leaderboard(plan, store), plan.cells[0]
    summary = row_summary(
        board.rows[0], 1, board.basis, [Trained(cell, 70.0, 10.0), Trained(cell, 71.0, 20.0)]
    )
    assert (summary["cost/train_seconds"], summary["cost/seeds_folded"]) == (15.0, False)
    summary = row_summary(
        board.rows[0], 1, board.basis, [Trained(cell, 70.0, 10.0), Trained(cell, 71.0, None)]
    )
    assert "cost/train_seconds" not in summary


def test_the_page_explains_every_field(plan, store):
    page = (Path(__file__).parents[2] / "docs" / "wandb.md").read_text()
    board = read_leaderboard(plan, store)
    cells = [Trained(plan.cells[0], 70.0, 1.0)]
    every = replace(
        next(row for row in board.rows if row.versus), exported=[replace(exported("cpu", 1.0), p90_ms=1.0, p99_ms=1.0, gross_mj=1.0)],
        note="n", kept=99.0, teacher_top1=80.0, missing=(board.rows[0].missing or ()),
    )  # fmt: skip
    every = replace(every, versus=replace(every.versus, why="because"))
    found = row_summary(every, 1, board.basis, cells)
    names = {name.replace("/cpu/", "/TARGET/") for name in found} | {"missing", "digest"}
    explained = set(re.findall(r"`([a-z][A-Za-z0-9_/]*)`", page))
    assert names - explained == set()


# ---------------------------------------------------------------------------------- the same again


def test_the_same_store_elsewhere_is_the_same_publication(tmp_path, plan, store):
    first = [run.digest for run in publication_of(plan, store).runs]
    moved = store.root.rename(tmp_path / "moved")
    assert [run.digest for run in publication_of(plan, Store(moved)).runs] == first
    assert len({run.id for run in publication_of(plan, Store(moved)).runs}) == len(first)


def test_one_more_seed_changes_its_row_its_comparisons_and_the_table(tmp_path, plan):
    store = filled(
        tmp_path / "runs", plan, {"student": [70.0, 70.4], "fitnet>kd": [77.0, 77.3, 77.1]}
    )
    before = {run.id: run.digest for run in publication_of(plan, store).runs}
    cell = next(c for c in plan.cells if c.row == "student" and c.seed == 2)
    fill(store, plan, cell.stages[-1], 70.2)
    publication = publication_of(plan, store)
    after = {run.id: run.digest for run in publication.runs}
    assert before.keys() < after.keys()
    changed = {run for run in before if before[run] != after[run]}
    assert changed == {*(run.id for run in publication.rows), publication.table.id}


def test_lineage_goes_from_the_teacher_to_the_row(tmp_path, plan):
    store = filled(tmp_path / "runs", plan, TOP1)
    cell = next(c for c in plan.cells if c.row == "fitnet>kd" and c.seed == 0)
    for key in (*cell.teachers, *cell.stages[:-1]):
        fill(store, plan, key, 60.0)
    publication = publication_of(plan, store)
    made = {artifact.name: run for run in publication.nodes for artifact in run.logs}
    last = made[f"stage-{cell.stages[-1]}"]
    used = {artifact.name for artifact in last.uses}
    assert used == {f"stage-{cell.teacher}", f"stage-{cell.stages[0]}"}
    assert made[f"stage-{cell.teacher}"].uses == ()
    assert f"stage-{cell.stages[-1]}" in {a.name for a in row_of(publication, "fitnet>kd").uses}
    digest = last.logs[0].metadata["sha256"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    weights = publication_of(plan, store, weights=True)
    kinds = [artifact.kind for run in weights.nodes for artifact in run.logs]
    assert sorted(set(kinds)) == ["model", "stage"]


def test_a_damaged_ledger_costs_nothing_but_time(tmp_path):
    for text in ("", "{", "[]", '{"/p": 3}', '{"/p": {"a": "b"}}'):
        (tmp_path / "offline.json").write_text(text)
        assert OfflineLedger(tmp_path, "/p").known() == {}


# ----------------------------------------------------------------------------------------- curves


def epochs(*losses, **more):
    return [{"epoch": i + 1, "loss": loss, **more} for i, loss in enumerate(losses)]


def test_curves_are_means_over_seeds_through_all_stages():
    histories = [[epochs(4.0, 3.0), epochs(2.0)], [epochs(6.0, 5.0), epochs(4.0)]]
    table = curve_table({("pair", "row"): histories, ("pair", "empty"): []})
    assert [row[:5] for row in table.rows] == [
        ("row", "pair", 1, 1, 2),
        ("row", "pair", 2, 1, 2),
        ("row", "pair", 3, 2, 2),
    ]
    assert [row[5] for row in table.rows] == [5.0, 4.0, 3.0]
    assert {row[6] for row in table.rows} == {None}  # nothing recorded, nothing shown


def test_a_seed_without_a_number_leaves_a_gap():
    table = curve_table({("p", "r"): [[epochs(4.0, math.nan)], [epochs(6.0, 5.0)]]})
    assert [row[5] for row in table.rows] == [5.0, None]


def test_many_long_curves_fit_into_one_chart():
    rows = {("p", f"r{i}"): [[epochs(*[1.0] * 240)]] for i in range(100)}
    table = curve_table(rows)
    assert len(table.rows) <= MOST_POINTS
    last = {row[0]: row[2] for row in table.rows}
    assert set(last.values()) == {240}
    assert curve_table({("p", "r"): []}) is None


# ----------------------------------------------------------------------------------------- report


@pytest.fixture
def offline_reports(monkeypatch):
    """The official package with its questions to a server answered; everything else is real."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(
        interface, "execute_graphql", lambda *a, **k: {"project": {"internalId": "x"}}
    )


def spec_of(text):
    from smskd_bench.publishing.wandb_report import build

    model = build(text, "me", "proof")._to_model()
    return model, json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def test_the_report_is_a_valid_model_with_its_table_curves_and_pareto_picture(
    offline_reports, plan, store
):
    text = {
        **publication_of(plan, store).report.message(),
        "curves": True,
        "picture": True,
        "targets": ["cpu"],
    }
    model, spec = spec_of(text)
    assert model.display_name == "Leaderboard of some"
    kinds = [block["type"] for block in spec["blocks"]]
    assert kinds.count("panel-grid") == 4
    (table,) = [
        b["content"]
        for b in spec["blocks"]
        if b["type"] == "markdown-block" and "| # |" in b["content"]
    ]
    assert "fitnet>kd" in table
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    (filters,) = grids[0]["runSets"][0]["filters"]["filters"]
    assert filters["key"] == {"section": "config", "name": "board"}
    assert filters["value"] == text["board"]
    (order,) = grids[0]["runSets"][0]["sort"]["keys"]
    assert (order["key"], order["ascending"]) == (
        {"section": "summary", "name": "accuracy/mean"},
        False,
    )
    scatter = json.dumps(grids[2])
    assert "latency/cpu/p50_ms" in scatter
    assert json.dumps(grids[1]).count("wandb/line/v0") == 2


@pytest.mark.parametrize("name", POSSIBLE, ids=EVIL_IDS[: len(POSSIBLE)])
def test_names_are_no_markup_and_no_filter_in_a_report(offline_reports, tmp_path, name):
    plan = plan_of(name="x", rows=[{"stages": ["scratch"], "name": f"n{name}"}])
    store = filled(tmp_path / "runs", plan, {f"n{name}": [70.0]})
    publication = publication_of(plan, store)
    (run,) = publication.rows
    assert len(run.name) <= 128
    assert all(0 < len(tag) <= 64 for tag in run.tags)
    text = {**publication.report.message(), "title": shortened(f"Leaderboard of {name}")}
    model, spec = spec_of(text)
    assert len(model.display_name) <= 128
    assert "<script>" not in json.dumps([b.get("content", "") for b in spec["blocks"]])


def test_without_measurements_the_report_has_no_such_pictures(offline_reports, plan, store):
    _, spec = spec_of(publication_of(plan, store).report.message())
    kinds = [block["type"] for block in spec["blocks"]]
    assert kinds.count("panel-grid") == 1


def test_a_digest_names_everything_but_places():
    run = RunDocument("i", "n", "stage", "g", (), {"a": 1}, {"b": 2.0})
    assert run.digest == replace(run).digest
    assert run.digest != replace(run, summary={"b": 3.0}).digest
    assert run.digest != replace(run, tags=("x",)).digest
