"""Measuring on this machine, with a runner that misbehaves on demand."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from smskd_export.measuring import measure, probe
from sshd import processes_with
from standin_bundle import make_bundle, make_test_set

from smskd.errors import DataError, RefusedError, RunError, StoreError, UnknownNameError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    (folder / ".cache" / "smskd-bench").mkdir(parents=True)
    return folder


@pytest.fixture
def test_set(tmp_path):
    return make_test_set(tmp_path / "test_set")


@pytest.fixture
def bundle(home, tmp_path, test_set):
    return make_bundle(tmp_path / 'it\'s "a" $(bundle)\n', test_set)


def behave(home, *words):
    (home / "behave").write_text(" ".join(words))


def runs(home):
    return (home / "runs").exists()


def test_results_are_checked_and_published(home, bundle, test_set, tmp_path):
    events = []
    out = tmp_path / "deep" / "out"
    found = measure(bundle, out, test_set=test_set, quick=True, on_event=events.append)
    assert found.quick
    assert found.before.board == "stand-in"
    assert sorted(p.name for p in out.iterdir()) == [
        "events.jsonl", "fp32-b1-classes.npy", "fp32-b1-host_ns.npy", "result.json"
    ]  # fmt: skip
    assert [event["event"] for event in events] == ["start", "probe", "row", "end"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_all_options_reach_the_runner(home, bundle, test_set, tmp_path):
    spy = home / "spy"
    spy.write_text(
        f'#!/bin/sh\nfor a in "$@"; do echo "$a" >> "$HOME/words"; done\nexec {sys.executable} "$@"\n'
    )
    spy.chmod(0o755)
    measure(
        bundle, tmp_path / "out", test_set=test_set, quick=True, threads=2, affinity=[0, 1],
        precisions=["fp32"], allow=["memory", "board", "board"], energy=False, python=str(spy),
    )  # fmt: skip
    text = (home / "words").read_text()
    wanted = [
        "--stop-with-stdin", "--cache", str(home / ".cache" / "smskd-bench"), "--expect-id",
        "--test-set", str(test_set), "--quick", "--threads\n2", "--affinity\n0,1",
        "--precision\nfp32", "--allow\nboard\n--allow\nmemory\n--no-energy",
    ]  # fmt: skip
    assert [word for word in wanted if f"{word}\n" not in text] == []


def test_refusals_are_said_together_and_nothing_is_left(home, bundle, tmp_path):
    behave(home, "refuse")
    with pytest.raises(RefusedError) as caught:
        measure(bundle, tmp_path / "out")
    assert str(caught.value).splitlines() == [
        "this machine cannot measure this bundle; nothing was measured",
        '  power_mode: nvpmodel is "25W"',
        "    the device has: 0=15W",
        "    -> mend [31mit",
    ]
    assert not runs(home)
    assert not (tmp_path / "out").exists()
    assert measure(bundle, tmp_path / "out", allow=["power_mode"]).allowed == ("power_mode",)


def test_a_failed_gate_is_a_result(home, bundle, tmp_path):
    behave(home, "gate")
    assert measure(bundle, tmp_path / "out").rows == ()


def test_what_was_measured_before_a_stop_is_a_result(home, bundle, tmp_path):
    behave(home, "aborted")
    assert measure(bundle, tmp_path / "out").aborted == "too hot"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["crash"], "stopped with exit status 1: RuntimeError: out of ideas"),
        (["killed"], "the runner on this machine was killed; nothing was measured"),
        (["other"], "brought results of something else"),
        (["damaged"], "brought results that cannot be used: "),
    ],
)
def test_a_runner_that_fails_leaves_no_results(home, bundle, tmp_path, words, message):
    behave(home, *words)
    with pytest.raises(RunError) as caught:
        measure(bundle, tmp_path / "out")
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_probe(home, bundle):
    found, refusals = probe(bundle)
    assert (found.board, refusals) == ("stand-in", ())
    behave(home, "refuse")
    assert [refusal.code for refusal in probe(bundle)[1]] == ["power_mode"]
    assert probe(bundle, allow=["power_mode"])[1] == ()
    behave(home, "vague")
    with pytest.raises(RunError, match="describes itself in a way not understood: utc"):
        probe(bundle)


# What is refused before anything runs.


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"threads": 0}, UsageError, "threads"),
        ({"affinity": [-1]}, UsageError, "from 0"),
        ({"allow": ["--quick"]}, UsageError, "no code"),
        ({"precisions": ["int7"]}, UnknownNameError, "int7"),
        ({"python": "-c"}, UsageError, "no name of an interpreter"),
        ({"python": "a\nb"}, UsageError, "no name of an interpreter"),
        ({"python": "python9.9"}, RefusedError, "cannot start the Python interpreter python9.9"),
        ({"resume": True}, RefusedError, "nothing to resume"),
        ({"device": "a b"}, UsageError, "no name of a device"),
    ],
)
def test_requests_that_make_no_sense(home, bundle, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        measure(bundle, tmp_path / "out", **options)
    assert not runs(home)
    assert not (tmp_path / "out").exists()


def test_another_test_set(home, bundle, tmp_path):
    other = make_test_set(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="is not the test set of this bundle"):
        measure(bundle, tmp_path / "out", test_set=other)
    with pytest.raises(DataError, match="cannot read"):
        measure(bundle, tmp_path / "out", test_set=tmp_path)


def test_no_bundle_and_a_place_that_is_taken(home, bundle, tmp_path):
    with pytest.raises(StoreError, match="holds no bundle"):
        measure(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(StoreError, match="already exists"):
        measure(bundle, tmp_path / "out")
    assert not runs(home)


def test_a_bundle_that_was_changed_never_runs(home, bundle, tmp_path):
    (bundle / "run.py").write_text("print('hello')\n")
    with pytest.raises(StoreError, match=r"changed or unknown files: run\.py"):
        measure(bundle, tmp_path / "out")
    with pytest.raises(StoreError, match=r"changed or unknown files: run\.py"):
        probe(bundle)


# Nothing is left running.


def start_slow(home, bundle, out):
    """A process of its own that measures, once it does."""
    behave(home, "slow")
    code = (
        "import sys; from pathlib import Path; from smskd_export.measuring import measure\n"
        "measure(Path(sys.argv[1]), Path(sys.argv[2]),"
        " on_event=lambda e: print(e['event'], flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, bundle, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    while (line := process.stdout.readline()) != "window\n":
        assert line, process.communicate()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_program_ends_the_runner(home, bundle, tmp_path, number, request):
    process = start_slow(home, bundle, tmp_path / "out")
    request.addfinalizer(process.kill)
    assert processes_with(str(bundle / "run.py"))
    with pytest.raises(RefusedError, match="busy: another measurement runs here"):
        measure(bundle, tmp_path / "second")
    process.send_signal(number)
    process.communicate(timeout=20)
    end = time.monotonic() + 5
    while processes_with(str(bundle / "run.py")) and time.monotonic() < end:
        time.sleep(0.02)
    assert not processes_with(str(bundle / "run.py"))
    behave(home)
    measure(bundle, tmp_path / "out")


def test_no_torch_is_needed():
    code = "import sys, smskd_export.measuring as m; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}"}
    command = [sys.executable, "-c", f"import json; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"torch", "onnx", "onnxruntime", "onnxscript"}
