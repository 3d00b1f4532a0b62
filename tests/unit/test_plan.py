"""Cells and the graph under them: what is shared, in which order, and how fast it is planned."""

import time

import pytest
from matrices import PAIR, load, plan_of, specs
from smskd_bench.cost import network_cost, plan_cost, stage_macs
from smskd_bench.plan import make_plan, merge

from smskd.errors import ConfigError

PAIRS = [
    {"teacher": "resnet14_half", "student": "resnet8_quarter"},
    {"teacher": "resnet20", "student": "resnet8_quarter"},
    {"teacher": "resnet20", "student": "resnet8_half", "lr": 0.02},
]
ROWS = [
    ["scratch"],
    ["kd"],
    ["fitnet", "kd"],
    {"stages": ["fitnet", "kd"], "name": "no reference", "reference": None},
    ["fitnet", "sp", "kd"],
    {"stages": [["fitnet", "kd"]], "name": "two words"},
]


def cells_of(plan, row, pair=None):
    return [c for c in plan.cells if c.row == row and pair in (None, c.pair)]


# -------------------------------------------------------------------------------------- the cells


def test_every_pair_row_and_seed_is_a_cell_in_the_order_of_the_file():
    plan = plan_of(pairs=PAIRS, rows=ROWS, seeds=[3, 1])
    names = [cell.name for cell in plan.cells]
    assert len(names) == len(set(names)) == 3 * 6 * 2
    assert names[:3] == [f"{PAIR}/scratch/s3", f"{PAIR}/scratch/s1", f"{PAIR}/kd/s3"]
    assert names[-1] == "resnet20>resnet8_half/two words/s1"


def test_a_cell_has_a_key_for_each_stage():
    plan = plan_of(rows=ROWS)
    assert [len(cell.stages) for cell in plan.cells] == [1, 1, 2, 2, 3, 1]


def test_only_of_a_row():
    rows = [["kd"], {"stages": ["at"], "only": ["resnet20>resnet8_quarter", PAIR]}]
    plan = plan_of(pairs=PAIRS, rows=rows)
    assert [c.pair for c in cells_of(plan, "at")] == [PAIR, "resnet20>resnet8_quarter"]
    assert len(cells_of(plan, "kd")) == 3


def test_planning_is_repeatable():
    loaded = load(pairs=PAIRS, rows=ROWS, seeds=[0, 1])
    one, two = make_plan(loaded), make_plan(loaded)
    assert one.cells == two.cells
    assert list(one.nodes.items()) == list(two.nodes.items())


# ------------------------------------------------------------------------------------- the stages


def test_numbers_epochs_and_parents_along_a_sequence():
    plan = plan_of(rows=[["fitnet", "sp", "kd"]], recipe={"epochs": [5, 3, 2]})
    first, second, third = specs(plan, "fitnet>sp>kd")
    assert [s.number for s in (first, second, third)] == [1, 2, 3]
    assert [s.training.epochs for s in (first, second, third)] == [5, 3, 2]
    assert [s.first_epoch for s in (first, second, third)] == [0, 5, 8]
    assert (first.parent, second.parent, third.parent) == (None, first.key, second.key)
    assert [s.methods[0].name for s in (first, second, third)] == ["fitnet", "sp", "kd"]
    assert {s.teachers for s in (first, second, third)} == {(plan.cells[0].teacher,)}


def test_a_stages_own_epochs_count_for_what_comes_after():
    rows = [
        {
            "stages": ["fitnet", {"method": "sp", "epochs": 9}, "kd"],
            "name": "r",
            "epochs": {"total": 7},
        }
    ]
    stages = specs(plan_of(rows=rows), "r")
    assert [s.training.epochs for s in stages] == [3, 9, 2]
    assert [s.first_epoch for s in stages] == [0, 3, 12]


def test_the_reference_starts_with_the_second_stage():
    stages = specs(plan_of(rows=[["fitnet", "sp", "kd"]]), "fitnet>sp>kd")
    assert [s.reference is not None for s in stages] == [False, True, True]


