"""Which frozen networks get a table: against real draws of views, and the cases that get none."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from matrices import plan_of, specs
from smskd_bench import tables
from smskd_bench.cost import network_cost, pooled_width
from smskd_bench.tables import (
    LOGITS,
    expected_views,
    frozen_uses,
    num_views,
    plan_tables,
    room_for,
    size_text,
    views_to_fill,
)

from smskd.methods.base import Method, Needs
from smskd.taps import POOLED
from smskd.views import draw_views

CONSTANT = {"weighting": {"map": "constant"}}
DATA = {"name": "digits", "train_size": 200}


def tables_of(**entries):
    plan = plan_of(**{"dataset": DATA, **entries})
    return plan, plan_tables(plan)


def teacher_table(plan, found):
    """The table of the (only) teacher."""
    (table,) = [t for t in found.values() if plan.nodes[t.network].model == "resnet14_half"]
    return table


def really_shown(table, plan):
    """Mean number of different views that the table's users draw, by drawing them."""
    data = plan.nodes[table.network].dataset
    shown = np.zeros((data.train_size, num_views(data)), bool)
    for key in table.users:
        spec = plan.nodes[key]
        for epoch in range(1, spec.training.epochs + 1):
            views = draw_views(spec.seed, spec.first_epoch + epoch, *shown.shape)
            shown[np.arange(len(shown)), views] = True
    return shown.sum(axis=1).mean()


def test_expected_views_against_real_draws():
    plan, found = tables_of(
        rows=[["kd"], ["kd", "kd"], ["dkd"], {"stages": ["rkd", "kd"], "epochs": [3, 6]}],
        seeds=[0, 1],
        recipe={"epochs": [4, 3]},
    )
    assert len(found) > 4
    assert num_views(next(iter(plan.nodes.values())).dataset) == 9
    for table in found.values():
        assert table.epochs_built == pytest.approx(really_shown(table, plan), rel=0.03)
        assert table.epochs_live == sum(plan.nodes[key].training.epochs for key in table.users)


def test_expected_views_at_the_ends():
    assert expected_views(162, 0) == 0.0
    assert expected_views(162, 1) == pytest.approx(1.0)
    assert expected_views(162, 10**6) == pytest.approx(162.0)
    assert [expected_views(1, n) for n in (1, 240)] == [1.0, 1.0]  # no augmentation: one forward
    shown = [expected_views(162, n) for n in (80, 160, 240)]
    assert [round(x) for x in shown] == [63, 102, 125]


def test_a_teacher_of_several_methods_pays():
    plan, found = tables_of(rows=[["kd"], ["dkd"]], recipe={"epochs": [2]})
    table = teacher_table(plan, found)
    assert table.pays
    assert table.users == tuple(key for c in plan.cells for key in c.stages)
    # The same seed and epochs, so the second method sees what the first has seen.
    assert (table.epochs_live, table.epochs_built) == (4, pytest.approx(expected_views(9, 2)))
    assert table.roles == {LOGITS}
    assert table.num_bytes == 200 * 9 * 10 * 2
    macs = network_cost("resnet14_half", "digits").macs
    assert table.macs_saved == pytest.approx((4 - expected_views(9, 2)) * 200 * macs, rel=1e-6)


def test_pooled_features_and_storage_make_it_larger():
    plan, found = tables_of(rows=[["kd"], ["rkd"]])
    width = pooled_width("resnet14_half", "digits")
    assert width == 32
    table = teacher_table(plan, found)
    assert table.roles == {LOGITS, POOLED}
    assert table.num_bytes == 200 * 9 * (10 + width) * 2
    assert teacher_table(plan, plan_tables(plan, "fp32")).num_bytes == 2 * table.num_bytes


def test_methods_that_read_maps_run_the_teacher():
    plan, found = tables_of(rows=[["fitnet"]])
    table = teacher_table(plan, found)
    assert (table.users, table.epochs_live, table.macs_saved) == ((), 0, 0)
    assert not table.pays
    assert table.why_not == "its maps are read, which no table holds"
    plan, found = tables_of(rows=[["fitnet"], ["kd"], [["sp", "kd"]]], recipe={"epochs": [20]})
    (kd,) = specs(plan, "kd")
    assert teacher_table(plan, found).users == (kd.key,)


def test_few_epochs_of_one_stage_run_do_not_pay():
    plan, found = tables_of(rows=[["kd"]], recipe={"epochs": [2]})
    table = teacher_table(plan, found)
    assert not table.pays
    assert "2 epochs show 1.9 of an image's 9 views" in table.why_not
    plan, found = tables_of(rows=[["kd"]], recipe={"epochs": [9]})
    assert teacher_table(plan, found).pays


def test_other_seeds_see_other_views():
    one = tables_of(rows=[["kd"]], seeds=[0], recipe={"epochs": [3]})
    two = tables_of(rows=[["kd"]], seeds=[0, 1], recipe={"epochs": [3]})
    assert teacher_table(*one).epochs_built == expected_views(9, 3)
    assert teacher_table(*two).epochs_built == expected_views(9, 6)


