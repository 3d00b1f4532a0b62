"""Several stage runs at once, in real processes: same bits, real kills, real shortages."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from command import Bench, finish, litter, outputs, records, results, tiny, wait_for
from plugin_site import install
from smskd_bench.store import Store
from wandb_log import logged_runs

STUDENT = "resnet8_quarter"
TWO = ("--workers", 2)
METHODS = ("slow", "deadly", "greedy", "starving")

PLUGIN = """
import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from smskd.methods import Method, Needs

HELD = []


class Plain(Method):
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs()

    def distill(self, signals, modules):
        self.disturb(signals.epoch)
        return {"kd": 0.5 * (signals.student.logits - signals.teacher.logits).square().mean()}


@dataclass(frozen=True)
class Slow(Plain):
    "Takes the time that a larger network would."
    name: ClassVar[str] = "slow"

    def disturb(self, epoch):
        time.sleep(float(os.environ.get("SLOW_S", "0")))


@dataclass(frozen=True)
class Deadly(Plain):
    name: ClassVar[str] = "deadly"

    def disturb(self, epoch):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Greedy(Plain):
    "Needs memory that is there only once; a process keeps what it has."
    name: ClassVar[str] = "greedy"

    def disturb(self, epoch):
        time.sleep(0.1)
        if not HELD:
            file = Path(os.environ["MEMORY"]).open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate") from None
            HELD.append(file)


