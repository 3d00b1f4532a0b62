"""Real signals to real runs in the middle of long epochs: a checkpoint there, and the same bits."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Bench, finish, litter, outputs, records, tiny, wait_for
from smskd_bench.store import Store

SIGNALS = {"ctrl-c": signal.SIGINT, "scheduler": signal.SIGTERM, "terminal": signal.SIGHUP}
STEPS = 300
"""Of an epoch: three seconds or so."""


@pytest.fixture(scope="module")
def long_epochs(tmp_path_factory):
    """A matrix whose last stage is one epoch of some seconds, and its undisturbed end."""
    pairs = [{"teacher": "resnet8_half", "student": "resnet8"}]
    document = tiny(["fitnet", "kd"], pairs=pairs, teacher={"epochs": 1})
    document["dataset"]["train_size"] = 2 * STEPS
    document["recipe"] |= {"epochs": [1, 1], "batch_size": 2}
    bench = Bench(tmp_path_factory.mktemp("long"))
    matrix, store = bench.matrix(document), bench.folder / "store"
    bench.run(matrix, store)
    return matrix, store


def teacher_of(undisturbed, store):
    """A store that has the teacher only; the first stage warms the process up for the second."""
    shutil.copytree(undisturbed, store)
    opened = Store(store)
    for key in opened.stage_keys():
        if opened.spec_document(key)["model"] == "resnet8":
            shutil.rmtree(opened.folder(key))
    return store


def in_second_stage(store):
    """Whether the second stage run has been taken up and not ended."""
    opened = Store(store)
    return any(
        opened.spec_document(key)["number"] == 2 and opened.is_running(key)
        for key in opened.stage_keys()
    )


def places(store):
    """Where unfinished stage runs stand: epochs and steps."""
    opened = Store(store)
    states = [opened.checkpoint(key) for key in opened.stage_keys() if not opened.is_done(key)]
    return [(state["epoch"], state["steps"]) for state in states if state]


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(
            number,
            workers,
            marks=[] if workers == 1 + i == 1 else pytest.mark.slow,
            id=f"{name}-{workers}",
        )
        for i, (name, number) in enumerate(SIGNALS.items())
        for workers in (1, 2)
    ],
)
def test_a_stop_in_an_epoch_loses_no_step(bench, long_epochs, number, workers):
    matrix, undisturbed = long_epochs
    store = teacher_of(undisturbed, bench.folder / "store")
    process = bench.start_run(matrix, store, "--workers", workers)
    wait_for(lambda: in_second_stage(store), process)
    time.sleep(0.5)  # into the epoch
    sent = time.perf_counter()
    process.send_signal(number)
    done = finish(process, expect=128 + number)
    print(f"stopped {time.perf_counter() - sent:.2f} s after the signal")
    if number != signal.SIGHUP:  # to a terminal that is gone nothing is said
        assert "the same command goes on from the last checkpoint" in done.err
        assert f"--store {store}" in done.err
    ((epoch, steps),) = places(store)
    assert 0 < steps < STEPS
    assert not any(Store(store).is_running(key) for key in Store(store).stage_keys())
    finish(bench.start_run(matrix, store, "--workers", workers))
    assert outputs(store) == outputs(undisturbed)
    assert litter(store) == []
    (sessions,) = [r["sessions"] for r in records(store).values() if len(r["sessions"]) > 1]
    assert (sessions[1]["from_epoch"], sessions[1]["from_step"]) == (epoch, steps)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(bench, long_epochs):
    matrix, undisturbed = long_epochs
    store = teacher_of(undisturbed, bench.folder / "store")
    process = bench.start_run(matrix, store)
    wait_for(lambda: in_second_stage(store), process)
    # Held in the middle of a step, as a very long one would be.
    os.kill(process.pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 128 + signal.SIGINT)
    bench.run(matrix, store)
    assert outputs(store) == outputs(undisturbed)


@pytest.mark.slow
def test_a_run_under_nohup_does_not_mind_its_terminal(bench, long_epochs):
    matrix, undisturbed = long_epochs
    store = teacher_of(undisturbed, bench.folder / "store")
    hardened = Bench(bench.folder / "hardened", prefix=("nohup",))
    process = hardened.start_run(matrix, store)
    wait_for(lambda: in_second_stage(store), process)
    process.send_signal(signal.SIGHUP)
    finish(process)
    assert outputs(store) == outputs(undisturbed)


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_with_a_checkpoint(bench, long_epochs):
    matrix, undisturbed = long_epochs
    store = teacher_of(undisturbed, bench.folder / "store")
    command = [sys.executable, "-m", "smskd_bench.cli", "run", "--matrix", matrix, "--store", store,
               "--threads", "1", "--workers", "1", "--tracking", "none"]  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(bench.folder / "cwd")
        os.execvpe(command[0], list(map(str, command)), bench.environment(TERM="xterm"))
    end = time.monotonic() + 60
    while not in_second_stage(store) and time.monotonic() < end:
        if os.read(terminal, 4096) == b"":
            break
    time.sleep(0.5)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    ((_, steps),) = places(store)
    assert steps > 0
    assert (
        subprocess.run(["pgrep", "-f", str(store)], check=False, capture_output=True).stdout == b""
    )


def test_memory_that_ran_out_is_tried_once_more_with_less(bench, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHORTAGE)
    matrix, store = bench.matrix(tiny(["kd"])), bench.folder / "store"
    paths = f"{site}{os.pathsep}{bench.environment()['PYTHONPATH']}"
    done = finish(bench.start_run(matrix, store, PYTHONPATH=paths))
    assert "out of memory (short of memory, said the test); once more, with less" in done.out
    assert Path(store / "shortage").exists() is False
    assert len(records(store)) == 2


SHORTAGE = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "smskd_bench.worker":
            return None
        sys.meta_path.remove(self)
        import importlib, smskd.train
        real, calls = smskd.train.train_group, []
        def train_group(*args):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError("short of memory, said the test")
            return real(*args)
        smskd.train.train_group = train_group
        return None

sys.meta_path.insert(0, Finder())
"""
