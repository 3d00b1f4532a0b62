"""Real kills of the real process: the same command goes on and ends in the same bits."""

import os
import random
import signal
import subprocess
import time

import pytest
from command import kill, litter, outputs, records, wait_for
from smskd_bench.store import Store

TEACHER, FIRST, SECOND = ("scratch", 1), ("fitnet", 1), ("kd", 2)


def saved(store):
    """Epochs in the checkpoints, by key."""
    opened, found = Store(store), {}
    for key in opened.stage_keys():
        state = opened.checkpoint(key)
        if state and not opened.is_done(key):
            found[key] = state["epoch"]
    return found


def taken_up(store):
    """When each stage run was last taken up."""
    return {p.parent.name: p.stat().st_mtime for p in store.glob("stages/*/*/spec.json")}


def taken_up_since(store, before):
    return lambda: taken_up(store) != before


def seconds_since_checkpoint(store, before, sent):
    """How old the last checkpoint of the killed process was; None if it had written none."""
    mine = [key for key, time in taken_up(store).items() if before.get(key) != time]
    ages = [
        sent - path.stat().st_mtime
        for key in mine
        if (path := Store(store).folder(key) / "checkpoint.pt").exists()
        and path.stat().st_mtime > taken_up(store)[key]
    ]
    return min(ages, default=None)


def reached(store, place, epoch):
    """Whether a stage run of that method and stage has saved that epoch, or is done."""
    opened = Store(store)
    for key in opened.stage_keys():
        spec = opened.spec_document(key)
        if (spec["methods"][0]["name"], spec["number"]) == place:
            state = opened.checkpoint(key)
            return opened.is_done(key) or (state is not None and state["epoch"] >= epoch)
    return False


def check_end(store, undisturbed, resumed):
    """Same bits as without kills, nothing left over, and every resume began at its checkpoint."""
    assert outputs(store) == outputs(undisturbed)
    assert litter(store) == []
    ours, theirs = records(store), records(undisturbed)
    timed = ("seconds", "images_per_s")
    for key, result in ours.items():
        for name in ("test", "kept"):
            assert result[name] == theirs[key][name]
        for row, other in zip(result["history"], theirs[key]["history"], strict=True):
            assert {k: v for k, v in row.items() if k not in timed} == {
                k: v for k, v in other.items() if k not in timed
            }
    for key, epoch in resumed:
        assert epoch in [session["from_epoch"] for session in ours[key]["sessions"]]


def test_kills_in_teacher_first_and_second_stage(bench, undisturbed):
    matrix, store, resumed = undisturbed.matrix, bench.folder / "store", []
    moments = ((TEACHER, 2), (FIRST, 2), (SECOND, 2))
    for place, epoch in moments:
        process = bench.start_run(matrix, store)
        wait_for(lambda at=(place, epoch): reached(store, *at), process)
        kill(process)
        assert process.returncode == -signal.SIGKILL
        resumed += saved(store).items()
        assert not any(Store(store).is_running(key) for key in taken_up(store))
    # On a busy machine a stage run may have ended before its signal came.
    assert len(moments) - 1 <= len(resumed) <= len(moments)
    status = bench("status", "--store", store).out
    bench.run(matrix, store)
    check_end(store, undisturbed.store, resumed)
    assert sum(len(r["sessions"]) - 1 for r in records(store).values()) == len(resumed)
    assert f"stopped after {resumed[-1][1]} epochs; run again to go on" in status


def random_kills(bench, undisturbed, kills, longest_s):
    """Kill at random moments, store after store; returns how old the checkpoints were, in s."""
    seed = int(os.environ.get("SMSKD_KILL_SEED", time.time_ns() % 1_000_000))
    draw, matrix = random.Random(seed), undisturbed.matrix
    ages, stores = [], 0
    while len(ages) < kills:
        stores += 1
        store, resumed, ended = bench.folder / f"store{stores}", [], False
        while len(ages) < kills and not ended:
            before = taken_up(store)
            process = bench.start_run(matrix, store)
            if draw.random() < 0.8:  # else also while it starts
                moved = taken_up_since(store, before)
                wait_for(lambda m=moved, p=process: m() or p.poll() is not None, process)
            try:
                process.wait(draw.uniform(0.0, longest_s))
                ended = True
            except subprocess.TimeoutExpired:
                sent = kill(process)
                ages.append(seconds_since_checkpoint(store, before, sent))
                resumed += saved(store).items()
        bench.run(matrix, store)
        check_end(store, undisturbed.store, resumed)
    rows = [row for result in records(undisturbed.store).values() for row in result["history"]]
    longest = max(row["seconds"] for row in rows)
    shown = ", ".join("none yet" if age is None else f"{age:.2f}" for age in ages)
    print(f"\nseed {seed}: {kills} kills in {stores} stores; all outputs equal to undisturbed ones")
    print(f"seconds since the last checkpoint: {shown}; longest undisturbed epoch {longest:.2f}")
    return [age for age in ages if age is not None], longest


@pytest.mark.slow
def test_kills_at_random_moments(bench, undisturbed):
    random_kills(bench, undisturbed, kills=3, longest_s=3.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_kills_at_random_moments(bench, undisturbed):
    ages, longest = random_kills(bench, undisturbed, kills=30, longest_s=4.0)
    assert sorted(ages)[len(ages) // 2] < 2 * longest + 0.2  # the median: the machine may be busy


def test_what_a_kill_inside_a_write_leaves_is_cleared(bench, finished, copied):
    """Moments too short to hit by chance, made by hand from what is on disk at them."""
    results = sorted(copied.glob("stages/*/*/result.json"))
    torn, damaged, between = (path.parent for path in results[:3])
    for folder in (torn, damaged):
        for name in ("result.json", "student.safetensors", "predictions.safetensors"):
            (folder / name).unlink()
    # Inside the write of the first checkpoint.
    (torn / ".checkpoint.pt.4711.tmp").write_bytes(b"half of one")
    # Not by a kill, but by a disk: a checkpoint that cannot be read means to start over.
    (damaged / "checkpoint.pt").write_bytes(b"PK\x03\x04 half of one")
    # After the result, before the checkpoint was removed.
    (between / "checkpoint.pt").write_bytes(b"of no use any more")
    # After the lock, before the specification.
    locked = copied / "stages" / "ab" / ("ab" * 32)
    locked.mkdir(parents=True)
    (locked / "lock").touch()
    assert "6 done, 2 missing (8 stage runs)" in bench("status", "--store", copied).out
    bench.run(finished.matrix, copied)
    assert outputs(copied) == outputs(finished.store)
    assert litter(copied) == []
