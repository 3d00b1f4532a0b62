"""Two processes on every stage run, as torchrun starts them: the results of one, and its resumes."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from command import finish, litter, outputs, records, results, tiny, wait_for
from safetensors.torch import load_file
from smskd_bench.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def start(bench):
    """Start the command in two processes; at the end none is left."""
    started = []

    def run(matrix, store, *words):
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = ("--matrix", matrix, "--store", store, "--tracking", "none", "--threads", "1")
        words = [*torchrun, "-m", "smskd_bench.distributed", *options, *words]
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=bench.environment(), cwd=bench.folder / "cwd",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


@pytest.fixture
def matrix(bench):
    document = tiny(["fitnet", "kd"], teacher={"epochs": 3})
    document["dataset"] |= {"dev_size": 100, "train_size": 400}
    document["recipe"] |= {"epochs": [4, 4], "carry": "best_on_dev"}
    return bench.matrix(document)


def largest_difference(store, other):
    found = 0.0
    for path in store.glob("stages/*/*/student.safetensors"):
        ours, theirs = load_file(path), load_file(other / path.relative_to(store))
        found = max(
            found, *(float((ours[n].float() - theirs[n].float()).abs().max()) for n in ours)
        )
    return found


def test_two_processes_train_what_one_trains(bench, start, tmp_path):
    # Steps in which a last digit decides on which side of a ReLU's kink a pixel falls part company
    # in one process too; these have none.
    document = tiny(["kd"], ["fitnet", "kd"], ["sp"], teacher={"epochs": 1})
    document["recipe"] |= {"epochs": [1, 1]}
    matrix = bench.matrix(document)
    done = finish(start(matrix, tmp_path / "store"))
    assert "5 stage runs trained, 0 already there, 0 failed" in done.out
    assert done.out.count("5 stage runs trained") == 1
    bench.run(matrix, tmp_path / "local", "--teacher-table", "off")
    assert results(tmp_path / "store").keys() == results(tmp_path / "local").keys()
    assert largest_difference(tmp_path / "store", tmp_path / "local") < 1e-4
    assert litter(tmp_path / "store") == []
    sessions = [s for r in records(tmp_path / "store").values() for s in r["sessions"]]
    assert {session["processes"] for session in sessions} == {2}


def until_saved(store, process):
    wait_for(lambda: any(store.glob("stages/*/*/checkpoint.previous.pt")), process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_stopped_and_gone_on_with_in_the_same_bits(matrix, start, tmp_path, number):
    finish(start(matrix, tmp_path / "undisturbed"))
    store = tmp_path / "store"
    process = start(matrix, store)
    until_saved(store, process)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
        process.communicate()
    else:
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode != 0
    opened = Store(store)
    # torchrun starts the processes in sessions of their own; they see that it is gone.
    wait_for(lambda: not any(opened.is_running(key) for key in opened.stage_keys()), None, 10.0)
    assert not list(store.glob("stages/*/*/failed.json"))
    finish(start(matrix, store))
    assert outputs(store) == outputs(tmp_path / "undisturbed")
    assert sum(len(r["sessions"]) - 1 for r in records(store).values()) >= 1


def test_what_cannot_be_divided_is_refused_before_anything(bench, start, tmp_path):
    process = start(bench.matrix(tiny(["kd"], ["crd"])), tmp_path / "store")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "cannot be divided among processes: crd draw random numbers" in err
    assert not list(tmp_path.glob("store/stages/*"))


def test_without_torchrun_it_says_how(bench, tmp_path):
    command = [sys.executable, "-m", "smskd_bench.distributed", "--matrix"]
    done = subprocess.run(
        [*command, bench.matrix(tiny(["kd"]))], env=bench.environment(), capture_output=True,
        text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    assert "torchrun --nproc-per-node 2 -m smskd_bench.distributed --matrix FILE" in done.stderr
    assert torch.distributed.is_available()
