"""The grid of methods and pairs: cheap cells, faults that it must see, its page; all of it if slow."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import daily
from click.testing import CliRunner

from benchmarks import grid, grid_cell, images, report
from benchmarks.grid import PAIRS, kind_of, names, part_of, run_cells
from benchmarks.grid_cell import Bench, Cell
from benchmarks.grid_page import READING, RUNS, counts, grid_sheet, page, summary
from benchmarks.images import TrainImages
from benchmarks.pair import known_pair
from benchmarks.record import RESULTS, ROOT, document
from smskd.errors import ConfigError, UnknownNameError
from smskd.methods import METHODS, MODIFIERS
from smskd.methods.base import Method, Needs
from smskd.methods.objective import Part

DATA = TrainImages(
    torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64), "random"
)
SMALL = "resnet8>resnet8_quarter"
quick = pytest.mark.usefixtures("few_images")


@pytest.fixture
def few_images(monkeypatch):
    """Less to prepare."""
    monkeypatch.setattr(grid_cell, "STATISTICS_IMAGES", 8)
    monkeypatch.setattr(images, "load_images", lambda root: DATA)


@pytest.fixture(scope="module")
def benches():
    """Benches by pair, each built once."""
    made = {}

    def bench(pair):
        if pair not in made:
            made.clear()
            made[pair] = Bench(known_pair(pair), DATA, 2, torch.device("cpu"))
        return made[pair]

    return bench


def test_the_pairs_are_the_standard_ones():
    assert len(set(PAIRS)) == 13
    assert all(str(known_pair(pair)) == pair for pair in PAIRS)


@quick
@pytest.mark.parametrize("pair", daily(PAIRS, 3))
def test_kd_runs_on_each_pair(benches, pair):
    assert benches(pair).cell(part_of("kd")) == Cell("ok")


@quick
@pytest.mark.parametrize("name", ["scratch", "fitnet", "crd", "reviewkd", "simkd", "dml", "ctkd"])
def test_runs_on_maps_of_other_sizes(benches, name):
    assert benches("vgg13>MobileNetV2").cell(part_of(name)) == Cell("ok")


def test_rows_are_all_methods_and_modifiers():
    assert names() == [*METHODS, *MODIFIERS]
    assert part_of("fitnet") == Part(METHODS["fitnet"]())
    assert part_of("ctkd") == Part(METHODS["kd"](), (MODIFIERS["ctkd"](),))
    assert kind_of("fitnet") == "feature"
    assert kind_of("ctkd") == "modifier, around kd"
    with pytest.raises(UnknownNameError, match="fitnett"):
        part_of("fitnett")


@dataclass(frozen=True)
class Broken(Method):
    """A method with a fault to choose."""

    name: ClassVar[str] = "broken"
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs(True, frozenset({"network"}), frozenset({"network"}))

    fault: str = ""

    def check(self, shapes):
        return "1 leg (expected 2)" if self.fault == "refuses" else None

    def build(self, shapes):
        if self.fault == "moves the teacher":
            next(shapes.teacher_networks[0].model.parameters()).data.add_(1.0)
        return super().build(shapes)

    def distill(self, signals, modules):
        logits = signals.student.logits
        if self.fault == "raises":
            raise ZeroDivisionError("by 0\nand more")
        if self.fault == "late" and signals.epoch > 1:
            return {"it": logits.mean() * float("nan")}
        if self.fault == "no gradient":
            return {"it": logits.detach().mean()}
        if self.fault == "infinite gradient":
            return {"it": (logits - logits.detach()).sum().clamp(min=0.0).sqrt()}
        return {"it": logits.mean()}

    def inference_model(self, student, modules):
        return torch.nn.Flatten() if self.fault == "deploys another" else student


@quick
@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("", "ok", ""),
        ("refuses", "declared", "1 leg (expected 2)"),
        ("raises", "failed", "ZeroDivisionError: by 0"),
        ("late", "failed", "AssertionError: term 'it' is nan"),
        ("no gradient", "failed", "AssertionError: distillation has no gradient to the student"),
        ("infinite gradient", "failed", "AssertionError: the gradients of distillation are not"),
        ("moves the teacher", "failed", "AssertionError: the teacher was changed: "),
        ("deploys another", "failed", "AssertionError: logits (2, 3072), expected (2, 100)"),
    ],
)
def test_a_cell_says_what_happened_and_harms_no_other(benches, fault, outcome, reason):
    bench = benches(SMALL)
    cell = bench.cell(Part(Broken(fault=fault)))
    assert cell.outcome == outcome, cell
    assert cell.reason.startswith(reason)
    assert bool(cell.where) == (outcome == "failed")
    assert bench.cell(part_of("kd")) == Cell("ok")


@quick
def test_batch_norms_that_count_a_step_twice_are_seen(benches, monkeypatch):
    def twice(run, batch, epoch):
        run.student(batch.images)
        return once(run, batch, epoch)

    once = grid_cell.train_one
    monkeypatch.setattr(grid_cell, "train_one", twice)
    cell = benches(SMALL).cell(part_of("kd"))
    assert "counted" in cell.reason
    assert cell.where.startswith("benchmarks/grid_cell.py:")


CELLS = {
    ("kd", "a>b"): Cell("ok"),
    ("kd", "c>d"): Cell("declared", "3 maps (expected 4)"),
    ("at", "a>b"): Cell("failed", "KeyError: 'x'", "smskd/x.py:3"),
    ("at", "c>d"): Cell("declared", "3 maps (expected 4)"),
}


def result(cells):
    kinds = {"kd": "response", "at": "feature"}
    sheet = grid_sheet(kinds, ["a>b", "c>d"], cells)
    return document("grid", "cpu", [sheet], {"batch": 8}, (), READING)


def test_the_page_holds_the_table_the_counts_and_each_reason_once():
    made = result(CELLS)
    text = page(json.loads(json.dumps(made)))
    assert text == page(made)
    assert "**4 cells: 1 ok, 2 declared, 1 failed.**" in text
    assert "| method | kind | a > b | c > d |" in text
    assert f"| kd | response | {RUNS} | 1 |" in text
    assert "| at | feature | FAILED 2 | 1 |" in text
    assert "\n1. 3 maps (expected 4)\n2. KeyError: 'x' (smskd/x.py:3)\n" in text
    assert "35 of 169 cells" in text
    assert "Reasons" not in page(result(dict.fromkeys(CELLS, Cell("ok"))))


def test_the_page_of_times_leaves_it_out():
    assert "a > b" not in report.render({("grid", "cpu"): result(CELLS)})


@quick
def test_a_part_of_the_grid_is_printed_and_kept_nowhere(monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    done = CliRunner().invoke(grid.main, ["--methods", "kd, dot", "--pairs", SMALL])
    assert done.exit_code == 0, done.output
    assert "2 cells: 2 ok" in done.output
    assert not list(tmp_path.iterdir())


@quick
def test_a_failure_is_told_at_once_and_is_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "broken", lambda: Broken(fault="raises"))
    monkeypatch.setattr(grid, "kind_of", lambda name: "response")
    page_file = tmp_path / "grid.md"
    options = ["--methods", "broken", "--pairs", SMALL, "--output", str(tmp_path)]
    done = CliRunner().invoke(grid.main, [*options, "--markdown", str(page_file)])
    assert done.exit_code == 1
    assert (
        f"{SMALL} broken: FAILED ZeroDivisionError: by 0 (tests/unit/test_grid.py:" in done.stderr
    )
    written = page_file.read_text(encoding="utf-8")
    page_file.unlink()
    again = ["--rewrite", "--output", str(tmp_path), "--markdown", str(page_file)]
    assert CliRunner().invoke(grid.main, again).exit_code == 0
    assert page_file.read_text(encoding="utf-8") == written
    with pytest.raises(ConfigError, match="writes a page"):
        CliRunner().invoke(grid.main, ["--rewrite"], catch_exceptions=False)


def test_the_kept_page_is_that_of_the_kept_result():
    kept = json.loads((RESULTS / "grid-cpu.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "grid.md").read_text(encoding="utf-8") == page(kept)
    (group,) = kept["groups"]
    assert [row["name"] for row in group["rows"]] == names()
    assert [column["title"] for column in group["columns"][1:]] == [
        pair.replace(">", " > ") for pair in PAIRS
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_runs_on_every_pair(pair):
    parts = {name: part_of(name) for name in names()}
    cells = run_cells(parts, [known_pair(pair)], 4, "cpu")
    failed = {row: cell for (row, _), cell in cells.items() if cell.outcome == "failed"}
    assert not failed, f"{summary(counts(cells.values()))}: {failed}"
