"""Which stage runs are folded, by plan and by measurement; and the switch that takes no shortcut."""

import pytest
from matrices import plan_of
from smskd_bench import folds
from smskd_bench.calibration import FILE
from smskd_bench.fast_paths import FastPaths
from smskd_bench.folds import choose_folds, fold_groups
from smskd_bench.parallel import Parallelism
from smskd_bench.store import Store

from smskd.errors import ConfigError

ONE = Parallelism(1, 1)


def groups_of(plan):
    return [[(plan.nodes[k].methods[0].name, plan.nodes[k].number, plan.nodes[k].seed) for k in g]
            for g in fold_groups(plan)]  # fmt: skip


def test_seeds_of_the_same_work_are_grouped():
    plan = plan_of(seeds=[3, 1], rows=[["kd", "dkd"], ["dkd", "dkd"], ["kd"]])
    assert groups_of(plan) == [
        [("kd", 1, 1), ("kd", 1, 3)],
        [("dkd", 2, 1), ("dkd", 2, 3)],
        [("dkd", 1, 1), ("dkd", 1, 3)],
        [("dkd", 2, 1), ("dkd", 2, 3)],  # of another parent: not with the one above
    ]


def test_teachers_of_their_own_are_folded_too():
    plan = plan_of(seeds=[0, 1], rows=[["kd"]], teacher={"epochs": 2, "seed": None})
    assert [g[0][0] for g in groups_of(plan)] == ["scratch", "kd"]


def test_many_seeds_are_divided():
    plan = plan_of(seeds=list(range(11)), rows=[["scratch"]])
    assert [len(group) for group in fold_groups(plan)] == [8, 3]


def test_one_seed_has_nothing_to_fold():
    assert fold_groups(plan_of(rows=[["kd"]])) == []


def test_choices_without_measurement(tmp_path):
    plan, store = plan_of(seeds=[0, 1], rows=[["kd"]]), Store.open(tmp_path)
    assert choose_folds("off", plan, "cpu", store) == []
    assert choose_folds("on", plan, "cpu", store) == fold_groups(plan)
    assert not (tmp_path / FILE).exists()
    assert choose_folds("on", plan, "cpu", store, wanted=lambda key: False) == []


def test_auto_is_what_was_measured_and_stays(tmp_path, monkeypatch):
    plan, store = plan_of(seeds=[0, 1], rows=[["kd"]]), Store.open(tmp_path)
    told = []
    first = choose_folds("auto", plan, "cpu", store, ONE, lambda *what: told.append(what))
    assert len(told) == 2
    assert choose_folds("auto", plan, "cpu", store, ONE, lambda *what: told.append(what)) == first
    assert len(told) == 2
    monkeypatch.setattr(folds, "WORTH_IT", 1e9)
    assert choose_folds("auto", plan, "cpu", store, ONE) == []
    monkeypatch.setattr(folds, "WORTH_IT", 0.0)
    assert choose_folds("auto", plan, "cpu", store, ONE) == fold_groups(plan)


def test_a_student_that_mixes_channels_is_not_folded(tmp_path):
    plan = plan_of(
        pairs=[{"teacher": "resnet14_half", "student": "ShuffleV1"}], seeds=[0, 1], rows=[["kd"]]
    )
    assert choose_folds("on", plan, "cpu", Store.open(tmp_path)) == []


def test_exact_takes_no_shortcut():
    given = {"teacher_table": "auto", "fold_seeds": "auto", "compile": False, "workers": "auto"}
    assert FastPaths.choose(exact=False, **given) == FastPaths()
    exact = FastPaths.choose(exact=True, **given)
    assert exact == FastPaths("off", "off", False, 1, exact=True)
    assert FastPaths.choose(exact=True, **{**given, "workers": 1}) == exact
    for change in ({"workers": 2}, {"fold_seeds": "on"}, {"compile": True}):
        with pytest.raises(ConfigError, match="takes no shortcuts") as error:
            FastPaths.choose(exact=True, **{**given, **change})
        assert f"--{next(iter(change)).replace('_', '-')}" in error.value.message


def test_tables_are_decided_for_the_whole_matrix():
    plan = plan_of(rows=[["kd"], ["dkd"]])
    part = plan_of("dkd", rows=[["kd"], ["dkd"]])
    assert len(part.nodes) < len(plan.nodes)
    assert FastPaths().tables(part, "dkd") == FastPaths().tables(plan, None)
    assert FastPaths("off").tables(plan, None) == {}


def test_what_was_begun_goes_on_as_it_began(tmp_path, monkeypatch):
    plan, store = plan_of(seeds=[0, 1], rows=[["kd"], ["dkd"]]), Store.open(tmp_path)
    first, second = fold_groups(plan)
    for group, folded in ((first, 2), (second, 1)):
        for key in group:
            store.begin(plan.nodes[key])
            store.save_checkpoint(key, {"epoch": 1, "sessions": [{"folded": folded}]})
    for wanted in (0.0, 1e9):
        monkeypatch.setattr(folds, "WORTH_IT", wanted)
        assert choose_folds("auto", plan, "cpu", store, ONE) == [first]
    assert choose_folds("on", plan, "cpu", store) == [first, second]


def test_workers_are_not_left_idle(tmp_path):
    plan = plan_of(seeds=[0, 1, 2], rows=[["scratch"]])
    groups = fold_groups(plan)
    assert folds._crowding(groups, plan, 1, lambda key: True) == 1.0
    assert folds._crowding(groups, plan, 8, lambda key: True) == 3.0