@dataclass(frozen=True)
class Starving(Greedy):
    name: ClassVar[str] = "starving"

    def disturb(self, epoch):
        super().disturb(epoch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a package of methods, as an installer leaves it."""
    methods = {name: name.title() for name in METHODS}
    return install(tmp_path_factory.mktemp("site"), "smskd_pool_plugin", PLUGIN, methods)


def environment(bench, site, **more):
    path = os.pathsep.join([bench.environment()["PYTHONPATH"], str(site)])
    return {"PYTHONPATH": path, **more}


def children(process):
    """Worker processes that run now, by process id."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == process.pid and "spawn_main" in words:
            found.append(int(folder.name))
    return found


def is_alive(pid):
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def under_way(store):
    """Stage runs with a checkpoint that somebody holds."""
    opened = Store(store)
    return [key for key in checkpoints(store) if opened.is_running(key)]


def checkpoints(store):
    """When each checkpoint was written; cheap, so that asking often takes no core away."""
    files = store.glob("stages/*/*/checkpoint.pt")
    return {file.parent.name: file.stat().st_mtime_ns for file in files if file.exists()}


# The same results, and their mirror.


@pytest.fixture(scope="module")
def pooled(finished, tmp_path_factory):
    """The matrix of `finished` by two workers, mirrored offline."""
    bench = Bench(tmp_path_factory.mktemp("pooled"))
    store = bench.folder / "store"
    return store, bench.run(finished.matrix, store, *TWO, "--tracking", "wandb")


def test_two_workers_end_in_the_bits_of_one(finished, pooled):
    store, done = pooled
    ours, theirs = outputs(store), outputs(finished.store)
    assert ours == theirs
    assert litter(store) == []
    assert f"{len(theirs)} stage runs trained, 0 already there, 0 failed" in done.out
    for key, result in records(store).items():
        assert result["test"] == records(finished.store)[key]["test"]
        assert result["environment"]["threads"] == 1
    table, other = (out[out.index("┏") : out.index("└")] for out in (done.out, finished.done.out))
    assert table == other


def test_stage_runs_that_interleave_are_mirrored_whole(pooled):
    store, _ = pooled
    logged = {run.run.run_id: run for run in logged_runs(store / "wandb")}
    assert set(logged) == {key[:16] for key in records(store)}
    spans = []
    for key, result in records(store).items():
        run = logged[key[:16]]
        assert [{k: v for k, v in row.items() if k[0] != "_"} for row in run.rows] == result[
            "history"
        ]
        assert run.summary["test_top1"] == result["test"]["top1"]
        assert (run.exit_code, run.summary["status"]) == (0, "done")
        inputs = {a.name for a in run.artifacts if a.use_after_commit}
        spec = result["spec"]
        assert inputs == {f"student-{k[:16]}" for k in (*spec["teachers"], spec["parent"]) if k}
        spans.append((run.rows[0]["_timestamp"], run.rows[-1]["_timestamp"]))
    spans.sort()
    assert any(one[1] > other[0] for one, other in pairwise(spans))


# Kills.


def slow_matrix(bench):
    rows = (["scratch"], ["slow", "kd"])
    document = tiny(*rows, seeds=[0, 1], plugins=["slow"], teacher={"epochs": 1, "seed": 0})
    document["recipe"]["epochs"] = [16, 1]
    return bench.matrix(document)


def slow_ones(store):
    """Those of the two slow stage runs."""
    found = checkpoints(store)
    return {key: time for key, time in found.items() if is_slow(store, key)}


def is_slow(store, key):
    return Store(store).spec_document(key)["methods"][0]["name"] == "slow"


@pytest.mark.slow
def test_a_killed_worker_then_ctrl_c_then_a_killed_parent(bench, site):
    matrix, store = slow_matrix(bench), bench.folder / "store"
    env = environment(bench, site, SLOW_S="0.6")  # an epoch; a new worker takes seconds to start
    reference = bench.start_run(matrix, bench.folder / "reference", **environment(bench, site))

    process = bench.start_run(matrix, store, *TWO, **env)
    wait_for(lambda: len(slow_ones(store)) == len(under_way(store)) == 2, process)
    first, second = children(process)
    os.kill(first, signal.SIGKILL)
    before = slow_ones(store)
    wait_for(lambda: all(slow_ones(store).get(k, 0) > before[k] for k in before), process)
    workers = children(process)
    assert len(workers) == 2
    assert second in workers
    for pid in (*workers, process.pid):  # a terminal sends it to all of them
        os.kill(pid, signal.SIGINT)
    done = finish(process, expect=130)
    assert done.err.startswith("\nstopped; the same command goes on from the last checkpoint:\n")
    assert done.out.count("its worker process died (signal 9); once more") == 1
    check_stopped(store, workers)
    assert not list(store.rglob("*.tmp"))
    finish(reference)

    kept = slow_ones(store)
    process = bench.start_run(matrix, store, *TWO, **env)
    wait_for(lambda: slow_ones(store) != kept, process)
    workers = children(process)
    process.kill()
    _, err = process.communicate(timeout=30)
    assert err == ""
    check_stopped(store, workers)

    bench.run(matrix, store, **environment(bench, site))
    assert outputs(store) == outputs(bench.folder / "reference")
    assert litter(store) == []
    slow = [r["sessions"] for name, r in results(store).items() if f"{STUDENT}/slow/" in name]
    begun = sorted([session["from_epoch"] for session in sessions] for sessions in slow)
    print(f"\nepochs from which each was taken up: {begun}")
    assert sum(map(len, begun)) >= 3 + 3
    assert all(epochs == sorted(epochs) and epochs[1] >= 1 for epochs in begun)


def check_stopped(store, workers):
    """No process is left, nobody holds anything, and the checkpoints are there."""
    wait_for(lambda: not any(map(is_alive, workers)), None, timeout_s=10.0)
    assert under_way(store) == []
    assert len(checkpoints(store)) == 2
    assert not list(store.rglob("failed.json"))


def test_deaths_and_shortages_are_the_affair_of_their_stage_runs(bench, site):
    document = tiny(
        ["scratch"],
        ["greedy"],
        ["starving"],
        ["deadly", "kd"],
        plugins=list(METHODS[1:]),
        teacher={"epochs": 1},
    )
    matrix, store = bench.matrix(document), bench.folder / "store"
    memory = str(bench.folder / "memory")
    done = bench.run(matrix, store, *TWO, expect=4, **environment(bench, site, MEMORY=memory))
    counts, *failures = closing(done)
    assert counts.startswith("3 stage runs trained, 0 already there, 3 failed")
    died = "failed: its worker process died (signal 9)"
    assert failures[:3] == [
        f"  {STUDENT} starving s0 stage 1: out_of_memory: CUDA out of memory. Tried to allocate more",
        f"  {STUDENT} deadly s0 stage 1: {died}",
        f"  {STUDENT} kd s0 stage 2: blocked: {STUDENT} deadly s0 stage 1 {died}",
    ]
    assert done.out.count("deadly s0 stage 1: its worker process died (signal 9); once more") == 1
    put_back = [line for line in done.out.splitlines() if "out of memory beside others" in line]
    assert 1 <= len(put_back) <= 2
    assert all(line.endswith("to run with no more than 1 stage run at once") for line in put_back)
    failed = {
        f["status"]: f for f in (json.loads(p.read_text()) for p in store.rglob("failed.json"))
    }
    assert (failed["failed"]["epoch"], failed["out_of_memory"]["epoch"]) == (1, 0)
    assert litter(store) == []


def closing(done):
    """The line that counts, and those after it."""
    lines = done.out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if "stage runs trained" in line) :]


# What stops everything.


@pytest.mark.slow
def test_a_damaged_teacher_stops_a_pool_with_one_message(bench, finished, copied):
    teacher = Store(copied).folder(results(copied)["resnet8_half/scratch/s0"]["key"])
    for name in ("kd", "fitnet"):
        key = results(copied)[f"{STUDENT}/{name}/s0"]["key"]
        (Store(copied).folder(key) / "result.json").unlink()
    weights = teacher / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = bench.run(finished.matrix, copied, *TWO, expect=3)
    assert done.err.startswith(f"error: {weights} cannot be read: ")
    assert "delete its folder, and run the matrix again" in done.err
    assert len(done.err.splitlines()) == 2
    assert not list(copied.rglob("failed.json"))
