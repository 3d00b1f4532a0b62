"""What the benchmarks should show: contestants and goals of every table, measured or not."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.record import Goal, Group

KD_STEP, DATA_PATH = "kd_step", "data_path"

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


def expected_tables() -> list[tuple[str, str, Sequence[Group]]]:
    """Benchmark, device and tables of all that should be measured, in the report's order."""
    tables: list[tuple[str, str, Sequence[Group]]] = []
    for device in GOALS:
        tables.append((KD_STEP, device, [step_group(pair, device) for pair in PAIRS]))
        tables.append((DATA_PATH, device, [data_group()]))
    return tables
