"""How many stage runs at once: what a plan allows, what a machine has."""

import itertools
import os

import pytest
import torch
from matrices import plan_of
from smskd_bench import parallel
from smskd_bench.executors.jobs import JobQueue
from smskd_bench.executors.ledger import Ledger, Outcome
from smskd_bench.executors.observing import Observers
from smskd_bench.parallel import Parallelism, choose_workers, cores, memory_bytes, width
from smskd_bench.store import Store

ROWS = [["scratch"], ["kd"], ["kd", "fitnet"], ["kd", "kd", "fitnet"], ["scratch", "kd"]]


def widest(plan, keys):
    """The same by trying every set: no two of it may wait for each other."""
    before = {}
    for key, spec in plan.nodes.items():
        before[key] = set(spec.depends_on).union(*(before[k] for k in spec.depends_on))
    free = [
        {a, b}
        for a, b in itertools.combinations(keys, 2)
        if a not in before[b] and b not in before[a]
    ]
    for size in range(len(keys), 1, -1):
        for group in itertools.combinations(keys, size):
            if all({a, b} in free for a, b in itertools.combinations(group, 2)):
                return size
    return len(keys[:1])


@pytest.mark.parametrize("count", range(1, len(ROWS) + 1))
def test_width_is_the_greatest_number_that_can_be_ready_at_once(count):
    plan = plan_of(rows=ROWS[:count])
    keys = list(plan.nodes)
    assert width(plan, keys) == widest(plan, keys)
    for left in (keys[1:], keys[:-1], keys[::2], []):
        assert width(plan, left) == widest(plan, left)


def test_width_of_a_large_plan_takes_no_time():
    pairs = [{"teacher": t, "student": s} for t in ("resnet14_half", "resnet8_half") for s in ("resnet8_quarter", "resnet8")]  # fmt: skip
    rows = [
        [a, b, c]
        for a in ("kd", "fitnet", "sp")
        for b in ("kd", "at", "dkd")
        for c in ("kd", "rkd", "sp")
    ]
    plan = plan_of(rows=rows, pairs=pairs, seeds=list(range(5)), recipe={"epochs": [2, 1, 1]})
    assert width(plan, plan.nodes) == len(plan.cells) == 540


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine of eight cores and enough memory, with torch at its default."""
    monkeypatch.setattr(parallel, "cores", lambda: 8)
    monkeypatch.setattr(parallel, "memory_bytes", lambda: 64 * 2**30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


def test_auto_fills_the_cores_but_not_beyond_the_plan(eight_cores, monkeypatch):
    narrow = plan_of(rows=[["scratch"], ["kd"]])  # teacher and plain student at once
    wide = plan_of(rows=[["scratch"], ["kd"]], seeds=list(range(20)))
    assert choose_workers("auto", narrow, narrow.nodes, "cpu") == Parallelism(2, 4)
    assert choose_workers("auto", wide, wide.nodes, "cpu") == Parallelism(8, 1)
    assert choose_workers("auto", wide, wide.nodes, "cpu", threads=3) == Parallelism(2, 3)
    monkeypatch.setattr(parallel, "memory_bytes", lambda: 3 * 2**30)
    assert choose_workers("auto", wide, wide.nodes, "cpu").workers == 3


def test_threads_do_not_depend_on_what_is_left(eight_cores):
    plan = plan_of(rows=[["scratch"], ["kd"]], seeds=[0, 1])
    whole = choose_workers("auto", plan, plan.nodes, "cpu")
    rest = choose_workers("auto", plan, list(plan.nodes)[-1:], "cpu")
    assert (whole.workers, rest.workers) == (4, 1)
    assert whole.threads == rest.threads == 2


def test_one_worker_leaves_torch_as_it_is(eight_cores):
    plan = plan_of()
    assert choose_workers(1, plan, plan.nodes, "cpu") == Parallelism(1, None)
    assert choose_workers("auto", plan, plan.nodes, "cpu") == Parallelism(1, None)  # a chain
    assert choose_workers(1, plan, plan.nodes, "cpu", threads=5) == Parallelism(1, 5)


def test_a_number_stays_but_for_what_the_plan_cannot_use(eight_cores):
    plan = plan_of(rows=[["scratch"], ["kd"]], seeds=[0, 1])
    assert choose_workers(3, plan, plan.nodes, "cpu") == Parallelism(3, 2)
    assert choose_workers(100, plan, plan.nodes, "cpu") == Parallelism(4, 1)


def test_a_gpu_takes_what_was_measured(eight_cores):
    plan = plan_of(seeds=list(range(20)))
    assert choose_workers("auto", plan, plan.nodes, "cuda").workers == 1
    assert choose_workers("auto", plan, plan.nodes, "cuda:0", measured=lambda: 6).workers == 6
    assert choose_workers(2, plan, plan.nodes, "cuda", measured=lambda: 6).workers == 2


def test_torch_with_fewer_threads_keeps_them(eight_cores, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as with OMP_NUM_THREADS=1
    plan = plan_of(rows=[["scratch"], ["kd"]])
    assert choose_workers("auto", plan, plan.nodes, "cpu") == Parallelism(2, 1)


def test_this_machine():
    assert 1 <= cores() <= os.cpu_count()
    assert 2**28 < memory_bytes() < 2**50


def test_limits_of_control_groups_count(tmp_path, monkeypatch):
    inner = tmp_path / "slice" / "job"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("3:cpuset:/\n0::/slice/job\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slice" / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("1073741824\n")
    (tmp_path / "slice" / "memory.max").write_text("max\n")
    groups = parallel._control_groups(tmp_path, tmp_path / "own")
    assert groups == [inner, inner.parent, tmp_path]
    assert parallel._control_groups(tmp_path, tmp_path / "none") == []
    monkeypatch.setattr(parallel, "_control_groups", lambda: groups)
    assert cores() == 1
    assert memory_bytes() == 2**30


def test_jobs_come_in_plan_order_as_they_get_ready(tmp_path):
    plan = plan_of(
        rows=[["scratch"], ["kd", "fitnet"]], seeds=[0, 1], teacher={"epochs": 3, "seed": 0}
    )
    ledger = Ledger(plan, Store.open(tmp_path), Observers([]))
    queue, keys = JobQueue(plan, ledger), list(plan.nodes)
    names = {key: spec.label for key, spec in plan.nodes.items()}
    first = [queue.take() for _ in range(4)]
    assert [names[job[0].key] for job in first[:3]] == [
        "resnet14_half scratch s0 stage 1", "resnet8_quarter scratch s0 stage 1", "resnet8_quarter scratch s1 stage 1",
    ]  # fmt: skip
    assert first[3] is None
    queue.put_back(first[1])
    queue.put_back(first[0])
    assert [queue.take(), queue.take()] == first[:2]
    ledger.settle(Outcome(first[0][0].key, "done"))
    assert [names[queue.take()[0].key] for _ in range(2)] == [
        f"resnet8_quarter kd s{s} stage 1" for s in (0, 1)
    ]
    for key in keys[:4]:
        ledger.settle(Outcome(key, "failed", "why"))
    assert queue.take() is None  # of what is left, all waits or is blocked
