"""What the SLURM executor does without SLURM: options, what is missing, news through files."""

import os
import signal
import sys
import threading

import pytest
from matrices import plan_of
from smskd_bench.executors.event_log import Event, EventLog, EventReader
from smskd_bench.executors.slurm_queue import check_installed, parse_options
from smskd_bench.stopping import Interrupted, StopRequest

from smskd.errors import ConfigError, RefusedError


def test_options_are_those_of_sbatch():
    words = [
        "partition=gpu",
        "--gres=gpu:a100:1",
        "time=1-00:00:00",
        "exclusive",
        "cpus_per_task=8",
    ]
    assert parse_options(words) == {
        "partition": "gpu",
        "gres": "gpu:a100:1",
        "time": "1-00:00:00",
        "exclusive": True,
        "cpus-per-task": "8",
    }


@pytest.mark.parametrize("word", ["", "=4", "a b=1", "gres=x\n#SBATCH --wrap=y", "$(x)=1", "A=1"])
def test_options_that_are_none(word):
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_options([word])


@pytest.mark.parametrize("word", ["array=0-9", "nodes=2", "output=here", "job_name=mine", "wrap=x"])
def test_options_that_a_run_sets_itself(word):
    with pytest.raises(ConfigError, match="sets this itself"):
        parse_options([word])


def test_without_submitit(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RefusedError, match=r"pip install 'smskd-bench\[slurm\]'"):
        check_installed()


def test_without_slurm(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError, match="sbatch, srun, squeue, scancel, scontrol"):
        check_installed()


@pytest.fixture
def spec():
    return next(iter(plan_of().nodes.values()))


def test_news_are_read_once_and_whole(tmp_path, spec):
    log, reader = EventLog(tmp_path / "7_0.jsonl"), EventReader(tmp_path)
    assert reader.news() == []
    log.tell("start")
    log.epoch(spec, {"epoch": 1, "loss": float("inf")})
    first = reader.news()
    assert first == [
        Event("7_0", "start"),
        Event("7_0", "epoch", spec.key, ({"epoch": 1, "loss": float("inf")},)),
    ]
    log.end(spec, "done", {"big": "result"}, "")
    assert reader.news() == [Event("7_0", "end", spec.key, ("done", ""))]
    assert reader.news() == []


def test_half_a_line_waits_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "7_0.jsonl"
    reader = EventReader(tmp_path)
    path.write_text('\n["start", ""')
    assert reader.news() == []
    EventLog(path).tell("start")  # the job was killed in the middle of a line, and begins again
    assert reader.news() == [Event("7_0", "start")]


def test_news_that_cannot_be_written_are_lost_quietly(tmp_path):
    EventLog(tmp_path / "none" / "7_0.jsonl").tell("start")


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
def test_a_patient_stop_hears_a_second_signal_and_stays():
    with StopRequest(patient=True).on([signal.SIGUSR1]) as stop, stop.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked
        with pytest.raises(Interrupted):
            stop.check()
