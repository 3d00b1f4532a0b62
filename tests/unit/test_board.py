"""The leaderboard as a whole: verdicts, filters, order, reasons for what is missing, odd names, files."""

import csv
import io
import json
import math
import os

import pytest
from filled import fill, filled
from matrices import PAIR, content, load_text, plan_of, write_matrix
from rich.console import Console
from smskd_bench.plan import make_plan
from smskd_bench.report import escaping, reading
from smskd_bench.report.basis import basis_of
from smskd_bench.report.board import BoardRequest, show
from smskd_bench.report.evaluation_count import evaluations_of
from smskd_bench.report.held import read_held
from smskd_bench.report.leaderboard import read_leaderboard
from smskd_bench.report.reading import read_shown
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.report.seed_plan import ALL, SeedsRequest, seed_needs
from smskd_bench.report.seed_plan import show as show_seeds
from smskd_bench.report.tables import View, print_table, render
from smskd_bench.report.view import SORTS, indented, ordered, ranks, select
from smskd_bench.report.watching import is_settled, watch
from smskd_bench.store import RESULT, Store
from yaml import safe_dump

from smskd.errors import ConfigError, SmskdError, StoreError, UsageError

ROWS = [
    {"stages": ["scratch"], "name": "student"},
    {"stages": ["fitnet", "kd"], "controls": ["fitnet>kd no-ref", "kd>kd no-ref"]},
    {"stages": ["fitnet", "kd"], "name": "fitnet>kd no-ref", "reference": None, "controls": ["kd>kd no-ref"]},
    {"stages": ["kd", "kd"], "name": "kd>kd no-ref", "reference": None},
    {"stages": ["dkd"], "controls": ["student"]},
]  # fmt: skip
SEEDS = [0, 1, 2, 3]
TOP1 = {
    "student": [70.0, 70.4, 70.2, 70.1],
    "fitnet>kd": [77.0, 77.3, 77.1, 77.2],
    "fitnet>kd no-ref": [77.01, 77.29, 77.12, 77.2],
    "kd>kd no-ref": [72.0, 72.2, 72.2, 72.1],
    "dkd": [70.9, 69.0, 71.5, 70.0],
}


@pytest.fixture(scope="module")
def plan():
    return plan_of(rows=ROWS, seeds=SEEDS)


@pytest.fixture
def store(tmp_path, plan):
    return filled(tmp_path / "runs", plan, TOP1)


@pytest.fixture
def board(plan, store):
    return read_leaderboard(plan, store)


def named(rows, name):
    return next(row for row in rows if row.row == name)


def terminal(width=200):
    return Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)


# --------------------------------------------------------------------------------------- verdicts


def test_every_control_is_compared_and_judged_in_one_family(board):
    row = named(board.rows, "fitnet>kd")
    found = {versus.control: versus for versus in row.comparisons}
    assert found.keys() == {"fitnet>kd no-ref", "kd>kd no-ref"}
    assert {versus.family for versus in found.values()} == {4}
    assert found["fitnet>kd no-ref"].verdict == "equal"
    assert found["kd>kd no-ref"].verdict == "better"
    assert row.versus == found["fitnet>kd no-ref"]  # the stronger one
    dkd = named(board.rows, "dkd").versus
    assert (dkd.verdict, dkd.why) == ("open", "neither a difference nor equality is shown")
    assert dkd.low < dkd.difference < dkd.high
    assert dkd.bootstrap_low < dkd.difference < dkd.bootstrap_high
    assert dkd.p_holm >= dkd.p


def test_verdicts_are_words_and_signs_in_every_format(board):
    out = terminal()
    print_table(board.rows, out)
    text = out.file.getvalue()
    assert all(word in text for word in ("= equal", "+ better", "? too few seeds"))
    narrow = terminal(80)
    print_table(board.rows, narrow)
    assert "+ better, - worse, = practically equal" in narrow.file.getvalue()
    assert "= practically equal" in render(board.rows, "markdown")
    assert "= practically equal" in render(board.rows, "latex")
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(render(board.rows, "csv")))}
    assert lines["fitnet>kd"]["verdict"] == "equal"
    assert float(lines["fitnet>kd"]["difference_low"]) < 0 < float(lines["fitnet>kd"]["margin"])
    (first, *_) = json.loads(render(board.rows, "json"))
    assert first["comparisons"][0]["verdict"] in ("better", "equal")
    assert first["interval"]["low"] < first["mean"] < first["interval"]["high"]