def test_a_reference_of_the_second_stage_only():
    rows = [
        {
            "stages": ["fitnet", {"method": "sp", "reference": {"weight": 2}}, "kd"],
            "name": "r",
            "reference": None,
        }
    ]
    stages = specs(plan_of(rows=rows), "r")
    assert [s.reference and s.reference.weight for s in stages] == [None, 2.0, None]


def test_later_stages_have_a_schedule_of_their_own():
    stages = specs(plan_of(rows=[["fitnet", "sp", "kd"]]), "fitnet>sp>kd")
    assert [s.training.schedule.start for s in stages] == [1.0, 0.1, 0.1]


def test_the_rate_of_a_pair_is_its_students_in_every_stage_and_not_its_teachers():
    plan = plan_of(pairs=PAIRS, rows=[["fitnet", "kd"]])
    rates = [[s.training.optimizer.lr for s in specs(plan, "fitnet>kd", pair)] for pair in range(3)]
    assert rates == [[0.05, 0.05], [0.05, 0.05], [0.02, 0.02]]
    teacher = plan.nodes[plan.cells[2].teacher]
    assert (teacher.model, teacher.training.optimizer.lr) == ("resnet20", 0.05)


def test_teachers_train_plainly_under_the_recipe_but_for_what_is_said():
    plan = plan_of(
        teacher={"epochs": 9, "seed": 4, "lr": 0.1, "schedule": {"kind": "cosine"}},
        recipe={
            "epochs": [2],
            "batch_size": 32,
            "precision": "bf16",
            "optimizer": {"momentum": 0.8},
        },
    )
    teacher = plan.nodes[plan.cells[0].teacher]
    assert (teacher.model, teacher.seed, teacher.number, teacher.parent) == (
        "resnet14_half",
        4,
        1,
        None,
    )
    assert [m.name for m in teacher.methods] == ["scratch"]
    assert (teacher.training.epochs, teacher.training.batch_size) == (9, 32)
    assert (teacher.training.precision, teacher.training.schedule.kind) == ("bf16", "cosine")
    assert (teacher.training.optimizer.lr, teacher.training.optimizer.momentum) == (0.1, 0.8)
    assert teacher.teachers == ()


# ---------------------------------------------------------------------------------------- sharing


def test_equal_beginnings_are_trained_once():
    plan = plan_of(rows=ROWS)
    sequence, free, three = (
        next(iter(cells_of(plan, row))) for row in ("fitnet>kd", "no reference", "fitnet>sp>kd")
    )
    assert sequence.stages[0] == free.stages[0] == three.stages[0]
    assert len({sequence.stages[1], free.stages[1], three.stages[1]}) == 3
    # Teacher, and of the rows: 1 + 1 + (1 + 1) + 1 + 2 + 1.
    assert len(plan.nodes) == 9
    assert plan.stages_before_sharing() == sum(len(c.stages) + 1 for c in plan.cells) == 16


def test_the_plain_student_is_shared_between_teachers_and_the_distilled_one_is_not():
    plan = plan_of(pairs=PAIRS, rows=ROWS)
    plain = cells_of(plan, "scratch")
    assert plain[0].stages == plain[1].stages != plain[2].stages
    assert len({c.stages for c in cells_of(plan, "kd")}) == 3


def test_one_teacher_for_all_pairs_and_seeds():
    plan = plan_of(pairs=PAIRS, rows=ROWS, seeds=[0, 1, 2])
    assert len({c.teacher for c in plan.cells}) == 2
    assert {plan.nodes[c.teacher].seed for c in plan.cells} == {0}


def test_a_teacher_for_each_seed():
    plan = plan_of(rows=ROWS, seeds=[0, 1, 2], teacher={"epochs": 3, "seed": None})
    assert len({c.teacher for c in plan.cells}) == 3
    assert all(plan.nodes[c.teacher].seed == c.seed for c in plan.cells)


def test_seeds_share_nothing_but_the_teacher():
    plan = plan_of(rows=ROWS, seeds=[0, 1])
    one, other = ({k for c in plan.cells if c.seed == s for k in c.stages} for s in (0, 1))
    assert not one & other


