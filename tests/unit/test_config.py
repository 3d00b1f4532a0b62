"""Matrix files: every mistake at once, with its line; short forms; what overrides what."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrices import FILE, PAIR, content, load, load_text, plan_of, specs
from smskd_bench.config import load_matrix
from smskd_bench.naming import cell_name, row_name
from smskd_bench.plan import make_plan

from smskd.errors import ConfigError, SmskdError
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.settings import LATER_STAGES, Schedule


def problems(text, file=FILE):
    """The listing as a list of lines; the last one counts them."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, file)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def problems_of(**entries):
    return problems(yaml.safe_dump(content(**entries), sort_keys=False))


def one_problem(**entries):
    """The only complaint, without file and line."""
    lines = problems_of(**entries)
    assert len(lines) == 2, lines
    return lines[0].split(": ", 1)[1]


# ---------------------------------------------------------------------------------- many at once

MANY = """\
name: many
dataset: {name: digitz}
pairs:
  - {teacher: resnet56, student: resnt20}
  - {teacher: resnet20, student: resnet8, lr: -0.1, lrr: 3}
seeds: [0, 1, 0]
recipe:
  epochs: [240, 0]
  batch_size: true
  precision: no
  optimizer: {lr: "0.1", momentum: 1.5, weigth_decay: 1}
  first_stage: {kind: cosin, milestones: [0.5]}
  later_stages: {milestones: [0.9, 0.5]}
teacher: {epochs: -3, sed: 1}
reference: {weight: .nan, weighting: {map: tpc, temprature: 2}}
methods:
  strong: {method: kdd}
  warm: {method: kd, settings: {temprature: 2, weight: "9"}}
  cold: {method: kd, settings: {temperature: -4}}
  odd: {method: kd, modifiers: [logit_standardization, {name: logit_standardisation, x: 1}]}
  kd: {method: kd}
rows:
  - [kd]
  - [kd]
  - {stages: [kd, fitnett], name: a, controls: [kdd, a]}
  - {stages: [], name: b}
  - {stages: [kd], name: c, epoch: 30}
  - {stages: [kd, dkd], name: d, epochs: {total: 1}}
  - {stages: [kd], name: e, epochs: [1, 2]}
  - {stages: [{method: kd, carry: best_on_dev}], name: f}
  - {stages: [{method: kd, reference: {wieght: 1}}], name: g, reference: {temperature: 0}}
  - {stages: [[kd, kd]], name: h, only: [resnet20>resnet9]}
  - {stages: [{method: kd, schedule: {kind: step, start: 0, gamma: -1}}], name: i}
  - {stages: [{method: kd, ce_weight: -1}], name: j, note: 3}
evaluate_every: -1
plugns: []
"""