def test_one_row_against_all_others(plan, store, board):
    against = read_leaderboard(plan, store, against="student")
    assert {row.row: row.versus and row.versus.control for row in against.rows} == {
        "student": None, "fitnet>kd": "student", "fitnet>kd no-ref": "student", "kd>kd no-ref": "student",
        "dkd": "student",
    }  # fmt: skip
    assert named(against.rows, "kd>kd no-ref").versus.verdict == "better"
    cell = read_leaderboard(plan, store, against=f"{PAIR}/student/s1")
    versus = named(cell.rows, "dkd").versus
    assert (versus.n, versus.difference) == (1, pytest.approx(-1.4))
    assert versus.why == "1 of at least 3 seeds"
    place = read_leaderboard(plan, store, against=f"{PAIR}/student")
    assert place.rows == against.rows
    with pytest.raises(UsageError, match="did you mean 'student'"):
        read_leaderboard(plan, store, against="studnt")


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, 100.0])
def test_what_is_no_margin(plan, store, margin):
    with pytest.raises(UsageError, match="margin"):
        read_leaderboard(plan, store, margin)


# ------------------------------------------------------------------------------ filters and order


def test_filters_hide_rows_and_change_no_verdict(board):
    shown = select(board.rows, None, "fitnet")
    assert [row.row for row in shown] == ["fitnet>kd no-ref", "fitnet>kd"]
    assert all(row in board.rows for row in shown)
    text = render(shown, "markdown", View(everything=board.rows))
    assert "corrected for the 4 comparisons" in text
    (line,) = select(board.rows, PAIR, "dkd")
    assert ranks(board.rows)[PAIR, line.row] == 4
    assert "| 4 | dkd |" in render([line], "markdown", View(everything=board.rows))
    with pytest.raises(UsageError, match="did you mean 'fitnet'"):
        select(board.rows, None, "fitnett")
    with pytest.raises(UsageError, match="no row has the pair 'vgg'"):
        select(board.rows, "vgg", None)


@pytest.mark.parametrize("sort", SORTS)
def test_orders(board, sort):
    placed = ordered(board.rows, board.rows, sort)
    assert {p.row.row for p in placed} == set(TOP1)
    assert {p.rank for p in placed} == {1, 2, 3, 4, 5}
    names = [p.row.row for p in placed]
    if sort == "name":
        assert names == sorted(names)
    if sort == "difference":
        assert names[0] == "fitnet>kd no-ref"
        assert names[-2:] == ["kd>kd no-ref", "student"]


def test_controls_stand_under_what_they_control(board):
    found = [(p.row.row, p.depth) for p in indented(ordered(board.rows, board.rows))]
    assert found == [
        ("fitnet>kd", 0), ("fitnet>kd no-ref", 1), ("kd>kd no-ref", 2), ("dkd", 0), ("student", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "wanted"),
    [(60, " v "), (80, "to beat"), (100, "its 95 %"), (140, "= equal"), (200, "params")],
)
def test_the_table_fits_and_the_verdict_is_always_there(board, width, wanted):
    console = terminal(width)
    print_table(list(board.rows), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any(wanted in line for line in lines)
    assert any("=" in line for line in lines if "fitnet>kd" in line)
    notes = " ".join(lines)
    assert ("Every precision and device" in notes) == ("ms p50" in lines[2])


def test_a_folded_control_stays_under_itself(board):
    console = terminal(80)
    print_table(list(board.rows), console)
    lines = console.file.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("│ 1*"))
    assert lines[first + 1].split("│")[2].rstrip() == "   no-ref"


def test_controls_in_a_circle_or_of_everything_are_shown_once(tmp_path):
    circle = [{"stages": ["kd"], "controls": ["at"]}, {"stages": ["at"], "controls": ["kd"]}]
    of_all = [["scratch"], *({"stages": [m], "controls": ["scratch"]} for m in ("kd", "at", "sp"))]
    for rows, count in ((circle, 2), (of_all, 4)):
        found = leaderboard_rows(plan_of(rows=rows), Store.peek(tmp_path / "none"))
        placed = indented(ordered(found, found))
        assert sorted(p.row.row for p in placed) == sorted(row.row for row in found)
        assert len(placed) == count
    assert {p.depth for p in placed} == {0}  # a control of everything keeps its rank


