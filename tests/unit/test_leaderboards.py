"""The shipped matrices load, and keep the rules of leaderboards/README.md; so do published numbers."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from smskd_bench import listing, published
from smskd_bench.compatibility import check_plan
from smskd_bench.config import load_matrix
from smskd_bench.naming import row_name
from smskd_bench.plan import make_plan
from smskd_bench.published import load_published, numbers

from smskd.errors import MissingDataError
from smskd.methods import METHODS, MODIFIERS
from smskd.models import MODELS

FOLDER = Path(__file__).parents[2] / "leaderboards"
MATRICES = sorted(p.name for p in FOLDER.glob("*.yaml") if p.name != "claims.yaml")
STANDARD_PAIRS = {
    "resnet56>resnet20", "resnet110>resnet20", "resnet110>resnet32", "resnet32x4>resnet8x4",
    "wrn_40_2>wrn_16_2", "wrn_40_2>wrn_40_1", "vgg13>vgg8", "vgg13>MobileNetV2",
    "ResNet50>MobileNetV2", "ResNet50>vgg8", "resnet32x4>ShuffleV1", "resnet32x4>ShuffleV2",
    "wrn_40_2>ShuffleV1",
}  # fmt: skip
METHODS_BOARD = "cifar100-methods.yaml"


def staged(plan):
    """Rows of the first pair with each row's specs."""
    pair = plan.matrix.pairs[0].name
    cells = [c for c in plan.cells if c.pair == pair and c.seed == plan.matrix.seeds[0]]
    return {c.row: [plan.nodes[key] for key in c.stages] for c in cells}


def methods(specs):
    return [spec.methods for spec in specs]


def test_there_are_matrices():
    assert {"quickstart.yaml", "cifar100.yaml", "cifar100-small.yaml", METHODS_BOARD} <= set(
        MATRICES
    )
    assert "cifar100-hetero.yaml" in MATRICES


def test_the_readme_lists_every_board_with_its_size():
    text = (FOLDER / "README.md").read_text()
    listed = dict(re.findall(r"\| `([\w-]+\.yaml)` \| ([\d,]+ \| [\d,]+) \|", text))
    plans = {name: make_plan(load_matrix(FOLDER / name)) for name in MATRICES}
    assert listed == {
        name: f"{len(plan.matrix.pairs)} | {len(plan.cells):,}" for name, plan in plans.items()
    }


@pytest.mark.parametrize("name", MATRICES)
def test_loads_with_three_seeds(name):
    plan = make_plan(load_matrix(FOLDER / name))
    assert len(plan.matrix.seeds) >= 3
    assert plan.cells


@pytest.mark.parametrize("name", MATRICES)
def test_every_sequence_with_reference_is_held_against_fair_controls(name):
    plan = make_plan(load_matrix(FOLDER / name))
    rows = staged(plan)
    sections = {row_name(section): section for section in plan.matrix.rows}
    for row, specs in rows.items():
        if not any(spec.reference for spec in specs):
            continue
        controls = [rows[control] for control in sections[row].controls]
        assert controls, f"{row} names no control"
        epochs = sum(spec.training.epochs for spec in specs)
        fair = [c for c in controls if sum(s.training.epochs for s in c) >= epochs]
        assert fair, f"no control of {row} was trained for as long"
        bare = [c for c in controls if not any(spec.reference for spec in c)]
        assert bare, f"{row} is compared with rows with reference only"


# ------------------------------------------------------------------------- the boards of CIFAR-100


@pytest.mark.parametrize("name", ["cifar100.yaml", METHODS_BOARD])
def test_the_13_pairs_with_their_rates(name):
    matrix = load_matrix(FOLDER / name).matrix
    assert {pair.name for pair in matrix.pairs} == STANDARD_PAIRS
    for pair in matrix.pairs:
        assert pair.lr == (0.01 if pair.student[:4] in ("Mobi", "Shuf") else None), pair.name
    assert (matrix.recipe.optimizer.lr, matrix.recipe.batch_size) == (0.05, 64)
    assert matrix.recipe.first_stage.milestones == (150 / 240, 180 / 240, 210 / 240)


def test_every_method_and_modifier_of_the_zoo_is_on_the_board():
    plan = make_plan(load_matrix(FOLDER / METHODS_BOARD))
    specs = [plan.nodes[cell.stages[-1]] for cell in plan.cells]
    methods = [method for spec in specs for method in spec.methods]
    assert {method.name for method in methods} == set(METHODS)
    assert {m.name for method in methods for m in method.modifiers} == set(MODIFIERS)
    assert {sum(plan.nodes[key].training.epochs for key in cell.stages) for cell in plan.cells} == {
        240
    }


ONLY_SOME = {
    "dkd_sdd": 6,  # published for six pairs
    "nkd_sdd": 6,
    "takd": 12,  # wrn_40_2>wrn_16_2 has nothing in between
}
EXTRA_ROWS = {"info_flow via wrn_16_2", "info_flow via wrn_40_2", "rdd curriculum"}


