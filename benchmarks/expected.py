"""What the benchmarks should show: contestants and goals of every table, measured or not."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cost_group import CostGroup, Extra
from benchmarks.expected_sheets import (
    LEARNING,
    LEARNING_MODES,
    LEARNING_PAIR,
    MATRIX_COST,
    SHARED_MATRIX,
    learning_sheet,
    matrix_sheet,
)
from benchmarks.floor_group import FloorGroup
from benchmarks.record import Goal, Group, Table

KD_STEP, DATA_PATH = "kd_step", "data_path"
ABLATION, REFERENCE_COST, FLOOR = "ablation", "reference_cost", "floor"

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


ALL_OFF = "everything off"
SWITCHES = ("channels last", "table", "bf16", "compiled")
ALL_BUT_COMPILED, ALL_ON = "all of them but compiled", "all of them"
TF32 = "tf32"

SMALL_PAIR = "resnet14>resnet8"
TINY_PAIR = "resnet14>resnet8_quarter"
"""That of leaderboards/quickstart.yaml, on its 8x8 digits."""

SEEDS = (2, 4, 8)
ALONE = "one seed after another"
WORKERS = (2, 4, 8)
ONE_WORKER = "1 process, all cores"

COMPILED = " compiled"

SOURCES = ("live", "table")
NO_REFERENCE, CONSTANT, TCP = "no reference", "constant weights", "1-TCP weights"
TCP_TABLE = "1-TCP weights, reference from its table"
COST_GOALS = {"live": 5.0, "table": 30.0}
"""At most, percent of a stage's step."""


def techniques_group(pair: str, device: str) -> Group:
    """The empty table of each technique by itself, and of their sum."""
    switches = (*SWITCHES, TF32) if device == "cuda" else SWITCHES
    names = (ALL_OFF, *switches, ALL_BUT_COMPILED, ALL_ON)
    return Group(f"each technique by itself, {pair}", names, (ALL_OFF,))


def seeds_name(count: int) -> str:
    return f"{count} seeds folded"


def seeds_group(pair: str, dataset: str) -> Group:
    """The empty table of seeds trained as one network."""
    names = (ALONE, *map(seeds_name, SEEDS))
    return Group(f"seeds folded into one network, {pair} on {dataset}", names, (ALONE,))


def workers_name(count: int) -> str:
    return f"{count} processes"


def workers_group(pair: str) -> Group:
    """The empty table of processes that share a device."""
    names = (ONE_WORKER, *map(workers_name, WORKERS))
    return Group(f"processes on one device, {pair}", names, (ONE_WORKER,))


def cost_group(pair: str) -> CostGroup:
    """The empty table of what the reference costs in a later stage of one pair."""
    extras: dict[str, Extra] = {}
    for source, kinds in (("live", (CONSTANT, TCP)), ("table", (CONSTANT, TCP, TCP_TABLE))):
        over = cost_name(source, NO_REFERENCE)
        extras |= {cost_name(source, kind): Extra(over, COST_GOALS[source]) for kind in kinds}
    names = [cost_name(source, kind) for source in SOURCES for kind in _cost_kinds(source)]
    return CostGroup(f"reference in a later stage, {pair}", names, extras)


def cost_name(source: str, kind: str) -> str:
    """A stage whose teacher is live or in its table, with a kind of reference."""
    return f"teacher {source}, {kind}"


def _cost_kinds(source: str) -> tuple[str, ...]:
    kinds = (NO_REFERENCE, CONSTANT, TCP)
    return (*kinds, TCP_TABLE) if source == "table" else kinds


def floor_group(pair: str, device: str) -> FloorGroup:
    """The empty table of a step's least time and its time."""
    precisions = ("fp32", "tf32", "bf16") if device == "cuda" else ("fp32", "bf16")
    names = [floor_name(p, source) for p in precisions for source in SOURCES]
    compiled = [floor_name("bf16", source, True) for source in SOURCES]
    return FloorGroup(f"least time of a step, {pair}", [*names, *compiled])


def floor_name(precision: str, source: str, compiled: bool = False) -> str:
    """A kind of step."""
    return f"{precision} {source}{COMPILED if compiled else ''}"


def ablation_groups(pair: str, small_pair: str, device: str) -> list[Group]:
    """The empty tables of the ablation."""
    return [
        techniques_group(pair, device),
        seeds_group(small_pair, "CIFAR-100"),
        seeds_group(TINY_PAIR, "digits"),
        workers_group(small_pair),
    ]


def expected_tables() -> list[tuple[str, str, Sequence[Table]]]:
    """Benchmark, device and tables of all that should be measured, in the report's order."""
    tables: list[tuple[str, str, Sequence[Table]]] = []
    for device in GOALS:
        tables.append((KD_STEP, device, [step_group(pair, device) for pair in PAIRS]))
        tables.append((DATA_PATH, device, [data_group()]))
        tables.append((ABLATION, device, ablation_groups(PAIRS[0], SMALL_PAIR, device)))
        tables.append((REFERENCE_COST, device, [cost_group(pair) for pair in PAIRS]))
        tables.append((FLOOR, device, [floor_group(PAIRS[0], device)]))
        if device == "cpu":
            tables.append((MATRIX_COST, device, [matrix_sheet(SHARED_MATRIX, device)]))
        learned = learning_sheet(LEARNING_PAIR, LEARNING_MODES[device])
        tables.append((LEARNING, device, [learned]))
    return tables