# -------------------------------------------------------------------------------- what is missing


def reasons(plan, store):
    return {m.row: (m.seeds, m.reason, m.detail) for m in read_leaderboard(plan, store).missing}


def test_nothing_is_missing(board):
    assert board.missing == ()


def test_reasons_are_data(tmp_path):
    plan = plan_of(
        rows=[["kd"], ["at"], ["sp"], {"stages": ["rkd"], "only": ["resnet20>resnet8_half"]}],
        seeds=[0, 1],
        pairs=[
            {"teacher": "resnet14_half", "student": "resnet8_quarter"},
            {"teacher": "resnet20", "student": "resnet8_half"},
        ],
    )
    store = Store.open(tmp_path)
    cells = {(c.pair, c.row, c.seed): c.stages[-1] for c in plan.cells}
    fill(store, plan, cells[PAIR, "kd", 0], 50.0)
    store.begin(plan.nodes[cells[PAIR, "at", 0]])
    store.fail(cells[PAIR, "at", 0], "diverged", "loss is [nan]", 1)
    store.begin(plan.nodes[cells[PAIR, "sp", 1]])
    store.save_checkpoint(cells[PAIR, "sp", 1], {"epoch": 1})
    found = [m for m in read_leaderboard(plan, store).missing if m.pair == PAIR]
    assert {(m.row, m.seeds, m.reason) for m in found} == {
        ("kd", (1,), "not_run"), ("at", (0,), "failed"), ("at", (1,), "not_run"), ("sp", (0,), "not_run"),
        ("sp", (1,), "stopped"), ("rkd", (0, 1), "not_for_this_pair"),
    }  # fmt: skip
    failed = next(m for m in found if m.reason == "failed")
    assert "diverged: loss is [nan]" in failed.text


def test_a_cell_that_somebody_trains_is_running(plan, tmp_path):
    store = Store.open(tmp_path)
    key = plan.cells[0].stages[0]
    store.begin(plan.nodes[key])
    with store.try_lock(key) as held:
        assert held
        found = read_leaderboard(plan, store).missing
    assert ("student", (0,), "running") in [(m.row, m.seeds, m.reason) for m in found]


OTHER = {
    "other_recipe": {"recipe": {"epochs": [4, 1]}},
    "other_data": {"dataset": {"name": "digits", "train_size": 300}},
    "other_teacher": {"teacher": {"epochs": 9}},
}


@pytest.mark.parametrize("reason", OTHER)
def test_results_under_other_conditions_are_named_and_never_mixed_in(tmp_path, reason):
    ours = plan_of(rows=[["kd"]], seeds=[0])
    theirs = plan_of(rows=[["kd"]], seeds=[0], **OTHER[reason])
    store = filled(tmp_path, theirs, {"kd": [99.0]})
    (row,) = leaderboard_rows(ours, store)
    assert (row.mean, row.missing[0].reason) == (None, reason)
    assert theirs.cells[0].stages[0][:12] in row.missing[0].detail
    assert basis_of(ours) != basis_of(theirs)


def test_a_result_of_another_version_is_named(tmp_path):
    plan = plan_of(rows=[["kd"]], seeds=[0])
    store = Store.open(tmp_path)
    spec = plan.nodes[plan.cells[0].stages[0]]
    document = {**spec.document(), "loop": 0}
    folder = store.folder("f" * 64)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"key": "f" * 64, **document}))
    (folder / RESULT).write_text(json.dumps({"test": {"top1": 99.0}}))
    (row,) = leaderboard_rows(plan, store)
    assert (row.mean, row.missing[0].reason) == (None, "other_version")
    assert row.missing[0].detail.startswith("loop")


