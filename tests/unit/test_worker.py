"""The worker's fast paths: tables and folded seeds change no key, and resume to the same bits."""

import copy
import errno
import os
from dataclasses import replace

import pytest
import torch
from cases import daily, later
from matrices import plan_of
from smskd_bench.store import Store
from smskd_bench.tables import plan_tables
from smskd_bench.worker import RunOptions, Worker
from tiny import same_state

from smskd.errors import DivergedError, IncompatibleError

SEEDS = [0, 1, 2]
ROWS = [["kd"], ["kd", "rkd"], ["fitnet", "kd"]]


@pytest.fixture(scope="module")
def plan():
    return plan_of(
        pairs=[{"teacher": "resnet8_half", "student": "resnet8_quarter"}], seeds=SEEDS, rows=ROWS,
        recipe={"epochs": [2, 2]}, teacher={"epochs": 1},
        dataset={"name": "digits", "train_size": 320}, reference={"weight": 1.0},
    )  # fmt: skip


def stages_of(plan, row, number):
    cells = sorted((c for c in plan.cells if c.row == row), key=lambda c: c.seed)
    return [plan.nodes[c.stages[number - 1]] for c in cells]


def worker_of(plan, folder, **options):
    """A worker on a store that has the teacher."""
    store = Store.open(folder)
    worker = Worker(store, RunOptions(threads=1, **options))
    train_one(worker, plan.nodes[plan.cells[0].teacher])
    return worker


def train_one(worker, spec):
    if not worker.store.is_done(spec.key):
        worker.run(spec, lambda spec, row: None)
    return worker.store.weights(spec.key)


def planned(plan):
    """Every network of the plan that is read as logits is worth a table."""
    tables = plan_tables(plan).items()
    return {place: replace(table, why_not="") for place, table in tables if table.users}


def sources(worker, spec):
    return worker.store.result(spec.key)["fast_paths"]


def test_exact_tables_give_the_bits_of_live_networks(plan, tmp_path):
    live = worker_of(plan, tmp_path / "live")
    looked_up = worker_of(plan, tmp_path / "table", tables=planned(plan), teacher_table="fp32")
    for number in (1, 2):
        spec = stages_of(plan, "kd>rkd", number)[0]
        assert same_state(train_one(live, spec), train_one(looked_up, spec))
    assert sources(live, spec)["teacher"] == sources(live, spec)["reference"] == "live"
    assert sources(looked_up, spec)["teacher"] == "table fp32"
    assert sources(looked_up, spec)["reference"] == "table fp32"
    assert (
        len(list((tmp_path / "table/tables").iterdir())) == 1
    )  # the teacher's; the reference's has gone


def test_a_references_table_goes_with_its_last_reader(plan, tmp_path):
    worker = worker_of(plan, tmp_path, tables=planned(plan))
    for row, number in (("kd>rkd", 1), ("kd>rkd", 2)):
        spec = stages_of(plan, row, number)[0]
        train_one(worker, spec)
    assert sources(worker, spec)["reference"] == "table fp16"
    assert len(list((tmp_path / "tables").iterdir())) == 1


def test_methods_that_read_maps_run_the_teacher(plan, tmp_path):
    worker = worker_of(plan, tmp_path, tables=planned(plan))
    spec = stages_of(plan, "fitnet>kd", 1)[0]
    train_one(worker, spec)
    assert sources(worker, spec)["teacher"] == "live"


def test_a_table_that_does_not_fit_is_said_and_run_live(plan, tmp_path, monkeypatch):
    worker = worker_of(plan, tmp_path, tables=planned(plan))
    notes = []
    worker.shelf.note = lambda spec, text: notes.append(text)

    def no_room(handle, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    spec = stages_of(plan, "kd", 1)[0]
    train_one(worker, spec)
    assert sources(worker, spec)["teacher"] == "live"
    assert "GiB cannot be written" in notes[0]
    assert "run live instead" in notes[0]


class Stopped(Exception):
    pass


def stop_at(key, epoch):
    def progress(spec, row):
        if spec.key == key and row["epoch"] == epoch:
            raise Stopped

    return progress


def test_a_run_begun_with_a_table_goes_on_with_it(plan, tmp_path):
    whole = worker_of(plan, tmp_path / "whole", tables=planned(plan))
    spec = stages_of(plan, "kd", 1)[0]
    expected = train_one(whole, spec)
    first = worker_of(plan, tmp_path / "cut", tables=planned(plan))
    with pytest.raises(Stopped):
        first.run(spec, stop_at(spec.key, 1))
    again = worker_of(plan, tmp_path / "cut")  # nothing is planned for it now
    assert same_state(train_one(again, spec), expected)
    assert [s["teacher"] for s in again.store.result(spec.key)["sessions"]] == ["table fp16"] * 2


def together(worker, group, progress=lambda spec, row: None):
    worker.run_together(group, progress)
    return [worker.store.weights(spec.key) for spec in group]


def test_folded_seeds_are_stage_runs_of_their_own(plan, tmp_path):
    alone, folded = worker_of(plan, tmp_path / "a"), worker_of(plan, tmp_path / "b")
    for number in (1, 2):
        group = stages_of(plan, "kd>rkd", number)
        for spec, ours in zip(group, together(folded, group), strict=True):
            for name, value in train_one(alone, spec).items():
                torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-3)
            assert sources(folded, spec)["folded"] == 3
            assert folded.store.result(spec.key)["spec"] == spec.document()
            assert folded.store.result(spec.key)["train_seconds"] > 0