EXPECTED = [
    (2, "dataset.name: unknown dataset 'digitz'; did you mean 'digits'?"),
    (4, "pairs[0].student: unknown model 'resnt20'; did you mean 'resnet20'"),
    (5, "pairs[1].lr: must be above 0, but it is -0.1"),
    (5, "pairs[1].lrr: unknown key; did you mean 'lr'?"),
    (6, "seeds[2]: 0 is there twice"),
    (8, "recipe.epochs[1]: must be above 0, but it is 0"),
    (9, "recipe.batch_size: input should be a valid integer, but it is true"),
    (10, "recipe.precision: input should be 'fp32', 'tf32' or 'bf16', but it is \"no\""),
    (11, 'recipe.optimizer.lr: input should be a valid number, but it is "0.1"'),
    (11, "recipe.optimizer.momentum: must be in [0, 1), but it is 1.5"),
    (11, "recipe.optimizer.weigth_decay: unknown key; did you mean 'weight_decay'?"),
    (12, "recipe.first_stage.kind: input should be 'step', 'cosine' or 'constant'"),
    (13, "recipe.later_stages.milestones: are fractions of the stage, rising"),
    (14, "teacher.epochs: must be above 0, but it is -3"),
    (14, "teacher.sed: unknown key; did you mean 'seed' or 'schedule'?"),
    (15, "reference.weight: input should be a finite number, but it is NaN"),
    (15, "reference.weighting.map: input should be 'one_minus_tcp', 'tcp', 'constant'"),
    (15, "reference.weighting.temprature: unknown key; did you mean 'temperature'?"),
    (17, "methods.strong.method: unknown method 'kdd'; did you mean 'kd' or 'kdsvd' or 'rkd'?"),
    (18, "methods.warm.settings.temprature: unknown key; did you mean 'temperature'?"),
    (18, 'methods.warm.settings.weight: input should be a valid number, but it is "9"'),
    (19, "methods.cold.settings: kd: temperature must be above 0, but it is -4"),
    (20, "methods.odd.modifiers[0]: unknown modifier 'logit_standardization'; did you mean 'logit_standardisation'"),
    (20, "methods.odd.modifiers[1].x: unknown key; there are none here"),
    (21, "methods.kd: 'kd' is a registered method; give the variant another name"),
    (24, "rows[1]: 'kd' is there twice; give one of them another name"),
    (25, "rows[2].stages[1]: unknown method 'fitnett'; did you mean 'fitnet'"),
    (25, "rows[2].controls[0]: no row is named 'kdd'; did you mean 'kd'"),
    (25, "rows[2].controls[1]: a row cannot be its own control"),
    (26, "rows[3].stages: is empty; give at least one stage"),
    (27, "rows[4].epoch: unknown key; did you mean 'epochs'?"),
    (28, "rows[5].epochs: 1 epochs cannot be split over 2 stages"),
    (29, "rows[6].epochs: 2 entries for 1 stages"),
    (30, "rows[7].stages[0].carry: best_on_dev needs a development split; set dataset.dev_size"),
    (31, "rows[8].stages[0].reference.wieght: unknown key; did you mean 'weight'"),
    (31, "rows[8].reference.temperature: must be above 0, but it is 0.0"),
    (32, "rows[9].stages[0].method: the same method twice in one joint stage"),
    (32, "rows[9].only[0]: no pair 'resnet20>resnet9'; did you mean 'resnet20>resnet8'"),
    (33, "rows[10].stages[0].schedule.start: must be above 0, but it is 0.0"),
    (33, "rows[10].stages[0].schedule.gamma: must be above 0, but it is -1.0"),
    (34, "rows[11].stages[0].ce_weight: must be 0 or more, but it is -1.0"),
    (34, "rows[11].note: input should be a valid string, but it is 3"),
    (35, "evaluate_every: must be 0"),
    (36, "plugns: unknown key; did you mean 'plugins'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def listing():
    return problems(MANY)


@pytest.mark.parametrize(("line", "text"), EXPECTED)
def test_every_mistake_is_in_the_listing_with_its_line(listing, line, text):
    assert any(found.startswith(f"{FILE}:{line}: {text}") for found in listing), "\n".join(listing)


def test_the_listing_is_in_the_order_of_the_file_and_counted(listing):
    *found, last = listing
    lines = [int(line.split(":")[1]) for line in found]
    assert lines == sorted(lines)
    assert last == f"  -> {len(found)} problems in {FILE}; nothing was run"
    assert len(found) == len(set(found)) == len(EXPECTED), "\n".join(found)


def test_one_problem_is_no_plural():
    assert problems_of(name=3)[-1] == f"  -> 1 problem in {FILE}; nothing was run"


# ------------------------------------------------------------------------------------ one at a time

WRONG_VALUES = [
    ({"name": ""}, "name: is empty"),
    ({"name": "a\nb"}, "name: must be one line"),
    ({"seeds": []}, "seeds: is empty; give at least one"),
    ({"seeds": [-1]}, "seeds[0]: must be from 0 to 2**63 - 1, but it is -1"),
    ({"seeds": [2**63]}, "seeds[0]: must be from 0 to 2**63 - 1"),
    ({"teacher": {"seed": -1}}, "teacher.seed: must be from 0 to 2**63 - 1"),
    ({"dataset": {"name": "digits", "split_seed": -1}}, "dataset.split_seed: must be from 0"),
    ({"seeds": [True]}, "seeds[0]: input should be a valid integer, but it is true"),
    ({"seeds": [1.0]}, "seeds[0]: input should be a valid integer, but it is 1.0"),
    ({"seeds": 3}, "seeds: input should be a list, but it is 3"),
    ({"pairs": []}, "pairs: is empty; give at least one"),
    ({"pairs": {"teacher": "resnet8"}}, "pairs: input should be a list"),
    ({"rows": []}, "rows: is empty; give at least one"),
    ({"rows": None}, "rows: input should be a list, but it is null"),
    ({"schema": 2}, "schema: input should be 1, but it is 2"),
    ({"protocol": "1"}, 'protocol: input should be a valid integer, but it is "1"'),
    ({"description": None}, "description: input should be a valid string, but it is null"),
    ({"recipe": None}, "recipe: input should be a mapping, but it is null"),
    ({"reference": None}, "reference: input should be a mapping, but it is null"),
    ({"plugins": ["nosuch"]}, "plugins: no installed package offers the method plug-in 'nosuch'; install it"),
    ({"plugins": ["kd"]}, "plugins: method plug-in 'kd' has the name of a built-in method"),
    ({"teacher": {"lr": 0}}, "teacher.lr: must be above 0"),
    ({"teacher": {"seed": True}}, "teacher.seed: input should be a valid integer, but it is true"),
    ({"teacher": {"weights": {"resnet8": "none.safetensors"}}}, "teacher.weights.resnet8: no such file: none.safetensors"),
    ({"teacher": {"weights": {"resnet8": "x" * 300}}}, "teacher.weights.resnet8: no such file: xxx"),
    ({"teacher": {"weights": {"resnet8": "."}}}, "teacher.weights.resnet8: no such file: ."),
    ({"dataset": {"name": "digits", "train_size": 0}}, "dataset.train_size: must be a multiple of the 10 classes"),
    ({"dataset": {"name": "digits", "train_size": 15}}, "dataset.train_size: must be a multiple of the 10 classes"),
    ({"dataset": {"name": "digits", "dev_size": -10}}, "dataset.dev_size: must be a multiple of the 10 classes"),
    ({"dataset": {"name": "digits", "train_size": 900, "dev_size": 500}}, "dataset: 1400 training and development images, but there are 1000"),
    ({"dataset": {"name": "digits", "split_seed": "0"}}, "dataset.split_seed: input should be a valid integer"),
    ({"dataset": "digits"}, 'dataset: input should be a mapping, but it is "digits"'),
    ({"recipe": {"batch_size": 0}}, "recipe.batch_size: must be above 0"),
    ({"recipe": {"carry": "best"}}, "recipe.carry: input should be 'last' or 'best_on_dev'"),
    ({"recipe": {"carry": "best_on_dev"}}, "rows[0].stages[0].carry: best_on_dev needs a development split"),
    ({"recipe": {"optimizer": {"nesterov": True, "momentum": 0}}}, "recipe.optimizer.nesterov: needs a momentum above 0"),
    ({"recipe": {"optimizer": {"nesterov": 1}}}, "recipe.optimizer.nesterov: input should be a valid boolean, but it is 1"),
    ({"recipe": {"optimizer": {"weight_decay": -1e-4}}}, "recipe.optimizer.weight_decay: must be 0 or more"),
    ({"recipe": {"optimizer": {"lr": float("inf")}}}, "recipe.optimizer.lr: input should be a finite number, but it is Infinity"),
    ({"recipe": {"epochs": []}}, "recipe.epochs: is empty"),
    ({"recipe": {"epochs": {}}}, "recipe.epochs: give either a list of epochs or a total"),
    ({"recipe": {"epochs": {"total": 3, "per_stage": [1]}}}, "recipe.epochs: give either a list of epochs or a total"),
    ({"recipe": {"first_stage": {"milestones": [0.5, 1.0]}}}, "recipe.first_stage.milestones: are fractions"),
    ({"recipe": {"first_stage": {"milestones": "0.5"}}}, "recipe.first_stage.milestones: input should be a list"),
    ({"methods": {"v": {}}}, "methods.v.method: is missing"),
    ({"methods": {"v": {"method": "kd", "modifiers": [["a"]]}}}, "methods.v.modifiers[0]: unknown modifier ['a']"),
    ({"methods": {"v": {"method": "kd", "modifiers": [{"name": {}}]}}}, "methods.v.modifiers[0]: unknown modifier {}"),
    ({"methods": {"v": {"method": "kd", "modifiers": "ls"}}}, "methods.v.modifiers: input should be a list"),
    ({"methods": {"v": {"method": "kd", "settings": {"weight": True}}}}, "methods.v.settings.weight: input should be a valid number, but it is true"),
    ({"methods": {"v": {"method": "fitnet", "settings": {"hint_layer": 1.5}}}}, "methods.v.settings.hint_layer: input should be a valid integer"),
    ({"methods": {"v": {"method": "kd", "settings": {"weight": -1}}}}, "methods.v.settings: kd: weight must be 0 or more, but it is -1"),
    ({"methods": {"v": {"method": "kd", "setings": {}}}}, "methods.v.setings: unknown key; did you mean 'settings'?"),
    ({"rows": [{"name": "a"}]}, "rows[0].stages: is missing"),
    ({"rows": [3]}, "rows[0]: input should be a mapping, but it is 3"),
    ({"rows": [{"stages": "kd"}]}, 'rows[0].stages: input should be a list, but it is "kd"'),
    ({"rows": [[{"epochs": 3}]]}, "rows[0].stages[0].method: is missing"),
    ({"rows": [[[]]]}, "rows[0].stages[0].method: is empty; name a method"),
    ({"rows": [[3]]}, "rows[0].stages[0].method[0]: input should be a valid string, but it is 3"),
    ({"rows": [{"stages": ["kd"], "name": "a\tb"}]}, "rows[0].name: must be one line"),
    ({"rows": [{"stages": ["kd"], "name": " "}]}, "rows[0].name: must be one line"),
    ({"rows": [{"stages": ["kd"], "controls": "x"}]}, 'rows[0].controls: input should be a list, but it is "x"'),
    ({"rows": [{"stages": ["kd"], "reference": {"weight": "1"}}]}, 'rows[0].reference.weight: input should be a valid number, but it is "1"'),
    ({"rows": [{"stages": ["kd"], "reference": {"weighting": None}}]}, "rows[0].reference.weighting: input should be a mapping, but it is null"),
    ({"rows": [{"stages": ["kd"], "reference": {"weighting": {"mpa": "tcp"}}}]}, "rows[0].reference.weighting.mpa: unknown key; did you mean 'map'?"),
    ({"rows": [{"stages": ["kd"], "reference": {"space": "logit"}}]}, "rows[0].reference.space: input should be 'logits' or 'features'"),
    ({"rows": [["kd", {"method": "kd", "init": "cold"}]]}, "rows[0].stages[1].init: input should be 'warm' or 'reinit'"),
    ({"rows": [[{"method": "kd", "epochs": 0}]]}, "rows[0].stages[0].epochs: must be above 0"),
    ({"rows": [[{"method": "kd", "method_weight": -1}]]}, "rows[0].stages[0].method_weight: must be 0 or more"),
    ({"rows": [[{"method": "kd", "reference": {"weighting": {"temperature": 0}}}]]}, "rows[0].stages[0].reference.weighting.temperature: must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "start"), WRONG_VALUES)
def test_one_wrong_value_is_one_problem(entries, start):
    assert one_problem(**entries).startswith(start)


def test_two_things_may_be_wrong_with_one_entry():
    *found, _ = problems_of(teacher={"weights": {"resnet9": "x"}})
    assert "unknown model 'resnet9'; did you mean 'resnet8'" in found[0]
    assert "no such file: x" in found[1]
    *found, _ = problems_of(recipe={"epochs": {"totl": 3}})
    assert any("totl: unknown key; did you mean 'total'?" in line for line in found)


def test_a_whole_row_that_is_misformed_hides_no_other_mistake():
    rows = [
        ["kd", {"method": "kd", "schedule": {"name": 0, "method": 0}}],
        {"stages": ["kd"], "name": "b", "epochs": [0]},
    ]
    *found, _ = problems_of(rows=rows)
    assert [line.split(": ")[1] for line in found] == [
        "rows[0].stages[1].schedule.name",
        "rows[0].stages[1].schedule.method",
        "rows[1].epochs[0]",
    ]


@pytest.mark.parametrize("key", ["name", "dataset", "pairs", "seeds", "rows"])
def test_what_is_required(key):
    document = content()
    del document[key]
    *found, _ = problems(yaml.safe_dump(document, sort_keys=False))
    assert found == [f"{FILE}:1: {key}: is missing"]


@pytest.mark.parametrize("text", ["", "- a\n", "hello\n", "3\n", "null\n", "[]\n"])
def test_what_is_no_mapping(text):
    found = problems(text)
    assert (
        found[0]
        == f"{FILE}:1: the document: a matrix is a mapping with name, dataset, pairs, seeds and rows"
    )


PLACES = [
    (), ("dataset",), ("pairs", 0), ("recipe",), ("recipe", "optimizer"), ("recipe", "first_stage"),
    ("recipe", "later_stages"), ("teacher",), ("teacher", "schedule"), ("reference",), ("reference", "weighting"),
    ("methods", "v"), ("methods", "v", "settings"), ("methods", "v", "modifiers", 0), ("rows", 0),
    ("rows", 0, "reference"), ("rows", 0, "reference", "weighting"), ("rows", 0, "epochs"), ("rows", 0, "stages", 1),
    ("rows", 0, "stages", 1, "schedule"), ("rows", 0, "stages", 1, "reference"),
    ("rows", 0, "stages", 1, "reference", "weighting"),
]  # fmt: skip

FULL = content(
    recipe={"optimizer": {}, "first_stage": {}, "later_stages": {}},
    teacher={"schedule": {}},
    reference={"weighting": {}},
    methods={
        "v": {"method": "kd", "settings": {}, "modifiers": [{"name": "logit_standardisation"}]}
    },
    rows=[
        {
            "stages": ["kd", {"method": "v", "schedule": {}, "reference": {"weighting": {}}}],
            "reference": {"weighting": {}},
            "epochs": {"total": 4},
        }
    ],
)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_unknown_keys_at_every_depth(place):
    load_text(yaml.safe_dump(FULL))
    document = copy.deepcopy(FULL)
    section = document
    for part in place:
        section = section[part]
    section["zzz"] = 1
    found = problems(yaml.safe_dump(document, sort_keys=False))
    assert len(found) == 2, found
    assert "zzz: unknown key" in found[0]


def test_a_suggestion_names_only_keys_of_that_section():
    assert one_problem(recipe={"optimizer": {"mometum": 0.5}}).endswith("did you mean 'momentum'?")
    assert one_problem(recipe={"optimizer": {"zzz": 0.5}}).endswith(
        "known: lr, momentum, nesterov, weight_decay"
    )


def test_a_long_wrong_value_is_cut():
    (found, _) = problems_of(seeds=["x" * 500])
    assert len(found) < 200


# ------------------------------------------------------------------------------------- short forms


def test_short_forms_of_a_row_and_a_stage():
    forms = [
        ["fitnet", "kd"],
        {"stages": ["fitnet", "kd"]},
        {"stages": [{"method": "fitnet"}, {"method": ["kd"]}]},
    ]
    keys = set()
    for form in forms:
        (cell,) = plan_of(rows=[form]).cells
        assert cell.row == "fitnet>kd"
        keys.add(cell.stages)
    assert len(keys) == 1


def test_a_joint_stage():
    (row,) = load(rows=[[["fitnet", "kd"]]]).matrix.rows
    assert row.stages[0].method == ("fitnet", "kd")
    assert row_name(row) == "fitnet+kd"


def test_names_of_rows_and_cells():
    matrix = load(rows=[[["fitnet", "kd"], "at"], {"stages": ["kd"], "name": "mine"}]).matrix
    assert [row_name(row) for row in matrix.rows] == ["fitnet+kd>at", "mine"]
    assert cell_name("a>b", "kd", 3) == "a>b/kd/s3"


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([24, 9], (24, 9, 9)),
        ({"per_stage": [24, 9]}, (24, 9, 9)),
        ([5], (5, 5, 5)),
        (5, (5, 5, 5)),
        ([3, 2, 1], (3, 2, 1)),
        ({"total": 10}, (4, 3, 3)),
        ({"total": 3}, (1, 1, 1)),
    ],
)
def test_forms_of_epochs(epochs, expected):
    rows = [{"stages": ["fitnet", "at", "kd"]}]
    in_recipe = plan_of(rows=rows, recipe={"epochs": epochs})
    in_row = plan_of(rows=[{**rows[0], "epochs": epochs}])
    for plan in (in_recipe, in_row):
        assert tuple(s.training.epochs for s in specs(plan, "fitnet>at>kd")) == expected


def test_a_recipes_list_may_be_longer_than_a_row():
    (spec,) = specs(plan_of(recipe={"epochs": [7, 6, 5]}), "kd")
    assert spec.training.epochs == 7


def test_defaults_are_those_of_the_recipe_that_everybody_copies():
    document = content()
    del document["recipe"], document["teacher"]
    plan = make_plan(load_text(yaml.safe_dump({**document, "rows": [["fitnet", "kd"]]})))
    first, second = specs(plan, "fitnet>kd")
    teacher = plan.nodes[plan.cells[0].teacher]
    assert (first.training.epochs, second.training.epochs, teacher.training.epochs) == (
        240,
        90,
        240,
    )
    assert (first.training.optimizer.lr, first.training.optimizer.momentum) == (0.05, 0.9)
    assert first.training.optimizer.weight_decay == 5e-4
    assert not first.training.optimizer.nesterov
    assert first.training.schedule == teacher.training.schedule == Schedule()
    assert second.training.schedule == LATER_STAGES
    assert first.training.batch_size == 64
    assert second.reference.temperature == 4.0


# ---------------------------------------------------------------------------------------- variants


def test_variants_have_settings_and_modifiers():
    loaded = load(
        methods={
            "soft": {"method": "fitnet", "settings": {"weight": 10}},
            "std": {
                "method": "kd",
                "settings": {"temperature": 2},
                "modifiers": ["logit_standardisation"],
            },
            "long": {"method": "kd", "modifiers": [{"name": "logit_standardisation"}]},
        },
        rows=[["soft", "std"], ["long"]],
    )
    assert loaded.methods["soft"] == FitNet(weight=10)
    assert loaded.methods["std"] == KD(temperature=2)
    assert [m.name for m in loaded.modifiers["std"]] == ["logit_standardisation"]
    first, second = specs(make_plan(loaded), "soft>std")
    assert first.methods[0].name == "fitnet"
    assert first.methods[0].settings["weight"] == 10.0
    assert second.methods[0].settings["temperature"] == 2.0
    assert [m.name for m in second.methods[0].modifiers] == ["logit_standardisation"]


def test_one_method_with_two_settings_may_be_joined():
    methods = {f"kd{t}": {"method": "kd", "settings": {"temperature": t}} for t in (2, 8)}
    (spec,) = specs(plan_of(methods=methods, rows=[[["kd2", "kd8"]]]), "kd2+kd8")
    assert [m.settings["temperature"] for m in spec.methods] == [2.0, 8.0]


# -------------------------------------------------------------------------- what overrides what

MATRIX_REFERENCE = {
    "weight": 3.0,
    "temperature": 5.0,
    "weighting": {"map": "tcp", "temperature": 2.0, "normalise": "batch_mean"},
}


def second_reference(row=..., stage=..., matrix=MATRIX_REFERENCE):
    second = {"method": "kd"} if stage is ... else {"method": "kd", "reference": stage}
    entry = {"stages": ["fitnet", second], "name": "r"}
    if row is not ...:
        entry["reference"] = row
    return specs(plan_of(reference=matrix, rows=[entry]), "r")[1].reference


def test_the_matrix_speaks_where_row_and_stage_are_silent():
    reference = second_reference()
    assert (reference.weight, reference.temperature) == (3.0, 5.0)
    assert (reference.weighting.map, reference.weighting.temperature) == ("tcp", 2.0)
    assert second_reference(row={}, stage={}) == reference


def test_a_row_replaces_only_what_it_names():
    reference = second_reference(row={"weight": 4, "weighting": {"map": "two_minus_tcp"}})
    assert (reference.weight, reference.temperature) == (4.0, 5.0)
    assert reference.weighting.map == "two_minus_tcp"
    assert (reference.weighting.temperature, reference.weighting.normalise) == (2.0, "batch_mean")


def test_a_stage_counts_before_the_row():
    reference = second_reference(
        row={"weight": 4, "weighting": {"map": "two_minus_tcp", "temperature": 7.0}},
        stage={"temperature": 9, "weighting": {"map": "exp_minus_tcp"}},
    )
    assert (reference.weight, reference.temperature) == (4.0, 9.0)
    assert (reference.weighting.map, reference.weighting.temperature) == ("exp_minus_tcp", 7.0)
    assert reference.weighting.normalise == "batch_mean"


@pytest.mark.parametrize("off", [None, {"weight": 0}])
def test_the_reference_can_be_switched_off(off):
    assert second_reference(row=off) is None
    assert second_reference(stage=off) is None
    assert second_reference(row=off, stage={"weight": 2}).weight == 2.0


def test_stage_settings_count_before_the_recipe():
    stage = {
        "method": "kd", "epochs": 7, "schedule": {"kind": "cosine", "start": 0.5}, "init": "reinit",
        "carry": "best_on_dev", "method_weight": 2, "ce_weight": 0,
    }  # fmt: skip
    plan = plan_of(
        rows=[{"stages": ["kd", stage], "name": "r", "epochs": {"total": 4}}],
        dataset={"name": "digits", "dev_size": 100},
    )
    first, second = specs(plan, "r")
    assert (first.training.epochs, second.training.epochs) == (2, 7)
    assert (second.training.schedule.kind, second.training.schedule.start) == ("cosine", 0.5)
    assert (first.training.init, second.training.init) == ("warm", "reinit")
    assert (first.training.carry, second.training.carry) == ("last", "best_on_dev")
    assert (second.method_weight, second.ce_weight) == (2.0, 0.0)


def test_only_and_controls_of_a_good_matrix():
    loaded = load(rows=[["kd"], {"stages": ["fitnet"], "controls": ["kd"], "only": [PAIR]}])
    assert loaded.matrix.rows[1].controls == ("kd",)


def test_weights_are_found_beside_the_matrix_file(tmp_path, monkeypatch):
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "t.safetensors").write_bytes(b"x")
    document = content(teacher={"weights": {"resnet14_half": "teachers/t.safetensors"}})
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump(document))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_matrix(file).file == file


