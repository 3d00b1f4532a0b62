"""The shipped matrices load, and keep the rules of leaderboards/README.md."""

from pathlib import Path

import pytest
from smskd_bench.config import load_matrix
from smskd_bench.naming import row_name
from smskd_bench.plan import make_plan

FOLDER = Path(__file__).parents[2] / "leaderboards"
MATRICES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def staged(plan):
    """Rows of the first pair with each row's specs."""
    pair = plan.matrix.pairs[0].name
    cells = [c for c in plan.cells if c.pair == pair and c.seed == plan.matrix.seeds[0]]
    return {c.row: [plan.nodes[key] for key in c.stages] for c in cells}


def methods(specs):
    return [spec.methods for spec in specs]


def test_there_are_matrices():
    assert {"quickstart.yaml", "cifar100.yaml", "cifar100-small.yaml"} <= set(MATRICES)


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