def test_a_method_with_settings_for_each_pair_has_one_row_for_each():
    plan = make_plan(load_matrix(FOLDER / METHODS_BOARD))
    places = {(cell.row, cell.pair) for cell in plan.cells if cell.row not in EXTRA_ROWS}
    counts = Counter((row.split()[0], pair) for row, pair in places)
    assert set(counts.values()) == {1}
    pairs = Counter(method for method, _ in counts)
    assert pairs == {method: ONLY_SOME.get(method, 13) for method in pairs}


@pytest.mark.parametrize("pair", ["resnet56>resnet20", "vgg13>MobileNetV2"])
def test_every_method_can_work_with_the_pair(pair):
    plan = make_plan(load_matrix(FOLDER / METHODS_BOARD), f"{pair}/*/s0")
    check_plan(plan, plan.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
def test_every_row_can_work_with_every_pair(name):
    if name == "cifar100-hetero.yaml" and find_spec("timm") is None:
        pytest.skip("needs the extra hetero")
    plan = make_plan(load_matrix(FOLDER / name))
    check_plan(plan, plan.nodes)


# ---------------------------------------------------------------------------- published numbers


def test_the_published_numbers_are_well_formed():
    rows = load_published()
    assert len(rows) == 604
    assert max(Counter((n.pair, n.method, n.source) for n in rows).values()) == 1
    for n in rows:
        teacher, student = n.pair.split(">")
        assert {teacher, student} <= set(MODELS), n
        assert 10.0 < n.top1 < 80.0, n
        assert n.std is None or 0.0 < n.std < 2.0, n
        assert all(text == text.strip() and text for text in (n.method, n.source, n.protocol)), n
    assert {n.pair for n in rows} >= STANDARD_PAIRS


def test_what_was_trained_differently_is_not_called_standard():
    apart = {"PLD paper", "KD-Zoo README", "SimKD README", "SemCKD README"}
    longer = {"AB", "FT", "FSP", "MLLD", "MLLD+LSKD", "ReviewKD", "WCoRD"}
    for n in load_published():
        standard = n.source not in apart and n.method not in longer
        assert (n.protocol == published.STANDARD) == standard, n


def test_the_readme_explains_every_label_and_source():
    text = (FOLDER / "published" / "README.md").read_text()
    labels = Counter(n.protocol for n in load_published())
    listed = {label: int(n) for label, n in re.findall(r"^\| `([\w+-]+)` \| (\d+) \|", text, re.M)}
    assert listed == labels
    sources = Counter(n.source for n in load_published())
    checked = {
        name: int(n) for name, n in re.findall(r"^\| ([^|`]+) \| .* \| all (\d+) \|$", text, re.M)
    }
    assert checked == sources


def test_ours_names_a_row_of_the_board():
    names = {row_name(row).split()[0] for row in load_matrix(FOLDER / METHODS_BOARD).matrix.rows}
    ours = {n.ours for n in load_published() if n.ours}
    assert ours <= names
    assert {"student", "kd", "fitnet", "crd", "dkd", "kd_ls", "crd+wttm"} <= ours


@pytest.mark.parametrize(
    ("pair", "method", "source", "top1", "std"),
    [
        ("resnet56>resnet20", "KD", "RepDistiller README", 70.66, None),
        ("resnet56>resnet20", "Student", "RepDistiller README", 69.06, None),
        ("resnet32x4>ShuffleV2", "DKD", "mdistiller README", 77.07, None),
        ("resnet32x4>resnet8x4", "KD+LSKD", "LSKD README", 76.62, None),
        ("resnet56>resnet20", "DIST", "DIST_KD README", 71.75, 0.30),
        ("ResNet50>vgg8", "WTTM", "TTM README", 74.82, None),
        ("wrn_40_2>wrn_16_2", "CRD", "RepDistiller README", 75.48, None),
        ("wrn_40_2>ShuffleV1", "SD-DKD", "SDD README", 77.21, None),
    ],
)
def test_some_published_numbers(pair, method, source, top1, std):
    (found,) = [n for n in numbers(pair) if (n.method, n.source) == (method, source)]
    assert (found.top1, found.std) == (top1, std)


def test_numbers_are_of_one_protocol():
    assert {n.protocol for n in numbers("resnet32x4>resnet8x4")} == {"crd-240"}
    other = numbers("resnet32x4>resnet8x4", "simkd-240")
    assert {n.method for n in other} >= {"SimKD(f=2)", "SemCKD"}
    assert all(n.pair == "resnet32x4>resnet8x4" for n in other)
    assert numbers("resnet8>resnet8") == ()


def test_listed():
    head, *lines = listing.lines("published")
    assert head.split()[:3] == ["pair", "method", "top-1"]
    assert len(lines) == 604
    assert max(map(len, lines)) <= 100
    assert (
        "resnet56>resnet20        KD           70.66        RepDistiller README  crd-240" in lines
    )


def test_installed_without_the_repository(monkeypatch):
    monkeypatch.setattr(published, "_FILE", Path("nowhere/cifar100.csv"))
    with pytest.raises(MissingDataError, match="not of the installed package"):
        published._file()
