"""Runs on a real SLURM of one node with two GPUs that are none: same bits as without it."""

import os
import signal
import subprocess

import pytest
from command import finish, litter, outputs, records, results, tiny, wait_for
from slurm import cluster
from smskd_bench.store import Store

pytestmark = pytest.mark.slow

GPU = ("--slurm-option", "gres=gpu:1")

PLUGIN = """
import os
import signal
from dataclasses import dataclass
from typing import ClassVar

from smskd.methods import Method, Needs


class Plain(Method):
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs()

    def distill(self, signals, modules):
        self.disturb(signals.epoch)
        return {"kd": 0.5 * (signals.student.logits - signals.teacher.logits).square().mean()}


@dataclass(frozen=True)
class Mortal(Plain):
    name: ClassVar[str] = "mortal"

    def disturb(self, epoch):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Broken(Plain):
    name: ClassVar[str] = "broken"

    def disturb(self, epoch):
        raise RuntimeError("something is wrong with this method")
"""


@pytest.fixture(scope="module")
def slurm():
    with cluster() as started:
        yield started


@pytest.fixture
def start(bench, slurm):
    """Start ``run`` on the cluster; at the end nothing of it may be left."""

    def run(matrix, store, *words, jobs=1, **env):
        on = ("--executor", "slurm", "--slurm-jobs", jobs, *GPU)
        return bench.start_run(matrix, store, *on, *words, **{**slurm.environment, **env})

    yield run
    bench.close()
    gone = slurm.wait(lambda: not slurm.jobs(), 20.0)
    if not gone:
        slurm("scancel", *slurm.jobs())
    assert gone, "jobs were left in the queue"


@pytest.fixture
def site(tmp_path):
    """A folder with a package of methods, as an installer leaves it."""
    folder = tmp_path / "site"
    info = folder / "smskd_slurm_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: smskd-slurm-plugin\nVersion: 1.0\n"
    (info / "METADATA").write_text(text)
    names = "\n".join(f"{n} = smskd_slurm_plugin:{n.title()}" for n in ("mortal", "broken"))
    (info / "entry_points.txt").write_text(f"[smskd.methods]\n{names}\n")
    (folder / "smskd_slurm_plugin.py").write_text(PLUGIN)
    return folder


def saved_epochs(store):
    """Epochs in the checkpoints of what is under way."""
    opened = Store(store)
    states = [opened.checkpoint(p.parent.name) for p in store.glob("stages/*/*/checkpoint.pt")]
    return [state["epoch"] for state in states if state]


def until_saved(store, process, epoch=2):
    wait_for(lambda: any(e >= epoch for e in saved_epochs(store)), process)


def resumed(store):
    return sum(len(record["sessions"]) - 1 for record in records(store).values())


def test_two_jobs_share_a_matrix(bench, start, slurm, tmp_path):
    matrix = bench.matrix(tiny(["scratch"], ["kd"], ["fitnet", "kd"]))
    done = finish(start(matrix, tmp_path / "store", jobs=2))
    bench.run(matrix, tmp_path / "local")
    assert outputs(tmp_path / "store") == outputs(tmp_path / "local")
    assert litter(tmp_path / "store") == []
    assert "5 stage runs trained, 0 already there, 0 failed" in done.out
    assert "[5/5]" in done.out
    assert not (tmp_path / "store" / "slurm").exists()
    again = finish(start(matrix, tmp_path / "store"))
    assert "0 stage runs trained, 5 already there" in again.out
    assert all(
        r["sessions"][0]["device"] for r in records(tmp_path / "store").values() if r["history"]
    )


def test_a_job_that_is_queued_again_goes_on(start, slurm, undisturbed, tmp_path):
    store = tmp_path / "store"
    process = start(undisturbed.matrix, store)
    until_saved(store, process)
    (job,) = slurm.jobs()
    slurm("scontrol", "requeue", job)
    assert slurm.wait(lambda: slurm("squeue", "--noheader", "--states=PD", "--format=%T"))
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes
    done = finish(process)
    assert outputs(store) == outputs(undisturbed.store)
    assert litter(store) == []
    assert resumed(store) >= 1
    assert "goes on with it" in done.out


