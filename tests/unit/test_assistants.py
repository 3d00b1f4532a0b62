"""Networks that are trained to teach: chains, generations, several teachers, in one plan."""

import pytest
import torch
from matrices import PAIR, load, plan_of, specs
from smskd_bench.plan import make_plan
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions, Worker

from smskd.errors import ConfigError

ASSISTANTS = {
    "middle": {"model": "resnet8_half", "stages": ["fitnet", "kd"], "epochs": [3, 2], "lr": 0.01},
    "second": {"model": "student", "stages": ["kd"], "seed_shift": 1000},
    "third": {"model": "student", "stages": [{"method": "kd", "teacher": "second"}], "seed_shift": 2000},
}  # fmt: skip
ROWS = [
    {"name": "takd", "stages": [{"method": "kd", "teacher": "middle"}]},
    {"name": "ban", "stages": [{"method": "kd", "teacher": "third"}]},
    {"name": "both", "stages": [{"method": "kd", "teacher": ["pair", "middle"]}, "at"]},
    {"name": "none", "stages": [{"method": "scratch", "teacher": "middle"}]},
]


@pytest.fixture(scope="module")
def plan():
    return plan_of(assistants=ASSISTANTS, rows=ROWS, seeds=[0, 1])


def test_a_stage_is_taught_by_the_assistant_and_the_assistant_by_the_pairs_teacher(plan):
    (student,) = specs(plan, "takd", seed=0)
    (middle,) = (plan.nodes[key] for key in student.teachers)
    first = plan.nodes[middle.parent]
    assert (middle.model, middle.seed, middle.number) == ("resnet8_half", 0, 2)
    assert [s.training.epochs for s in (first, middle)] == [3, 2]
    assert first.training.optimizer.lr == 0.01
    teacher = plan.nodes[first.teachers[0]]
    assert (teacher.model, teacher.methods[0].name) == ("resnet14_half", "scratch")
    assert middle.teachers == first.teachers


def test_generations_are_the_same_network_with_other_seeds(plan):
    (student,) = specs(plan, "ban", seed=1)
    third = plan.nodes[student.teachers[0]]
    second = plan.nodes[third.teachers[0]]
    assert [s.model for s in (second, third, student)] == ["resnet8_quarter"] * 3
    assert [s.seed for s in (second, third, student)] == [1001, 2001, 1]
    assert plan.nodes[second.teachers[0]].model == "resnet14_half"


def test_several_teachers_in_the_order_they_are_named(plan):
    first, second = specs(plan, "both", seed=0)
    assert [plan.nodes[key].model for key in first.teachers] == ["resnet14_half", "resnet8_half"]
    assert [plan.nodes[key].model for key in second.teachers] == ["resnet14_half"]


def test_what_reads_no_teacher_needs_no_assistant(plan):
    cell = next(c for c in plan.cells if c.row == "none")
    assert cell.assistants == ()
    assert specs(plan, "none", seed=0)[0].teachers == ()


def test_assistants_are_shared_and_count_for_each_cell_alone(plan):
    cells = [c for c in plan.cells if c.seed == 0 and c.row in ("takd", "both")]
    assert cells[0].assistants == cells[1].assistants
    assert len(cells[0].assistants) == 2
    assert cells[0].everything == (*cells[0].teachers, *cells[0].assistants, *cells[0].stages)
    order = list(plan.nodes)
    for key, spec in plan.nodes.items():
        assert all(order.index(before) < order.index(key) for before in spec.depends_on)


def test_a_plan_without_assistants_has_the_keys_it_had():
    plain = plan_of(rows=[["kd"]])
    listed = plan_of(
        rows=[{"name": "kd", "stages": [{"method": "kd", "teacher": "pair"}]}],
        pairs=[{"teacher": ["resnet14_half"], "student": "resnet8_quarter"}],
        assistants=ASSISTANTS,
    )
    assert list(plain.nodes) == list(listed.nodes)
    assert [c.pair for c in plain.cells] == [c.pair for c in listed.cells] == [PAIR]


def test_a_pair_of_several_teachers():
    pair = {"teacher": ["resnet14_half", "resnet8_half"], "student": "resnet8_quarter"}
    plan = plan_of(pairs=[pair], rows=[["mt_pkdot"], ["scratch"]])
    (spec,) = specs(plan, "mt_pkdot")
    assert plan.cells[0].pair == "resnet14_half+resnet8_half>resnet8_quarter"
    assert spec.teachers == plan.cells[0].teachers
    assert len(spec.teachers) == 2


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"assistants": {"a": {"model": "resnt8", "stages": ["kd"]}}}, "unknown model 'resnt8'"),
        ({"assistants": {"a": {"model": "student", "stages": ["kdd"]}}}, "unknown method 'kdd'"),
        ({"assistants": {"a": {"model": "student", "stages": []}}}, "give at least one stage"),
        ({"assistants": {"pair": {"model": "student", "stages": ["kd"]}}}, "stands for the pair's"),
        ({"rows": [{"stages": [{"method": "kd", "teacher": "midle"}]}]}, "no assistant is named 'midle'; did you mean 'middle'"),
        ({"rows": [{"stages": [{"method": "kd", "teacher": []}]}]}, "leave it out"),
        ({"assistants": {"a": {"model": "student", "stages": [{"method": "kd", "teacher": "b"}]}, "b": {"model": "student", "stages": [{"method": "kd", "teacher": "a"}]}}}, "teaches itself: a -> b -> a"),
        ({"pairs": [{"teacher": ["resnet20", "resnet20"], "student": "resnet8"}]}, "the same teacher twice"),
        ({"pairs": [{"teacher": [], "student": "resnet8"}]}, "name at least one model"),
        ({"assistants": {"a": {"model": "student", "stages": ["kd"], "seed_shift": -1}}}, "0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(entries, problem):
    with pytest.raises(ConfigError) as caught:
        load(**{"assistants": ASSISTANTS, **entries})
    assert problem in str(caught.value)


def test_a_chain_is_trained_in_order(tmp_path):
    plan = make_plan(
        load(
            assistants=ASSISTANTS, rows=ROWS[1:3], recipe={"epochs": [1]}, teacher={"epochs": 1},
            dataset={"name": "digits", "train_size": 100},
        )
    )  # fmt: skip
    worker = Worker(Store.open(tmp_path), RunOptions(threads=1))
    for spec in plan.nodes.values():
        worker.run(spec, lambda spec, row: None)
    generations = specs(plan, "ban")
    generations += [plan.nodes[generations[0].teachers[0]]]
    weights = [worker.store.weights(spec.key)["fc.weight"] for spec in generations]
    assert not torch.equal(*weights)
