"""Small matrices for tests of the harness: text in, checked matrix or plan out."""

from pathlib import Path

import yaml
from smskd_bench.config import check_matrix
from smskd_bench.plan import make_plan
from smskd_export.yaml_reader import parse_yaml

FILE = Path("some.yaml")
PAIR = "resnet14_half>resnet8_quarter"


def content(**entries):
    """A valid document with ``entries`` in place of its own."""
    return {
        "name": "some",
        "dataset": {"name": "digits"},
        "pairs": [{"teacher": "resnet14_half", "student": "resnet8_quarter"}],
        "seeds": [0],
        "rows": [["kd"]],
        "recipe": {"epochs": [2, 1]},
        "teacher": {"epochs": 3},
        **entries,
    }


def load_text(text, file=FILE):
    return check_matrix(parse_yaml(text, file))


def load(**entries):
    return load_text(yaml.safe_dump(content(**entries), sort_keys=False))


def plan_of(only=None, **entries):
    return make_plan(load(**entries), only)


def specs(plan, row, pair=0, seed=None):
    """Specifications of one cell's stages, chosen by the row's name."""
    name = plan.matrix.pairs[pair].name
    cell = next(c for c in plan.cells if (c.pair, c.row) == (name, row) and seed in (None, c.seed))
    return [plan.nodes[key] for key in cell.stages]


def write_matrix(folder, **entries):
    """The document as a file in ``folder``."""
    file = folder / "matrix.yaml"
    file.write_text(yaml.safe_dump(content(**entries), sort_keys=False), encoding="utf-8")
    return file