def test_a_warning_makes_a_job_save_and_queue_again(start, slurm, undisturbed, tmp_path):
    store = tmp_path / "store"
    process = start(undisturbed.matrix, store)
    until_saved(store, process)
    (job,) = slurm.jobs()
    slurm("scancel", "--signal=USR2", job)
    assert slurm.wait(lambda: slurm("squeue", "--noheader", "--states=PD", "--format=%T"))
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    finish(process)
    assert outputs(store) == outputs(undisturbed.store)
    assert resumed(store) == 1


def test_another_job_is_sent_for_one_that_is_cancelled_or_killed(
    start, slurm, undisturbed, tmp_path
):
    store = tmp_path / "store"
    process = start(undisturbed.matrix, store, jobs=2)
    until_saved(store, process)
    slurm("scancel", *slurm.jobs())
    assert slurm.wait(lambda: not slurm.jobs())
    wait_for(lambda: slurm.jobs() != [], process)
    saved = sum(saved_epochs(store))
    wait_for(lambda: sum(saved_epochs(store)) != saved, process)
    slurm("scancel", "--signal=KILL", *slurm.jobs())
    done = finish(process)
    assert outputs(store) == outputs(undisturbed.store)
    assert litter(store) == []
    assert "was stopped; another one goes on with it" in done.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ctrl_c_cancels_the_jobs_and_the_same_command_goes_on(
    start, slurm, undisturbed, tmp_path, number
):
    store = tmp_path / "store"
    process = start(undisturbed.matrix, store)
    until_saved(store, process)
    process.send_signal(number)
    done = finish(process, expect=128 + number)
    assert "the same command goes on from the last checkpoint" in done.err
    assert slurm.wait(lambda: not slurm.jobs(), 10.0)
    assert not any(Store(store).is_running(key) for key in Store(store).stage_keys())
    finish(start(undisturbed.matrix, store))
    assert outputs(store) == outputs(undisturbed.store)
    assert resumed(store) >= 1


def test_the_jobs_of_a_driver_that_was_killed_go_on(start, slurm, undisturbed, tmp_path):
    store = tmp_path / "store"
    process = start(undisturbed.matrix, store)
    until_saved(store, process)
    process.kill()
    process.communicate()
    finish(start(undisturbed.matrix, store))
    assert outputs(store) == outputs(undisturbed.store)
    assert litter(store) == []


def test_what_fails_is_tried_once_and_what_kills_its_job_twice(bench, start, site, tmp_path):
    rows = (["scratch"], ["broken"], ["mortal"], ["mortal", "kd"])
    matrix = bench.matrix(tiny(*rows, plugins=["mortal", "broken"]))
    path = os.pathsep.join([bench.environment()["PYTHONPATH"], str(site)])
    process = start(matrix, tmp_path / "store", jobs=2, PYTHONPATH=path)
    done = finish(process, expect=4)
    assert set(results(tmp_path / "store")) == {
        "resnet8_half/scratch/s0",
        "resnet8_quarter/scratch/s0",
    }
    assert done.out.count("broken s0 stage 1: failed: RuntimeError") == 2  # live, and at the end
    assert done.out.count("its SLURM job died") >= 2
    assert "blocked" in done.out
    assert list((tmp_path / "store" / "slurm").glob("*/jobs/*"))  # for whoever looks for the cause


def test_what_sbatch_refuses_is_one_message(bench, start, tmp_path):
    matrix = bench.matrix(tiny(["scratch"]))
    process = start(matrix, tmp_path / "store", "--slurm-option", "partition=none")
    done = finish(process, expect=3)
    assert "error: sbatch refused the jobs: " in done.err
    assert "invalid partition" in done.err


def test_a_python_that_does_not_start_is_told_with_its_last_words(bench, start, tmp_path):
    matrix = bench.matrix(tiny(["scratch"]))
    process = start(matrix, tmp_path / "store", SBATCH_EXPORT="PATH,SLURM_CONF")
    done = finish(process, expect=3)
    assert "3 SLURM jobs ended before they began" in done.err
    assert "the last of them: RuntimeError" in done.err


def test_nothing_is_left_of_the_cluster_itself():
    with cluster() as started:
        pids = [process.pid for process in started.processes]
    found = subprocess.run(
        ["ps", "-o", "pid=", "-p", ",".join(map(str, pids))], capture_output=True
    )
    assert not found.stdout.split()
