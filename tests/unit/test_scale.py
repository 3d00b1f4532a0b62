"""Large matrices and stores: what is opened, read and written out does not grow where it need not.

Counts only; how long it takes is measured by ``python -m benchmarks.scale``.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matrices import plan_of, write_matrix
from smskd_bench import status
from smskd_bench.plan import make_plan
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.spec import StageSpec, key_of
from smskd_bench.store import CHECKPOINT, PREVIOUS, RESULT, Store

OPENED: list[str] | None = None


def hear(event, arguments):
    if OPENED is not None and event in ("open", "os.scandir", "os.listdir"):
        OPENED.append(f"{event} {arguments[0]}")


@pytest.fixture(scope="session")
def hook():
    sys.addaudithook(hear)  # it cannot be taken away again


@pytest.fixture
def opened(hook):
    """A context that gives the names of all files that Python opens within it."""

    @contextmanager
    def count():
        global OPENED
        OPENED = []
        try:
            yield OPENED
        finally:
            OPENED = None

    return count


ROWS = [["kd"], ["fitnet", "kd"], ["sp", "kd"], ["fitnet", "sp"], ["sp"]]


def many(seeds, **entries):
    return {
        "seeds": list(range(seeds)),
        "rows": ROWS,
        "pairs": [
            {"teacher": "resnet14_half", "student": "resnet8_quarter"},
            {"teacher": "resnet14_half", "student": "resnet8_half", "lr": 0.01},
        ],
        **entries,
    }


def fill(store, keys, checkpoints=False):
    record = {"test": {"top1": 50.0}, "kept": None, "history": [{"epoch": 1}] * 9}
    for key in keys:
        store.folder(key).mkdir(parents=True)
        for name in ("spec.json", RESULT):
            (store.folder(key) / name).write_text(json.dumps(record), encoding="utf-8")
        if checkpoints:
            torch.save({"epoch": 3}, store.folder(key) / CHECKPOINT)


def lines(store, matrix=None):
    return list(status._lines(store, matrix, None))


def test_planning_opens_no_file_for_a_cell(opened):
    plan_of(**many(1))  # what is read once: data sets, models
    with opened() as found:
        plan = plan_of(**many(200))
    assert len(plan.cells) == 2000
    assert found == []


def test_planning_writes_a_stage_out_once_for_all_seeds_and_rows(monkeypatch):
    written = Counter()
    document = StageSpec.document

    def counting(spec):
        written["documents"] += 1
        return document(spec)

    monkeypatch.setattr(StageSpec, "document", counting)
    sizes = []
    for seeds in (2, 20):
        plan_of(**many(seeds))
        sizes.append(written.pop("documents"))
    assert sizes[0] == sizes[1]


def test_planning_builds_each_stage_run_once(monkeypatch):
    built = Counter()
    sibling = StageSpec.sibling

    def counting(spec, *student):
        other = sibling(spec, *student)
        built[other.key] += 1
        return other

    monkeypatch.setattr(StageSpec, "sibling", counting)
    plan = plan_of(**many(3))
    assert set(built.values()) == {1}
    assert set(built) < set(plan.nodes)  # all but the teachers


@pytest.mark.parametrize("teacher", [{"epochs": 3}, {"epochs": 3, "seed": None}])
def test_every_key_is_that_of_its_document(teacher):
    middle = {"model": "resnet8_half", "stages": ["kd"], "seed_shift": 5}
    taught = {"name": "taught", "stages": [{"method": "kd", "teacher": "middle"}]}
    plan = plan_of(**many(2, assistants={"middle": middle}, rows=[*ROWS, taught], teacher=teacher))
    for key, spec in plan.nodes.items():
        assert key == spec.key == key_of(spec.document())
        assert StageSpec.from_document(spec.document()) == spec


def test_status_opens_nothing_of_what_is_done(tmp_path, opened):
    store = Store.open(tmp_path)
    plan = plan_of(**many(20))
    fill(store, plan.nodes, checkpoints=True)  # as a kill before the sweep leaves them
    with opened() as found:
        shown = lines(store)
    assert shown == [f"{tmp_path}: {len(plan.nodes)} done ({len(plan.nodes)} stage runs)"]
    heads = {key[:2] for key in plan.nodes}
    assert {name.partition(" ")[0] for name in found} == {"os.scandir"}
    assert len(found) == 1 + len(heads)


def test_status_of_a_matrix_looks_at_no_folder_that_is_not_there(tmp_path, opened):
    file = write_matrix(tmp_path, **many(20))
    store = Store(tmp_path / "nothing")
    plan = plan_of(**many(20))
    with opened() as found:
        shown = lines(store, file)
    assert shown[1].endswith(f"{len(plan.nodes)} missing ({len(plan.nodes)} stage runs)")
    # The matrix alone; the rows' settings are read before.
    assert [name for name in found if str(store.root) in name] == [
        f"os.scandir {store.root / 'stages'}"
    ]


def test_status_reads_the_epoch_of_what_was_stopped_and_of_nothing_else(tmp_path, opened):
    store = Store.open(tmp_path)
    plan = plan_of(**many(2))
    stopped, failed, *done = plan.nodes
    fill(store, done, checkpoints=True)
    for key in (stopped, failed):
        store.begin(plan.nodes[key])
        store.save_checkpoint(key, {"epoch": 7, "weights": torch.zeros(1000)})
    store.fail(failed, "diverged", "loss is NaN", 7)
    with opened() as found:
        _, *told = lines(store)
    assert sorted(told) == sorted(
        [
            f"  {stopped[:12]}  {plan.nodes[stopped].label}: stopped after 7 epochs; run again "
            "to go on",
            f"  {failed[:12]}  {plan.nodes[failed].label}: diverged: loss is NaN",
        ]
    )
    assert {Path(name).parent.name for name in found if CHECKPOINT in name} == {stopped}


def test_the_epoch_of_the_one_before_where_the_newest_cannot_be_read(tmp_path):
    store = Store.open(tmp_path)
    (key,) = list(plan_of(**many(1)).nodes)[:1]
    assert store.saved_epochs(key) == 0
    store.folder(key).mkdir(parents=True)
    for epoch in (1, 2):
        store.save_checkpoint(key, {"epoch": epoch, "weights": torch.zeros(1000)})
    assert store.saved_epochs(key) == 2
    newest = store.folder(key) / CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-100])
    assert store.saved_epochs(key) == 1
    (store.folder(key) / PREVIOUS).unlink()
    assert store.saved_epochs(key) == 0


def test_a_folder_that_is_no_stage_run_is_passed_over(tmp_path):
    store = Store.open(tmp_path)
    for name in ("ab/cdef", "abc/abcdef", "ab/abcdef"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    (tmp_path / "stages" / "note.txt").write_text("mine")
    (tmp_path / "stages" / "xy").write_text("mine too")
    assert store.folders() == {"abcdef"}
    assert list(store.stage_keys()) == []


def test_leaderboard_reads_each_result_once_and_no_other_file(tmp_path, opened):
    store = Store.open(tmp_path)
    plan = plan_of(**many(20))
    keys = list(plan.nodes)
    fill(store, keys[: len(keys) // 2])
    leaderboard_rows(plan, store)  # costs of networks are counted once
    with opened() as found:
        leaderboard_rows(plan, store)
    names = Counter(Path(name).name for name in found if name.startswith("open "))
    assert names == {RESULT: len(keys) // 2}


def test_leaderboard_tells_failures_of_those_that_have_a_folder(tmp_path):
    store = Store.open(tmp_path)
    plan = make_plan(plan_of(**many(1)).loaded)
    key = plan.cells[0].stages[0]
    store.begin(plan.nodes[key])
    store.fail(key, "diverged", "loss is NaN", 1)
    told = {row.status for row in leaderboard_rows(plan, store)}
    assert told == {"missing", "s0 diverged: loss is NaN"}