def test_a_student_without_teacher_has_no_tables():
    assert tables_of(rows=[["scratch"]])[1] == {}


def test_sample_weights_read_the_teacher_and_constant_ones_do_not():
    plan, found = tables_of(rows=[["scratch", "scratch"]])
    first, second = specs(plan, "scratch>scratch")
    assert teacher_table(plan, found).users == (second.key,)
    plan, found = tables_of(rows=[["scratch", "scratch"]], reference=CONSTANT)
    first, second = specs(plan, "scratch>scratch")
    (table,) = found.values()
    assert (table.network, table.users) == (first.key, (second.key,))


def test_references():
    rows = [
        ["kd", "kd"],
        {"stages": ["kd", "kd"], "name": "twice", "reference": {"weight": 2.0}},
        {"stages": ["kd", "kd"], "name": "features", "reference": {"space": "features"}},
        {"stages": ["kd", "kd"], "name": "none", "reference": None},
    ]
    plan, found = tables_of(rows=rows)
    parent = specs(plan, "kd>kd")[0]
    table = found[parent.key, "fp32"]
    assert table.users == tuple(specs(plan, name)[1].key for name in ("kd>kd", "twice"))
    assert (table.epochs_live, table.epochs_built) == (2, pytest.approx(1.0))
    only, found = tables_of(rows=[rows[2]])
    (refused,) = [t for t in found.values() if t.network == specs(only, "features")[0].key]
    assert refused.why_not == "the reference compares feature maps, which no table holds"


def test_a_network_that_is_teacher_and_reference_has_one_table():
    pair = {"teacher": "resnet8_quarter", "student": "resnet8_quarter"}
    plan, found = tables_of(
        pairs=[pair], rows=[["scratch", "kd"]], recipe={"epochs": [2]}, teacher={"epochs": 2}
    )
    (table,) = found.values()
    assert [use.role for use in frozen_uses(plan.nodes[table.users[0]], plan)] == [
        "teacher",
        "reference",
    ]
    assert table.epochs_live == 4
    assert table.epochs_built == expected_views(9, 2)


def test_each_precision_has_its_own_table():
    plan, found = tables_of(rows=[["kd"], ["dkd"]], recipe={"epochs": [9]})
    (dkd,) = specs(plan, "dkd")
    narrow = replace(dkd, training=replace(dkd.training, precision="bf16"))
    both = replace(plan, nodes={**plan.nodes, narrow.key: narrow})
    found = plan_tables(both)
    assert [precision for _, precision in found] == ["fp32", "bf16"]
    assert found[dkd.teachers[0], "bf16"].users == (narrow.key,)
    assert narrow.key not in found[dkd.teachers[0], "fp32"].users


def test_needs_are_those_of_the_loaded_method():
    @dataclass(frozen=True)
    class Plugin(Method):
        name: ClassVar[str] = "kd"
        kind: ClassVar[str] = "feature"
        needs: ClassVar[Needs] = Needs.features("preact", "pooled")

        def distill(self, signals, modules):
            raise AssertionError("planning runs nothing")

    plan = plan_of(rows=[["kd"]])
    loaded = replace(plan.loaded, methods={**plan.loaded.methods, "kd": Plugin()})
    (table,) = plan_tables(replace(plan, loaded=loaded)).values()
    assert table.why_not == "its preact are read, which no table holds"


def test_what_is_left_to_fill():
    plan, found = tables_of(rows=[["kd"], ["dkd"]], seeds=[0, 1], recipe={"epochs": [3]})
    table = teacher_table(plan, found)
    assert views_to_fill(table, plan) == table.epochs_built
    seed_0 = [key for key in table.users if plan.nodes[key].seed == 0]
    left = expected_views(9, 6) - expected_views(9, 3)
    # One stage run of a seed fills what all others of the seed read in the same epochs.
    assert views_to_fill(table, plan, seed_0[:1]) == pytest.approx(left)
    assert views_to_fill(table, plan, seed_0) == pytest.approx(left)
    assert views_to_fill(table, plan, table.users) == 0.0


def test_room(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there"
    assert room_for(2**20, folder) is None
    assert "needs 1,048,576.00 GiB, free " in room_for(2**50, folder)
    free = SimpleNamespace(free=tables.RESERVE_BYTES + 1000)
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda path: free)
    assert room_for(1000, folder) is None
    assert room_for(1001, folder) == (
        f"needs 0.0 MiB, free 2.00 GiB on {folder} (2.00 GiB of it stay free)"
    )


def test_sizes_for_people():
    assert size_text(200 * 9 * 10 * 2) == "0.0 MiB"
    assert size_text(50_000 * 162 * 100 * 2) == "1.51 GiB"
    assert size_text(4.2 * 2**20) == "4.2 MiB"