@pytest.mark.parametrize("spec", ['{"schema": 9}', "{", '{"methods": 3, "model": "x"}', "[]"])
def test_half_migrated_stage_runs_are_no_reason_to_stop(tmp_path, spec):
    plan, store = plan_of(rows=[["kd"]]), Store.open(tmp_path)
    folder = store.folder("e" * 64)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(spec)
    (folder / RESULT).write_text("{}")
    assert reasons(plan, store)["kd"][1] == "not_run"


@pytest.mark.parametrize(
    "record",
    ["{}", '{"test": {}}', '{"test": {"top1": null}}', '{"test": 3}', '{"test": {"top1": NaN}}'],
)
def test_a_result_without_an_accuracy_is_one_message(plan, store, record):
    (store.folder(plan.cells[0].stages[-1]) / RESULT).write_text(record)
    with pytest.raises(StoreError, match="is damaged"):
        read_leaderboard(plan, store)


def test_looks_at_the_test_set_are_counted(plan, tmp_path):
    history = [{"epoch": 1, "test_top1": 1.0}, {"epoch": 2}]
    assert evaluations_of({"history": history}) == 2
    assert evaluations_of({}) == 1
    board = read_leaderboard(plan, filled(tmp_path, plan, TOP1, history=history))
    assert (board.test_set.stage_runs, board.test_set.evaluations, board.test_set.most) == (
        20,
        40,
        2,
    )
    assert named(board.rows, "student").test_evaluations == 8
    text = render(board.rows, "markdown", View(notes=(board.test_set.text,)))
    assert "evaluated 40 times in 20 finished stage runs, at most 2 times in one" in text


# ------------------------------------------------------------------------------------- odd names


EVIL = '<script>alert(1)</script> [red]x[/red] [a](javascript:b) `c` | 50 % & $x_1$ \\input{y} "q"'


@pytest.fixture
def evil(tmp_path):
    rows = [
        {"stages": ["kd"], "name": EVIL, "controls": ["=1+1"], "note": "@SUM(A1)"},
        {"stages": ["at"], "name": "=1+1"},
    ]
    plan = make_plan(load_text(safe_dump(content(rows=rows, seeds=[0, 1, 2]), sort_keys=False)))
    store = filled(tmp_path / "evil", plan, {EVIL: [1.0, 2.0, 3.0], "=1+1": [1.0, 2.0, 2.0]})
    return leaderboard_rows(plan, store)


def test_names_are_no_markup_in_a_terminal(evil):
    out = terminal(400)
    print_table(evil, out)
    assert "[red]x[/red]" in out.file.getvalue()
    assert "\x1b[" not in escaping.plain("\x1b[31mred\u202e\x07")
    assert escaping.plain("a\x1b[31m\u202eb\nc\td") == "a[31mb c d"


def test_names_are_no_html_and_no_links_in_markdown(evil):
    text = render(evil, "markdown")
    assert "<script>" not in text
    assert "](" not in text
    assert "&lt;script>" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_names_are_no_formulas_in_a_spreadsheet(evil):
    lines = list(csv.DictReader(io.StringIO(render(evil, "csv"))))
    assert {line["row"] for line in lines} == {EVIL, "'=1+1"}
    assert lines[0]["note"] == "'@SUM(A1)"


def test_names_are_no_commands_in_latex(evil):
    text = render(evil, "latex")
    assert "\\input" not in text
    assert "\\textbackslash{}input\\{y\\}" in text
    assert "\\$x\\_1\\$" in text
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len({line.replace("\\&", "").count("&") for line in body}) == 1


# --------------------------------------------------------------------- watching, writing, options


def test_watching_ends_when_nothing_can_change(plan, store, tmp_path):
    assert is_settled(plan, store)
    empty = Store.open(tmp_path / "empty")
    assert not is_settled(plan, empty)
    for cell in plan.cells:
        if not empty.failure(cell.stages[0]):
            empty.begin(plan.nodes[cell.stages[0]])
            empty.fail(cell.stages[0], "failed", "why", 0)
    assert is_settled(plan, empty)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_watching_shows_what_is_new(is_terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=60, color_system=None)
    tables, ends = iter(["first", "first", "second", "second"]), iter([False, False, True])
    watch(lambda: next(tables), lambda: next(ends), console, every_s=0.0)
    text = out.getvalue()
    assert "second" in text
    if not is_terminal:
        assert text.split() == ["first", "second"]