def test_what_a_stage_depends_on_comes_first():
    plan = plan_of(pairs=PAIRS, rows=ROWS, seeds=[0, 1], teacher={"epochs": 3, "seed": None})
    seen = set()
    for key, spec in plan.nodes.items():
        assert spec.key == key
        assert set(spec.depends_on) <= seen
        seen.add(key)
    used = {k for c in plan.cells for k in (*c.stages, c.teacher)}
    assert used == seen


# ----------------------------------------------------------------------------------------- --only


ONLY = [
    ("kd", ["kd", "fitnet>kd", "fitnet>sp>kd"]),
    ("/kd/", ["kd"]),
    (f"{PAIR}/kd/s0", ["kd"]),
    ("no reference", ["no reference"]),
    ("two w", ["two words"]),
    ("fitnet>*kd/s0", ["fitnet>kd", "fitnet>sp>kd"]),
    ("fitnet>??>kd", ["fitnet>sp>kd"]),
    ("*", ["scratch", "kd", "fitnet>kd", "no reference", "fitnet>sp>kd", "two words"]),
    ("", ["scratch", "kd", "fitnet>kd", "no reference", "fitnet>sp>kd", "two words"]),
    ("resnet14*/scratch", ["scratch"]),
    ("/s[02]/", None),
    ("KD", None),
    ("s1", None),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "rows"), ONLY)
def test_patterns(pattern, rows):
    if rows is None:
        with pytest.raises(ConfigError, match="no cell matches") as caught:
            plan_of(only=pattern, rows=ROWS)
        assert repr(pattern) in caught.value.message
        assert caught.value.hint
    else:
        assert [cell.row for cell in plan_of(only=pattern, rows=ROWS).cells] == rows


def test_brackets_in_a_name():
    rows = [{"stages": ["kd"], "name": "kd [soft]"}, {"stages": ["at"], "name": "kd s"}]
    plan = plan_of(only=f"{PAIR}/kd [soft]/s0", rows=rows)
    assert [cell.row for cell in plan.cells] == ["kd [soft]"]
    assert [cell.row for cell in plan_of(only="kd [soft]", rows=rows).cells] == ["kd [soft]"]


def test_chosen_cells_bring_their_teacher_and_earlier_stages():
    whole = plan_of(rows=ROWS, seeds=[0, 1])
    plan = plan_of(only="fitnet>kd/s1", rows=ROWS, seeds=[0, 1])
    (cell,) = plan.cells
    assert set(plan.nodes) == {cell.teacher, *cell.stages}
    assert cell in whole.cells


def test_a_pattern_that_matches_nothing_names_the_nearest_cells_and_is_short():
    with pytest.raises(ConfigError) as caught:
        plan_of(only=f"{PAIR}/fitnt>kd/s0", rows=ROWS, seeds=list(range(50)))
    assert f"did you mean '{PAIR}/fitnet>kd/s0'" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        plan_of(only="qqqq", rows=ROWS, seeds=list(range(50)), pairs=PAIRS)
    assert len(str(caught.value)) < 400
    assert f"{PAIR}/scratch/s0" in str(caught.value)


def test_a_suggestion_is_a_cell_that_exists():
    rows = [["kd"], {"stages": ["at"], "only": [PAIR]}]
    with pytest.raises(ConfigError) as caught:
        plan_of(only="resnet20>resnet8_quarter/at/s0", rows=rows, pairs=PAIRS)
    assert "'resnet20>resnet8_quarter/at/s0'" not in caught.value.hint


# ------------------------------------------------------------------------------- imported weights


def test_imported_teachers_are_not_trained(tmp_path):
    file = tmp_path / "t.safetensors"
    file.write_bytes(b"weights")
    plan = plan_of(teacher={"weights": {"resnet14_half": str(file)}}, pairs=PAIRS, rows=[["kd"]])
    teacher = plan.nodes[plan.cells[0].teacher]
    assert plan.weights == {teacher.key: file}
    assert teacher.training.epochs == 0
    assert len(teacher.imported) == 64
    assert teacher.label == "resnet14_half imported s0 stage 1"
    trained = plan.nodes[plan.cells[1].teacher]
    assert (trained.imported, trained.training.epochs) == (None, 240)


