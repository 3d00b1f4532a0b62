"""What the benchmarks should show: contestants and goals of every table, measured or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.record import Goal, Group, Table
from benchmarks.sheet import Column, Sheet

KD_STEP, DATA_PATH = "kd_step", "data_path"
MATRIX_COST, LEARNING = "matrix_cost", "learning"

RIVALS = ("torchdistill", "conventional")
OURS = ("ours fp32 live", "ours bf16 live", "ours fp32 table", "ours bf16 table")

PAIRS = ("resnet32x4>resnet8x4", "resnet110>resnet20", "ResNet50>MobileNetV2")

CPU_GOALS: dict[str, dict[str, float]] = {
    "resnet32x4>resnet8x4": {
        "ours fp32 live": 1.15,
        "ours bf16 live": 3.8,
        "ours fp32 table": 2.8,
        "ours bf16 table": 7.0,
    },
    "resnet110>resnet20": {"ours fp32 table": 2.5},
    "ResNet50>MobileNetV2": {"ours fp32 table": 15.0},
}
CUDA_GOALS: dict[str, dict[str, float]] = {PAIRS[0]: {"ours bf16 table": 10.0}}
GOALS = {"cpu": CPU_GOALS, "cuda": CUDA_GOALS}

PIL_0, PIL_2 = "PIL, 0 workers", "PIL, 2 workers"
GATHER = "ours, one gather a batch"
DATA_GOAL = 15.0

SHARED_MATRIX = "shared-prefixes"
ALONE = "each cell alone, teacher given"
ALONE_STAGES = "each cell alone, teacher given, stage runs only"
ALONE_TRAINED = "each cell alone, teacher trained in each"
TOGETHER = "all cells in one run, teacher given"
TOGETHER_TRAINED = "all cells in one run, teacher trained"
BY_CELL = (ALONE, ALONE_STAGES, ALONE_TRAINED)
MATRIX_GOAL = 4.0

LEARNING_PAIR = "resnet14>resnet8"
CONVENTIONAL, LIVE = "conventional", "ours fp32 live"
TABLE, BF16, FOLDED = "ours fp32 table fp16", "ours bf16 live", "ours fp32 live, seeds folded"
TF32, COMPILED = "ours tf32 live", "ours fp32 live, compiled"
LEARNING_MODES = {
    "cpu": (CONVENTIONAL, LIVE, TABLE, BF16, FOLDED),
    "cuda": (CONVENTIONAL, LIVE, TABLE, BF16, FOLDED, TF32, COMPILED),
}
COMPARED_WITH = (CONVENTIONAL, LIVE)


def step_group(pair: str, device: str) -> Group:
    """The empty table of one pair of networks."""
    goals = GOALS[device].get(pair, {})
    return Group(
        title=pair,
        expected=(*RIVALS, *OURS),
        baselines=RIVALS,
        goals={name: Goal(ratio, RIVALS) for name, ratio in goals.items()},
    )


def data_group() -> Group:
    """The empty table of the data path."""
    return Group(
        title="CIFAR-100 batches, augmented and normalised",
        expected=(PIL_0, PIL_2, GATHER),
        baselines=(PIL_0, PIL_2),
        goals={GATHER: Goal(DATA_GOAL, (PIL_0,))},
    )


def matrix_sheet(title: str, device: str) -> Sheet:
    """The empty table of what a whole matrix costs."""
    against = [Column(f"against {name}", f"{{against[{name}][median]:.2f}}") for name in BY_CELL]
    return Sheet(
        title=title,
        first="way",
        columns=(
            Column("wall s", "{wall_s:,.0f}"),
            Column("CPU s", "{cpu_s:,.0f}"),
            Column("time is", "{how}", text=True),
            *against,
            Column("CPU time against the first", "{cpu_against[median]:.2f}"),
            Column("goal", "{goal[ratio]:g}"),
            Column("", "{verdict}", text=True),
        ),
        expected=(*BY_CELL, TOGETHER, TOGETHER_TRAINED),
        wanted=_matrix_goals(device),
    )


def _matrix_goals(device: str) -> dict[str, dict[str, Any]]:
    """Only what was measured, and did the same, is asked to be faster."""
    if device != "cpu":
        return {}
    return {TOGETHER: {"goal": {"ratio": MATRIX_GOAL, "against": [ALONE]}}}


def learning_sheet(title: str, modes: Sequence[str]) -> Sheet:
    """The empty table of what ways of training teach."""
    return Sheet(
        title=title,
        first="training",
        columns=(
            Column("top-1 %", "{top1_mean:.2f}"),
            Column("seeds", "{n}"),
            *(column for name in COMPARED_WITH for column in _difference_columns(name)),
        ),
        expected=modes,
    )


def _difference_columns(name: str) -> tuple[Column, Column]:
    found = f"against[{name}]"
    interval = f"{{{found}[mean]:+.2f}} ({{{found}[low]:+.2f}} to {{{found}[high]:+.2f}})"
    return (
        Column(f"minus {name} (95 %)", interval),
        Column("verdict", f"{{{found}[verdict]}}", text=True),
    )


def expected_tables() -> list[tuple[str, str, Sequence[Table]]]:
    """Benchmark, device and tables of all that should be measured, in the report's order."""
    tables: list[tuple[str, str, Sequence[Table]]] = []
    for device in GOALS:
        tables.append((KD_STEP, device, [step_group(pair, device) for pair in PAIRS]))
        tables.append((DATA_PATH, device, [data_group()]))
        if device == "cpu":
            tables.append((MATRIX_COST, device, [matrix_sheet(SHARED_MATRIX, device)]))
        learned = learning_sheet(LEARNING_PAIR, LEARNING_MODES[device])
        tables.append((LEARNING, device, [learned]))
    return tables