def test_ctrl_c_ends_watching_and_nothing_else():
    def interrupted():
        raise KeyboardInterrupt

    watch(lambda: "table", interrupted, Console(file=io.StringIO()), every_s=0.0)


@pytest.fixture
def request_of(tmp_path, store):
    matrix = write_matrix(tmp_path, rows=ROWS, seeds=SEEDS)
    return lambda **options: BoardRequest(matrix=matrix, store=store.root, **options)


def test_a_file_is_written_and_never_overwritten_unasked(request_of, tmp_path):
    out, target = Console(file=io.StringIO()), tmp_path / "new" / "board.md"
    show(request_of(form="markdown", out=target), out)
    first = target.read_text()
    assert "practically equal" in first
    assert "written: " in out.file.getvalue()
    with pytest.raises(StoreError, match="is there already"):
        show(request_of(form="csv", out=target), out)
    assert target.read_text() == first
    show(request_of(form="csv", out=target, force=True), out)
    assert target.read_text().startswith("pair,row,")
    picture = tmp_path / "picture.png"
    picture.write_text("mine")
    with pytest.raises(StoreError, match="--force"):
        show(request_of(picture=picture), out)
    assert picture.read_text() == "mine"


@pytest.mark.parametrize("place", ["a file/board.md", "", "matrix.yaml/x"])
def test_targets_that_cannot_be_written(request_of, tmp_path, place):
    (tmp_path / "a file").write_text("")
    with pytest.raises(StoreError, match=r"folder|cannot be written"):
        show(request_of(form="json", out=tmp_path / place, force=True), Console(file=io.StringIO()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(request_of, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        show(request_of(form="json", out=locked / "x.json"), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "options", [{"watch": True, "form": "json"}, {"watch": True, "devices": True}, {"out": "x"}]
)
def test_options_that_cannot_go_together(request_of, tmp_path, options):
    if "out" in options:
        options = {"out": tmp_path / "x"}
    with pytest.raises(ConfigError):
        show(request_of(**options), Console(file=io.StringIO()))


def test_a_settled_matrix_is_watched_once(request_of):
    out = Console(file=io.StringIO())
    show(request_of(watch=True, pair="resnet8", method="kd"), out)
    assert out.file.getvalue().count("fitnet>kd no-ref") >= 1


# ------------------------------------------------------------------------------------------ seeds


def test_long_reading_shows_how_far_it_is(plan, store, monkeypatch):
    quick = terminal()
    read_shown(plan, store, quick)
    assert quick.file.getvalue() == ""  # a moment needs no bar
    monkeypatch.setattr(reading, "MOMENT_S", -1.0)
    slow, file = terminal(), Console(file=io.StringIO(), force_terminal=False)
    held = read_shown(plan, store, slow)
    assert "reading the store" in slow.file.getvalue()
    assert read_shown(plan, store, file) == held == read_held(plan, store)
    assert file.file.getvalue() == ""


def test_seeds_that_a_claim_needs(board):
    all_of_them, *each = seed_needs(board.rows, 0.3)
    assert (all_of_them.row, all_of_them.pair, len(each)) == (ALL, PAIR, 4)
    for need in each:
        assert need.alone <= need.in_table <= need.cautious
        assert need.std <= need.std_upper
    noisy = next(need for need in each if need.row == "dkd")
    calm = next(need for need in each if need.control == "fitnet>kd no-ref")
    assert noisy.alone > 10 * calm.alone
    assert calm.alone == 3


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_the_plan_is_shown(request_of, form):
    request = request_of()
    out = Console(file=io.StringIO(), width=200)
    show_seeds(SeedsRequest(request.matrix, request.store, 0.3, form=form), out)
    text = out.file.getvalue()
    assert ALL in text
    assert "dkd" in text
    if form == "json":
        assert json.loads(text)[0]["difference"] == 0.3
    else:
        assert "true difference of 0.3 points with a chance of 80%" in text


def test_no_spread_no_plan(tmp_path):
    matrix = write_matrix(tmp_path, rows=ROWS, seeds=SEEDS)
    with pytest.raises(SmskdError, match="no comparison"):
        show_seeds(SeedsRequest(matrix, tmp_path / "none", 0.3), Console(file=io.StringIO()))
