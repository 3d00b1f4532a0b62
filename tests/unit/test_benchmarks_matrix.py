"""The matrix benchmark: made-up rounds, timed commands, and one real tiny matrix."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan

from benchmarks import matrix_cost
from benchmarks.expected_sheets import (
    ALONE,
    ALONE_STAGES,
    ALONE_TRAINED,
    MATRIX_COST,
    SHARED_MATRIX,
    TOGETHER,
    TOGETHER_TRAINED,
    matrix_sheet,
)
from benchmarks.interleave import Clock
from benchmarks.matrix_report import filled_sheet, in_words
from benchmarks.matrix_rounds import CellAlone, MeasuredRound
from benchmarks.record import document, table
from benchmarks.timed_run import TIMES, Timed, timed_run
from smskd.errors import ConfigError, RunError

TINY = """
schema: 1
name: tiny
dataset: {name: digits, train_size: 50}
pairs: [{teacher: resnet8_half, student: resnet8_quarter}]
seeds: [0]
recipe: {epochs: [1, 1]}
teacher: {epochs: 1, seed: 0}
rows: [[kd, dkd]]
"""


def cell(top1=10.0, together=10.0, same=True):
    return CellAlone("a>b/kd/s0", Timed(10.0, 9.0), 2.0, 7.0, top1, together, same)


def one_round(together=5.0):
    cells = [cell(), cell(11.0, 10.5, same=False)]
    return MeasuredRound(Timed(8.0, 12.0), Timed(together, 6.0), 30.0, cells, {})


def rows(*rounds):
    made = filled_sheet(matrix_sheet("m", "cpu"), rounds)
    return {row["name"]: row for row in made.document()["rows"]}


def test_baselines_are_sums_over_cells():
    found = rows(one_round())
    assert found[ALONE]["wall_s"] == 20.0
    assert found[ALONE]["cpu_s"] == 18.0
    assert found[ALONE_STAGES]["wall_s"] == 14.0
    assert found[ALONE_TRAINED]["wall_s"] == 20.0 - 2 * 2.0 + 2 * 30.0
    assert [found[n]["how"] for n in (ALONE, ALONE_STAGES, ALONE_TRAINED, TOGETHER)] == [
        "measured", "computed", "computed", "measured",
    ]  # fmt: skip


def test_ratios_and_goal():
    found = rows(one_round())
    assert found[TOGETHER]["against"][ALONE]["median"] == 4.0
    assert found[TOGETHER]["against"][ALONE_STAGES]["median"] == pytest.approx(2.8)
    assert found[TOGETHER]["cpu_against"]["median"] == 3.0
    assert found[TOGETHER_TRAINED]["against"][ALONE_TRAINED]["median"] == 9.5
    assert found[TOGETHER]["verdict"] == "met"
    assert rows(one_round(5.1))[TOGETHER]["verdict"] == "not met"
    assert rows(one_round(4.0), one_round(5.0), one_round(10.0))[TOGETHER]["wall_s"] == 5.0
    assert found[TOGETHER_TRAINED]["verdict"] == ""


def test_table_says_what_was_measured_and_how_students_compare():
    made = filled_sheet(matrix_sheet("m", "cpu"), [one_round()])
    said = in_words(made.notes["students"])
    assert "the same bits in 1 of 2 cells; top-1 differs by at most 0.50 points, -0.25" in said
    text = table(document(MATRIX_COST, "cpu", [made], {"rounds": 1}, ["reading"], said))
    assert f"| {TOGETHER} | 5 | 6 | measured | 4.00 | 2.80 | 15.20 | 3.00 | 4 | met |" in text
    assert f"| {ALONE_STAGES} | 14 | - | computed | - | - | - | - | - |  |" in text
    assert said in text
    cells = made.document()["notes"]["rounds"][0]["cells"]
    assert [c["top1"] for c in cells] == [10.0, 11.0]


def test_goal_is_for_a_cpu():
    assert matrix_sheet("m", "cpu").wanted[TOGETHER]["goal"]["against"] == [ALONE]
    assert not matrix_sheet("m", "cuda").wanted


def test_finished_command_is_not_run_again(tmp_path):
    folder = tmp_path / "run"
    program = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); assert not p.exists(); p.touch()"
    command = (sys.executable, "-c", program, str(folder / "made"))
    first = timed_run(command, folder, "a", Clock())
    assert min(first.wall_s, first.cpu_s) > 0
    assert timed_run(command, folder, "a", Clock()) == first
    (folder / TIMES).unlink()  # as a kill would leave it: begun again in an empty folder
    timed_run(command, folder, "a", Clock())
    assert timed_run(command, folder, "b", Clock()) != first


def test_failed_command_says_why(tmp_path):
    command = (sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)")
    with pytest.raises(RunError, match="status 3") as caught:
        timed_run(command, tmp_path / "run", "a", Clock())
    assert caught.value.hint == "no luck"
    assert not (tmp_path / "run" / TIMES).exists()


def test_settings_of_the_shell_do_not_reach_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_WORKERS", "7")
    program = "import os; assert 'SMSKD_WORKERS' not in os.environ"
    timed_run((sys.executable, "-c", program), tmp_path / "run", "a", Clock())


def test_shared_matrix_has_enough_cells_that_begin_alike():
    plan = make_plan(load_matrix(matrix_cost.DEFAULT_MATRIX))
    assert plan.matrix.name == SHARED_MATRIX
    assert len(plan.cells) == 27
    alone = plan.stages_before_sharing() - len(plan.cells)  # each cell has a teacher
    assert (alone, len(plan.nodes) - 1) == (48, 27)
    for each in plan.cells:
        assert [c.name for c in make_plan(plan.loaded, each.name).cells] == [each.name]


@pytest.mark.slow
def test_a_tiny_matrix_is_measured_both_ways(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    work = tmp_path / "work"
    words = ["--matrix", str(file), "--work", str(work), "--output", str(tmp_path)]
    done = CliRunner().invoke(matrix_cost.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = json.loads(Path(tmp_path, "matrix_cost-cpu.json").read_text())
    (group,) = made["groups"]
    found = {row["name"]: row for row in group["rows"]}
    assert all("not_measured" not in row for row in found.values())
    assert found[ALONE]["wall_s"] > found[ALONE_STAGES]["wall_s"] > 0
    (measured,) = group["notes"]["rounds"]
    (alone,) = measured["cells"]
    assert alone["name"] == "resnet8_half>resnet8_quarter/kd>dkd/s0"
    assert min(alone["top1"], alone["top1_together"]) > 0
    assert measured["teacher_s"] > 0
    assert sum(measured["fast_paths"].values()) == 3
    before = {path: path.stat().st_mtime_ns for path in work.rglob(TIMES)}
    again = CliRunner().invoke(matrix_cost.main, words, catch_exceptions=False)
    assert again.exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob(TIMES)}
    assert len(before) == 3


def test_a_matrix_of_several_teachers_is_refused(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(TINY.replace("seed: 0}", "seed: null}").replace("seeds: [0]", "seeds: [0, 1]"))
    words = ["--matrix", str(file), "--work", str(tmp_path / "w"), "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="has 2 teachers"):
        CliRunner().invoke(matrix_cost.main, words, catch_exceptions=False)