def test_an_imported_teacher_is_one_for_all_seeds(tmp_path):
    file = tmp_path / "t.safetensors"
    file.write_bytes(b"weights")
    plan = plan_of(
        teacher={"seed": None, "weights": {"resnet14_half": str(file)}}, seeds=[0, 1], rows=[["kd"]]
    )
    assert len({cell.teacher for cell in plan.cells}) == 1


def test_weights_of_a_model_that_is_no_teacher_are_not_read(tmp_path):
    file = tmp_path / "t.safetensors"
    file.write_bytes(b"weights")
    assert plan_of(teacher={"weights": {"resnet110": str(file)}}).weights == {}


# ------------------------------------------------------------------------------------------- cost


def test_cost_before_and_after_sharing():
    plan = plan_of(rows=ROWS, seeds=[0, 1])
    cost = plan_cost(plan, set())
    assert (cost.cells, cost.stages, cost.stages_before) == (12, len(plan.nodes), 32)
    assert cost.stages_before == plan.stages_before_sharing()
    assert cost.epochs == sum(s.training.epochs for s in plan.nodes.values())
    # Alone, each of the 12 cells has a teacher of 3 epochs, and 2 + 2 + 3 + 3 + 4 + 2 of its own.
    assert cost.epochs_before == 12 * 3 + 2 * 16
    assert cost.macs < cost.macs_before
    assert (cost.done, cost.epochs_left, cost.macs_left) == (0, cost.epochs, cost.macs)


def test_cost_of_what_is_left():
    plan = plan_of(rows=ROWS)
    done = set(list(plan.nodes)[:4])
    cost = plan_cost(plan, done)
    assert cost.done == 4
    assert cost.epochs_left == sum(
        s.training.epochs for k, s in plan.nodes.items() if k not in done
    )
    everything = plan_cost(plan, set(plan.nodes))
    assert (everything.epochs_left, everything.macs_left) == (0, 0)


def test_macs_of_a_stage():
    plan = plan_of(
        rows=[["scratch"], ["fitnet", "kd"]],
        dataset={"name": "digits", "train_size": 200, "dev_size": 50},
    )
    student = network_cost("resnet8_quarter", "digits").macs
    teacher = network_cost("resnet14_half", "digits").macs
    (plain,) = specs(plan, "scratch")
    first, second = specs(plan, "fitnet>kd")
    test = student * 797
    assert stage_macs(plain, plan) == 2 * 200 * 3 * student + test
    assert stage_macs(first, plan) == 2 * 200 * (3 * student + teacher) + test
    assert stage_macs(second, plan) == 1 * 200 * (4 * student + teacher) + test


def test_a_development_split_is_missing_in_training():
    (spec,) = specs(
        plan_of(rows=[["scratch"]], dataset={"name": "digits", "dev_size": 100}), "scratch"
    )
    student = network_cost("resnet8_quarter", "digits").macs
    plan = plan_of(rows=[["scratch"]], dataset={"name": "digits", "dev_size": 100})
    assert stage_macs(spec, plan) == student * (2 * 900 * 3 + 797)


# ------------------------------------------------------------------------------------------ merge


def test_merge():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merge(base, {"b": {"d": {"f": 4}}}) == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}}
    assert merge(base, {"b": 5}) == {"a": 1, "b": 5}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


# ------------------------------------------------------------------------------------------ speed


def test_ten_thousand_cells(capsys):
    students = ["resnet8", "resnet14", "resnet20", "resnet32", "wrn_16_1"]
    pairs = [{"teacher": t, "student": s} for t in ("resnet110", "resnet56") for s in students]
    single = ["scratch", "kd", "fitnet", "at", "sp", "rkd", "dkd"]
    firsts = single[2:]
    rows = [[m] for m in single]
    rows += [[m, "kd"] for m in firsts] + [[m, "at", "dkd"] for m in firsts]
    rows += [{"stages": [m, "kd"], "name": f"{m} alone", "reference": None} for m in firsts[:3]]
    assert len(rows) == 20
    began = time.perf_counter()
    loaded = load(pairs=pairs, rows=rows, seeds=list(range(50)), dataset={"name": "cifar100"})
    plan = make_plan(loaded)
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n10,000 cells, {len(plan.nodes):,} stage runs planned in {seconds:.2f} s")
    assert len(plan.cells) == 10_000