@pytest.mark.parametrize("where", [1, later(0), later(2)])
@pytest.mark.parametrize("epoch", daily([1, 2]))
def test_a_fold_stopped_between_two_checkpoints_ends_in_the_same_bits(plan, tmp_path, where, epoch):
    group = stages_of(plan, "kd", 1)
    expected = together(worker_of(plan, tmp_path / "whole"), group)
    cut = worker_of(plan, tmp_path / "cut")
    with pytest.raises(Stopped):
        cut.run_together(group, stop_at(group[where].key, epoch))
    epochs = [(cut.store.checkpoint(s.key) or {"epoch": 0})["epoch"] for s in group]
    assert epochs == [epoch if i <= where else epoch - 1 for i in range(3)]
    again = worker_of(plan, tmp_path / "cut")
    for ours, theirs in zip(together(again, group), expected, strict=True):
        assert same_state(ours, theirs)


def test_a_damaged_checkpoint_leaves_the_one_before(plan, tmp_path):
    spec = stages_of(plan, "kd", 1)[0]
    expected = train_one(worker_of(plan, tmp_path / "whole"), spec)
    cut = worker_of(plan, tmp_path / "cut")
    with pytest.raises(Stopped):
        cut.run(spec, stop_at(spec.key, 2))
    path = cut.store.folder(spec.key) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert cut.store.checkpoint(spec.key)["epoch"] == 1
    assert same_state(train_one(worker_of(plan, tmp_path / "cut"), spec), expected)
    left = {p.name for p in cut.store.folder(spec.key).iterdir()}
    assert not left & {"checkpoint.pt", "checkpoint.previous.pt"}


def test_a_fold_in_which_one_diverges_can_be_gone_on_with_alone(plan, tmp_path):
    worker = worker_of(plan, tmp_path)
    group = stages_of(plan, "kd", 1)
    with pytest.raises(Stopped):
        worker.run_together(group, stop_at(group[2].key, 1))
    state = worker.store.checkpoint(group[1].key)
    broken = copy.deepcopy(state)
    next(iter(broken["student"].values())).fill_(torch.nan)
    worker.store.save_checkpoint(group[1].key, broken)
    with pytest.raises(DivergedError):
        worker.run_together(group, lambda spec, row: None)
    assert worker.run(group[0], lambda spec, row: None)["fast_paths"]["folded"] == [3, 1]


def test_two_kills_at_the_same_place_end_in_the_same_bits(plan, tmp_path):
    group = stages_of(plan, "kd", 1)
    expected = together(worker_of(plan, tmp_path / "whole"), group)
    for _ in range(3):
        cut = worker_of(plan, tmp_path / "cut")
        with pytest.raises(Stopped):
            cut.run_together(group, stop_at(group[0].key, 2))
        epochs = [cut.store.checkpoint(s.key)["epoch"] for s in group]
        assert epochs == [2, 1, 1]
    for ours, theirs in zip(
        together(worker_of(plan, tmp_path / "cut"), group), expected, strict=True
    ):
        assert same_state(ours, theirs)


def test_finished_epochs_are_never_thrown_away_for_a_fold(plan, tmp_path):
    worker, group = worker_of(plan, tmp_path), stages_of(plan, "kd", 1)
    with pytest.raises(Stopped):
        worker.run(group[0], stop_at(group[0].key, 2))
    with pytest.raises(IncompatibleError, match="epochs 2, 0, 0"):
        worker.run_together(group, lambda spec, row: None)
    assert worker.store.checkpoint(group[0].key)["epoch"] == 2


def test_exact_begins_anew_what_was_begun_with_a_shortcut(plan, tmp_path):
    group = stages_of(plan, "kd", 1)
    expected = train_one(worker_of(plan, tmp_path / "live"), group[0])
    folded = worker_of(plan, tmp_path / "cut", tables=planned(plan))
    with pytest.raises(Stopped):
        folded.run_together(group, stop_at(group[2].key, 1))
    exact = worker_of(plan, tmp_path / "cut", teacher_table="off", exact=True)
    assert same_state(train_one(exact, group[0]), expected)
    assert sources(exact, group[0]) == {"teacher": "live", "folded": 1, "compiled": False}


def test_a_result_names_the_shortcuts_of_all_its_sessions(plan, tmp_path):
    worker, group = worker_of(plan, tmp_path), stages_of(plan, "kd", 1)
    with pytest.raises(Stopped):
        worker.run_together(group, stop_at(group[2].key, 1))
    train_one(worker, group[0])
    assert sources(worker, group[0])["folded"] == [3, 1]


def test_folded_seeds_are_not_called_compiled(plan, tmp_path):
    group = stages_of(plan, "kd", 1)
    worker_of(plan, tmp_path)  # the teacher, which would be compiled
    worker = worker_of(plan, tmp_path, compile=True)
    together(worker, group)
    assert sources(worker, group[0])["compiled"] is False


def test_no_hooks_stay_on_the_teacher(plan, tmp_path):
    worker, group = worker_of(plan, tmp_path), stages_of(plan, "fitnet>kd", 1)
    for place in (0, 2):
        with pytest.raises(Stopped):
            worker.run_together(group, stop_at(group[place].key, 1))
    (teacher,) = worker._teachers.values()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.model.modules())
