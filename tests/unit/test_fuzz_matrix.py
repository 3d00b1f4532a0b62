"""Whatever a matrix file or a target profile holds: a plan, or one message that can be printed."""

import json
import random
from pathlib import Path

import pytest
import yaml
from matrices import content
from mutations import HARD, is_clean, mutate_bytes, mutate_lines, mutate_record
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_export.targets import load_target

from smskd.errors import SmskdError

ROOT = Path(__file__).parents[2]
MATRICES = (p for p in (ROOT / "leaderboards").glob("*.yaml") if p.name != "claims.yaml")
SHIPPED = sorted(MATRICES, key=lambda path: path.stat().st_size)
PROFILES = sorted((ROOT / "export" / "smskd_export" / "targets").glob("*.yaml"))
KEYS = (
    "name", "dataset", "pairs", "seeds", "rows", "recipe", "teacher", "reference", "methods", "assistants", "plugins",
    "stages", "method", "epochs", "total", "per_stage", "weight", "modifiers", "settings", "weights", "controls", "only",
    "schema", "student", "lr", "milestones", "kind",
)  # fmt: skip


def document(draw):
    """A whole document with some of its entries changed, in YAML."""
    full = content(
        reference={"weight": 1.0, "weighting": {"map": "one_minus"}}, seeds=[0, 1],
        assistants={"middle": {"model": "resnet14", "stages": ["kd"]}},
        methods={"hot": {"method": "kd", "settings": {"temperature": 8.0}, "modifiers": ["logit_standardisation"]}},
        rows=[["kd"], {"stages": [{"method": "hot", "teacher": "middle"}, "kd"], "epochs": {"total": 4}, "controls": ["kd"]}],
        teacher={"epochs": 3, "weights": {"resnet14_half": "none.pth"}},
    )  # fmt: skip
    return yaml.safe_dump(mutate_record(draw, full), allow_unicode=draw.random() < 0.5)


def grown(draw, depth=0):
    """A document that was never a matrix."""
    kind = draw.random()
    if depth > 4 or kind < 0.4:
        return draw.choice(HARD)
    count = draw.randint(0, 4)
    if kind < 0.6:
        return [grown(draw, depth + 1) for _ in range(count)]
    return {draw.choice(KEYS): grown(draw, depth + 1) for _ in range(count)}


def example(draw):
    """Bytes of one file: a shipped matrix that was damaged, or something made up."""
    kind = draw.random()
    if kind < 0.35:
        return document(draw).encode("utf-8", "surrogatepass")
    if kind < 0.45:
        return json.dumps(grown(draw)).encode()
    source = SHIPPED[0] if draw.random() < 0.9 else draw.choice(SHIPPED[1:4])
    data = source.read_bytes()
    if draw.random() < 0.5:
        return mutate_bytes(draw, data)
    return mutate_lines(draw, data.decode()).encode("utf-8", "surrogatepass")


def check_matrices(folder, count, start=0):
    """Load ``count`` damaged files; returns how many were refused."""
    file, refused = folder / "m.yaml", 0
    for seed in range(start, start + count):
        file.write_bytes(example(random.Random(seed)))
        try:
            plan = make_plan(load_matrix(file))
            answer = " ".join(cell.name for cell in plan.cells)
        except SmskdError as error:
            answer, refused = str(error), refused + 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}") from error
        assert is_clean(answer), f"seed {seed}: {answer!r}"
    return refused


def check_profiles(folder, count):
    refused, file = 0, folder / "t.yaml"
    for seed in range(count):
        draw = random.Random(seed)
        data = draw.choice(PROFILES).read_bytes()
        text = mutate_lines(draw, data.decode()).encode("utf-8", "surrogatepass")
        file.write_bytes(text if draw.random() < 0.6 else mutate_bytes(draw, data))
        try:
            said = load_target(file).name
        except SmskdError as error:
            said, refused = str(error), refused + 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}") from error
        assert is_clean(said), f"seed {seed}: {said!r}"
    return refused


def test_fuzz_matrices(tmp_path):
    assert 50 < check_matrices(tmp_path, 200) < 200


def test_fuzz_profiles(tmp_path):
    assert 50 < check_profiles(tmp_path, 200) < 200


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_ten_thousand_matrices(tmp_path):
    assert 4000 < check_matrices(tmp_path, 10_000) < 10_000


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_ten_thousand_profiles(tmp_path):
    assert 2000 < check_profiles(tmp_path, 10_000) < 10_000