# --------------------------------------------------------------------------------- documentation

DOCS = (Path(__file__).parents[2] / "docs" / "matrix.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:yaml)?\n(.*?)```", DOCS, re.S)


def block(start):
    return next(text for text in BLOCKS if text.startswith(start))


def test_the_example_of_the_documentation():
    plan = make_plan(load_text(block("schema: 1")))
    said = re.search(
        r"This has (\d+) cells: .*?would be (\d+)\s+stage runs.*?Shared they are (\d+)", DOCS, re.S
    )
    counted = (len(plan.cells), plan.stages_before_sharing(), len(plan.nodes))
    assert tuple(map(int, said.groups())) == counted


def test_the_error_listing_of_the_documentation():
    with pytest.raises(ConfigError) as caught:
        load_text(block("name: demo\n"), Path("demo.yaml"))
    assert f"error: {caught.value}\n" == block("error: demo.yaml")


# -------------------------------------------------------------------------------------------- fuzz

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.sampled_from(["", "kd", "scratch", "no", "0.1", "x" * 99]),
    st.text(max_size=5), st.just([]), st.just({}), st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["name", "method", "weight", "zzz"]), st.integers(0, 2), max_size=2),
    st.just([[["kd"]]]), st.just({"name": ["a"]}), st.just(10**30),
)  # fmt: skip


def places(node, path=()):
    """Every path of a document."""
    yield path
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutated(draw):
    document = copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(sorted(places(document), key=str)[1:] or [()]))
        if not path:
            break
        holder = document
        for part in path[:-1]:
            holder = holder[part]
        action = draw(st.sampled_from(["replace", "delete", "double"]))
        if action == "delete":
            del holder[path[-1]]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[path[-1]] = copy.deepcopy(draw(LEAVES))
    return document


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
@given(mutated())
def test_any_document_gives_a_plan_or_one_error(document):
    text = yaml.safe_dump(document, allow_unicode=True)
    try:
        answer = make_plan(load_text(text)).cells[0].name
    except SmskdError as error:
        answer = str(error)
    assert answer.encode()


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,?\t\n 0", max_size=60))
def test_any_text_gives_one_error(text):
    with pytest.raises(SmskdError):
        load_text(text)
