"""Cleaning up beside a real run: what it needs stays, what nobody needs goes."""

import shutil
import signal

import pytest
from command import finish, outputs, records, results, tiny, wait_for
from smskd_bench.store import Store

STUDENT = "resnet8_quarter"


@pytest.mark.slow
def test_beside_a_real_run(bench, finished, copied):
    """One matrix is kept, one is running, and what belongs to neither goes."""
    keep = bench.matrix(tiny({"stages": ["kd", "fitnet"], "name": "swapped"}), "keep")
    runs = bench.matrix(tiny(["dkd"], ["fitnet", "kd"], recipe={"epochs": [40, 2]}), "runs")
    gone = {results(copied)[f"{STUDENT}/{row}/s0"]["key"] for row in ("scratch", "fitnet+kd")}
    process = bench.start_run(runs, copied)
    wait_for(lambda: bool(list(copied.glob("stages/*/*/checkpoint.pt"))), process)
    process.send_signal(signal.SIGSTOP)  # alive, and exactly there
    (held,) = (key for key in Store(copied).stage_keys() if Store(copied).is_running(key))
    listed = bench("gc", "--store", copied, "--matrix", keep).out
    assert "nothing was deleted: add --delete" in listed
    done = bench("gc", "--store", copied, "--matrix", keep, "--delete")
    process.send_signal(signal.SIGCONT)
    assert "kept for running processes" in done.out
    assert held[:12] not in done.out
    assert all(key[:12] in listed and key[:12] in done.out for key in gone)
    assert gone.isdisjoint(records(copied))
    assert finish(process).out.count(" failed; store") == 1
    left = {name for name in results(copied) if name.startswith(STUDENT)}
    assert left == {
        f"{STUDENT}/{row}/s0" for row in ("kd", "kd>fitnet", "dkd", "fitnet", "fitnet>kd")
    }
    # What both boards need was trained once only, and both are complete.
    for matrix in (keep, runs):
        assert "0 stage runs trained" in bench.run(matrix, copied).out
    assert set(outputs(copied)) == set(records(copied))


@pytest.mark.slow
def test_what_a_killed_run_left_goes_and_it_goes_on(bench, undisturbed):
    store = bench.folder / "store"
    process = bench.start_run(undisturbed.matrix, store)
    wait_for(lambda: bool(list(store.glob("stages/*/*/checkpoint.pt"))), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    other = bench.matrix(tiny(["kd"], teacher={"epochs": 1}), "other")
    done = bench("gc", "--store", store, "--matrix", undisturbed.matrix, "--delete")
    assert "1 thing, " in done.out  # what it began is not done, but referred to
    assert "(of a killed process)" in done.out
    assert "not done" in bench("gc", "--store", store, "--matrix", other).out
    bench("gc", "--store", store, "--matrix", other, "--delete")
    assert list(Store(store).stage_keys()) == []
    bench.run(undisturbed.matrix, store)
    assert outputs(store) == outputs(undisturbed.store)


def test_gc_and_migrate_refuse_what_they_cannot_do(bench, finished, copied):
    (copied / "store.json").write_text('{"format": 2}')
    before = sorted(copied.rglob("*"))
    for words in (("gc", "--delete"), ("migrate",)):
        done = bench(*words, "--store", copied, expect=3)
        assert "has format 2; this version reads format 1" in done.err
    assert sorted(copied.rglob("*")) == before
    assert "no such file" in bench("gc", "--matrix", "nothing.yaml", expect=2).err
    (copied / "store.json").write_text('{"format": 1}')
    assert "nothing to do" in bench("migrate", "--store", copied).out
    shutil.rmtree(copied)
    assert "there is no store" in bench("gc", "--store", copied, expect=3).err
