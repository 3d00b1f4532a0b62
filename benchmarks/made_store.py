"""A large matrix file and a store that holds a result for each of its stage runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from smskd_bench.config import load_matrix
from smskd_bench.plan import Plan, make_plan
from smskd_bench.store import RESULT, SPEC, Record, Store

from smskd.atomic import write_json
from smskd.errors import RunError

PAIRS = (
    "resnet56>resnet20", "resnet110>resnet20", "resnet110>resnet32", "resnet32x4>resnet8x4",
    "wrn_40_2>wrn_16_2", "wrn_40_2>wrn_40_1", "vgg13>vgg8", "vgg13>MobileNetV2",
    "ResNet50>MobileNetV2", "ResNet50>vgg8", "resnet32x4>ShuffleV1", "resnet32x4>ShuffleV2",
    "wrn_40_2>ShuffleV1", "resnet56>resnet8", "resnet56>resnet14", "resnet56>resnet32",
    "resnet110>resnet44", "vgg16>vgg8", "vgg19>vgg8", "resnet110>resnet56",
)  # fmt: skip
METHODS = ("kd", "fitnet", "at", "sp", "rkd", "dkd", "nkd", "dist", "pkt", "cc")
"""Each alone, and before each of the others, which it has to beat: 100 rows."""

TINY: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "train_size": 50},
    "pairs": [{"teacher": "resnet8_half", "student": "resnet8_quarter"}],
    "seeds": [0],
    "rows": [["fitnet", "kd"]],
    "recipe": {"epochs": [1, 1]},
    "teacher": {"epochs": 1},
}


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        matrix: The file.
        store: Full.
        empty: A store that is not there.
        cells: Of the matrix.
        stage_runs: Of the matrix: results in the store.
        result_bytes: Of one result.
    """

    matrix: Path
    store: Path
    empty: Path
    cells: int
    stage_runs: int
    result_bytes: int


def matrix_document(seeds: int) -> dict[str, Any]:
    """20 pairs of CIFAR-100, 100 rows, and so many seeds."""
    names = [pair.split(">") for pair in PAIRS]
    return {
        "name": "scale",
        "dataset": {"name": "cifar100"},
        "pairs": [{"teacher": teacher, "student": student} for teacher, student in names],
        "seeds": list(range(seeds)),
        "rows": [[a] for a in METHODS]
        + [{"stages": [a, b], "controls": [a, b]} for a in METHODS for b in METHODS if a != b],
    }


def make(folder: Path, seeds: int, epochs: int | None = None) -> Made:
    """Write the matrix, and the store unless ``folder`` has it already.

    Args:
        folder: Where to.
        seeds: Of the matrix; each stands for 2,000 cells.
        epochs: Length of every history; None keeps the one epoch that is really trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix, root = folder / "matrix.yaml", folder / "store"
    matrix.write_text(yaml.safe_dump(matrix_document(seeds), sort_keys=False), encoding="utf-8")
    plan, store = make_plan(load_matrix(matrix)), Store.open(root)
    model = _real_result(folder)
    if len(store.folders()) < len(plan.nodes):
        _fill(plan, store, _longer(model, epochs))
    size = (store.folder(next(iter(plan.nodes))) / RESULT).stat().st_size
    return Made(matrix, root, folder / "empty", len(plan.cells), len(plan.nodes), size)


def _real_result(folder: Path) -> Record:
    """The result of a stage run that is really trained: the second of a sequence."""
    matrix, root = folder / "tiny.yaml", folder / "tiny"
    matrix.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    words = ["run", "--matrix", str(matrix), "--store", str(root), "--tracking", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "smskd_bench.cli", *words], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RunError("the stage run to copy from could not be trained", done.stderr[-800:])
    store = Store.peek(root)
    (cell,) = make_plan(load_matrix(matrix)).cells
    result = store.result(cell.stages[-1])
    assert result is not None
    return result


def _longer(model: Record, epochs: int | None) -> Record:
    """The result with its last epoch repeated."""
    if epochs is None:
        return model
    last = model["history"][-1]
    return {**model, "history": [{**last, "epoch": epoch} for epoch in range(1, epochs + 1)]}


def _fill(plan: Plan, store: Store, model: Record) -> None:
    for number, (key, spec) in enumerate(plan.nodes.items()):
        folder, document = store.folder(key), spec.document()
        folder.mkdir(parents=True, exist_ok=True)
        test = {**model["test"], "top1": 60.0 + (7919 * number % 1000) / 100.0}
        # As the store writes them, without waiting for a disk after each.
        _write(folder / SPEC, {"key": key, **document})
        _write(folder / RESULT, {**model, "key": key, "spec": document, "test": test})
    write_json(store.root / "store.json", {"format": 1})


def _write(path: Path, record: Record) -> None:
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
