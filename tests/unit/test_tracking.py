"""The W&B mirror with the real wandb, on disk and against a small server on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from smskd_bench.tracking import ArtifactRef, NullTracker, RunCard, login_state, make_tracker
from smskd_bench.wandb_mirror import artifact_name, run_id
from smskd_bench.wandb_tracker import WandbTracker
from wandb_home import isolate
from wandb_log import logged_runs
from wandb_server import wandb_server

from smskd.errors import ConfigError, UnknownNameError

ROOT = Path(__file__).parents[2]
TEACHER, PARENT, STUDENT = (hashlib.sha256(name).hexdigest() for name in (b"t", b"p", b"s"))
API_KEY = "a" * 40
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


def write_weights(folder, key):
    path = folder / "runs" / key / "student.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(key.encode() * 1000)
    return path


def make_card(folder, key=STUDENT, **changes):
    card = RunCard(
        key=key,
        name=f"run {key[:4]}",
        project="smskd",
        group="resnet32x4-resnet8x4",
        job_type="student",
        folder=folder / "wandb",
        tags=("cifar100", "x" * 100),
        config={"method": {"name": "kd", "tau": 4.0}, "seed": 1},
    )
    return replace(card, **changes)


def inputs_of(folder):
    return (
        ArtifactRef("parent", PARENT, write_weights(folder, PARENT)),
        ArtifactRef("teacher", TEACHER, write_weights(folder, TEACHER)),
    )


def mirror_student(tracker, folder, epochs=range(3)):
    tracker.begin(make_card(folder, inputs=inputs_of(folder)))
    for epoch in epochs:
        tracker.log(STUDENT, {"loss": 1.0 / (epoch + 1), "lr": 0.05}, epoch)
    summary = {"test_top1": 0.75, "pair": "a/b", "row": "kd", "seed": 1}
    tracker.end(STUDENT, "done", summary, write_weights(folder, STUDENT))


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A teacher and a student of one process, mirrored offline; store folder, runs, messages."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder)
        environment = dict(os.environ)
        tracker = make_tracker("wandb")
        tracker.begin(make_card(folder, TEACHER, job_type="teacher"))
        mirror_student(tracker, folder)
        tracker.log(TEACHER, {"loss": 0.5}, 0)
        tracker.end(TEACHER, "failed", {}, None)
        messages = tracker.close(30.0)
        assert dict(os.environ) == environment
    runs = {run.run.run_id: run for run in logged_runs(folder / "wandb")}
    return folder, runs, messages


def test_offline_run_says_what_the_stage_run_is(offline):
    _, runs, _ = offline
    assert set(runs) == {run_id(TEACHER), run_id(STUDENT)}
    run = runs[run_id(STUDENT)].run
    assert (run.project, run.run_group, run.job_type) == (
        "smskd",
        "resnet32x4-resnet8x4",
        "student",
    )
    assert list(run.tags) == ["cifar100", "x" * 64]
    assert run.display_name == f"run {STUDENT[:4]}"
    config = runs[run_id(STUDENT)].config
    assert config["method"] == {"name": "kd", "tau": 4.0}
    assert config["key"] == STUDENT
    assert config["parent_key"] == PARENT
    assert config["teacher_keys"] == [TEACHER]
    assert runs[run_id(TEACHER)].config["parent_key"] is None


def test_offline_run_holds_epochs_summary_and_status(offline):
    _, runs, _ = offline
    student = runs[run_id(STUDENT)]
    assert [(row["epoch"], row["loss"]) for row in student.rows] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert student.steps["*"] == "epoch"
    wanted = {"test_top1": 0.75, "pair": "a/b", "row": "kd", "seed": 1, "status": "done"}
    assert wanted.items() <= student.summary.items()
    assert student.exit_code == 0
    assert runs[run_id(TEACHER)].summary["status"] == "failed"
    assert runs[run_id(TEACHER)].exit_code == 1


def test_offline_run_holds_weights_and_lineage(offline):
    folder, runs, _ = offline
    artifacts = {record.name: record for record in runs[run_id(STUDENT)].artifacts}
    used = {name for name, record in artifacts.items() if record.use_after_commit}
    assert used == {artifact_name(PARENT), artifact_name(TEACHER)}
    output = artifacts[artifact_name(STUDENT)]
    assert output.type == "model"
    assert json.loads(output.metadata) == {"key": STUDENT}
    (entry,) = output.manifest.contents
    bytes_written = (folder / "runs" / STUDENT / "student.safetensors").read_bytes()
    assert entry.path == "weights.safetensors"
    assert base64.b64decode(entry.digest) == hashlib.md5(bytes_written).digest()
    assert Path(entry.local_path).read_bytes() == bytes_written
    assert Path(entry.local_path).is_relative_to(folder / "wandb")


def test_offline_writes_only_below_the_given_folder(offline):
    folder, _, _ = offline
    assert not list((folder / "home").rglob("*"))
    assert not list((folder / "cwd").rglob("*"))
    assert not list((folder / "wandb").rglob("diff.patch"))


def test_offline_message_is_one_command(offline):
    folder, _, messages = offline
    command = f"wandb sync {folder}/wandb/wandb/offline-run-*"
    assert messages == [f"W&B: 2 runs are recorded offline; to upload: {command}"]


def run_cli(server, *arguments):
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    environment["WANDB_ERROR_REPORTING"] = "false"
    command = [sys.executable, "-m", "wandb", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def assert_server_has_the_student(server, folder):
    used = {variables["input"]["artifactID"] for variables in server.asked("UseArtifact")}
    assert used == {artifact_name(PARENT), artifact_name(TEACHER)}
    for key in (PARENT, TEACHER, STUDENT):
        weights = folder / "runs" / key / "student.safetensors"
        uploaded = server.uploads[f"{artifact_name(key)}/weights.safetensors"]
        assert uploaded == weights.read_bytes()  # Also: the store still has its file.
    assert [row["epoch"] for row in server.rows] == [0, 1, 2]


def test_wandb_sync_uploads_an_offline_run_with_its_lineage(tmp_path):
    mirror_student(tracker := WandbTracker("offline"), tmp_path)
    tracker.close(30.0)
    modes = {path: path.stat().st_mode for path in tmp_path.glob("runs/*/*")}
    with wandb_server() as server:
        done = run_cli(server, "sync", *tmp_path.glob("wandb/wandb/offline-run-*"))
        assert done.returncode == 0, done.stderr
        assert_server_has_the_student(server, tmp_path)
    assert modes == {path: path.stat().st_mode for path in tmp_path.glob("runs/*/*")}


def test_online_run_reaches_the_server_and_leaves_no_links(monkeypatch, tmp_path):
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        mirror_student(tracker := make_tracker("wandb"), tmp_path)
        assert tracker.close(30.0) == []
        assert_server_has_the_student(server, tmp_path)
        bucket = server.asked("UpsertBucket")[0]
    assert (bucket["name"], bucket["groupName"]) == (run_id(STUDENT), "resnet32x4-resnet8x4")
    assert not list((tmp_path / "wandb" / "staged").iterdir())


def test_a_resumed_stage_run_keeps_its_id(tmp_path):
    first = WandbTracker("offline")
    first.begin(make_card(tmp_path))
    first.log(STUDENT, {"loss": 1.0}, 0)
    assert len(first.close(30.0)) == 1
    time.sleep(1.0)  # wandb names the folder of a run by the second
    mirror_student(second := WandbTracker("offline"), tmp_path, epochs=[1])
    second.close(30.0)
    runs = logged_runs(tmp_path / "wandb")
    assert [run.run.run_id for run in runs] == [run_id(STUDENT)] * 2
    assert [[row["epoch"] for row in run.rows] for run in runs] == [[0], [1]]
    assert [run.exit_code for run in runs] == [1, 0]
    assert all(run.run.resume or run.run.resumed for run in runs)


def test_missing_weights_of_a_teacher_cost_only_the_link(tmp_path):
    tracker = WandbTracker("offline")
    gone = ArtifactRef("teacher", TEACHER, tmp_path / "gone.safetensors")
    tracker.begin(make_card(tmp_path, inputs=(gone,)))
    tracker.log(STUDENT, {"loss": 1.0}, 0)
    tracker.end(STUDENT, "done", {}, None)
    messages = tracker.close(30.0)
    assert "teacher of run" in messages[0]
    assert "FileNotFoundError" in messages[0]
    (run,) = logged_runs(tmp_path / "wandb")
    assert run.exit_code == 0
    assert run.config["teacher_keys"] == [TEACHER]


def test_values_json_does_not_know_are_sent_as_plain_ones(tmp_path):
    import torch

    config = MappingProxyType({"path": Path("a/b"), "inner": MappingProxyType({"tau": 4})})
    tracker = WandbTracker("offline")
    tracker.begin(make_card(tmp_path, config=config))
    tracker.log(STUDENT, {"loss": torch.tensor(0.5), "nan": float("nan")}, 0)
    tracker.end(STUDENT, "done", {"bad": {("a", "b"): 1}}, None)
    messages = tracker.close(30.0)
    (run,) = logged_runs(tmp_path / "wandb")
    assert (run.config["path"], run.config["inner"]) == ("a/b", {"tau": 4})
    assert run.rows[0]["loss"] == 0.5
    assert "could not be sent" in messages[0]


def test_unreachable_server_falls_back_to_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    mirror_student(tracker := make_tracker("wandb"), tmp_path)
    messages = tracker.close(60.0)
    assert "recording offline" in messages[0]
    assert "wandb sync" in messages[1]
    (run,) = logged_runs(tmp_path / "wandb")
    assert len(run.rows) == 3
    assert len(run.artifacts) == 3


def test_a_server_that_goes_while_a_run_is_open_costs_neither_run(monkeypatch, tmp_path):
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
        tracker = make_tracker("wandb")
        tracker.begin(make_card(tmp_path, TEACHER, job_type="teacher"))
        while not server.asked("UpsertBucket"):
            time.sleep(0.05)
        time.sleep(0.5)
    mirror_student(tracker, tmp_path)
    tracker.log(TEACHER, {"loss": 0.5}, 0)
    tracker.end(TEACHER, "done", {}, None)
    messages = tracker.close(60.0)
    assert "recording offline" in messages[0]
    assert not any("no longer mirrored" in message for message in messages)
    assert sum("--include-online" in message for message in messages) == 1  # the teacher's
    (run,) = logged_runs(tmp_path / "wandb")
    assert (run.run.run_id, run.exit_code, len(run.rows)) == (run_id(STUDENT), 0, 3)


PROGRAM = """
import os, sys, time
from pathlib import Path
from smskd_bench.tracking import RunCard, make_tracker
tracker = make_tracker("wandb")
folder = Path(sys.argv[1])
tracker.begin(RunCard(key="f" * 64, name="n", project="p", group="g", job_type="student", folder=folder))
tracker.log("f" * 64, {"loss": 1.0}, 0)
"""


def run_program(text, folder, **environment):
    paths = os.pathsep.join([environment.pop("shim", ""), str(ROOT), str(ROOT / "bench")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_unreachable_server_does_not_hold_the_process(tmp_path):
    text = (
        PROGRAM + "print(tracker.close(1.0)); print(time.time(), os.environ.get('WANDB_SERVICE'))"
    )
    settings = {"WANDB_BASE_URL": NOBODY, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}
    done = run_program(text, tmp_path, **settings)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    messages, closed = done.stdout.splitlines()
    assert "not finished within 1 s" in messages
    assert closed.endswith("None")
    assert ended - float(closed.split()[0]) < 5.0


def test_a_killed_trainer_still_gets_its_run_closed(tmp_path):
    done = run_program(PROGRAM + "time.sleep(0.5); os.kill(os.getpid(), 9)", tmp_path)
    assert done.returncode == -9
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        runs = logged_runs(tmp_path) if list(tmp_path.glob("wandb/*/*.wandb")) else []
        if runs and runs[0].exit_code is not None:
            break
        time.sleep(0.1)
    assert runs[0].exit_code == 1
    assert [row["epoch"] for row in runs[0].rows] == [0]


def shim(monkeypatch, folder, body):
    """Put a broken wandb in front of the real one, for the mirror's process only."""
    folder = folder / "shim"
    folder.mkdir()
    (folder / "wandb.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_wandb_that_raises_is_reported_and_given_up(monkeypatch, tmp_path):
    raising = "def Settings(**_): pass\ndef init(**_): raise OSError('disk full')\n"
    shim(monkeypatch, tmp_path, raising)
    tracker = WandbTracker("offline")
    for number in range(6):
        key = f"{number:064x}"[::-1]
        tracker.begin(make_card(tmp_path, key))
        tracker.log(key, {"loss": 1.0}, 0)
        tracker.end(key, "done", {}, None)
    messages = tracker.close(30.0)
    assert len(messages) == 4
    assert all("OSError: disk full" in message for message in messages[:3])
    assert messages[3] == "W&B: mirroring is off after repeated failure"


def test_a_mirror_that_cannot_start_is_reported(monkeypatch, tmp_path):
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = WandbTracker("offline")
    mirror_student(tracker, tmp_path)
    (message,) = tracker.close(30.0)
    assert message.startswith("W&B: the mirror failed: FileExistsError")


def test_a_mirror_that_dies_is_reported(monkeypatch, tmp_path):
    shim(monkeypatch, tmp_path, "import os\nos._exit(7)\n")
    tracker = WandbTracker("offline")
    mirror_student(tracker, tmp_path)
    (message,) = tracker.close(30.0)
    assert "ended with status 7" in message
    assert "mirror.log" in message


def test_a_hung_wandb_costs_neither_time_nor_memory(monkeypatch, tmp_path, capsys):
    shim(monkeypatch, tmp_path, "import time\ntime.sleep(600)\n")
    tracker = WandbTracker("offline", max_waiting=500)
    tracker.begin(make_card(tmp_path))
    started = time.perf_counter()
    for epoch in range(20_000):
        tracker.log(STUDENT, {"loss": 1.0, "top1": 0.5}, epoch)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f" [{seconds / 20_000 * 1e6:.1f} us per log call] ", end="")
    assert tracker._waiting.qsize() <= 500
    messages = tracker.close(0.3)  # the shim sleeps for longer than a test may take
    assert "not finished within 0.3 s" in messages[0]
    assert "epoch rows were dropped" in messages[1]
    tracker.log(STUDENT, {"loss": 1.0}, 0)
    assert tracker.close(1.0) == messages


def test_a_tracker_without_runs_starts_nothing(tmp_path):
    tracker = WandbTracker("offline")
    tracker.log(STUDENT, {"loss": 1.0}, 0)
    tracker.end(STUDENT, "done", {}, None)
    assert tracker.close(1.0) == []
    assert tracker._process is None


def test_none_imports_neither_wandb_nor_torch(tmp_path):
    text = (
        "import sys; from smskd_bench.tracking import *; t = make_tracker('none'); t.close(1.0)\n"
    )
    done = run_program(text + "print(sorted({'wandb', 'torch'} & set(sys.modules)))", tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_wandb_is_never_imported_by_the_trainer(tmp_path):
    text = PROGRAM + "tracker.close(30.0); print('wandb' in sys.modules)"
    done = run_program(text, tmp_path)
    assert done.stdout.strip() == "False", done.stderr


def test_unknown_tracker_and_unknown_mode_are_refused(monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown tracker 'wandbb'"):
        make_tracker("wandbb")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="WANDB_MODE is 'ofline'"):
        make_tracker("wandb")


def test_disabled_mode_mirrors_nothing(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(make_tracker("wandb"), NullTracker)


@pytest.mark.parametrize(
    ("variables", "mode", "reason"),
    [
        ({}, "offline", "not logged in"),
        ({"WANDB_API_KEY": API_KEY}, "online", "WANDB_API_KEY"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, "online", "WANDB_IDENTITY_TOKEN_FILE"),
        ({"WANDB_API_KEY": API_KEY, "WANDB_MODE": "offline"}, "offline", "WANDB_MODE says"),
        ({"WANDB_MODE": "dryrun"}, "offline", "WANDB_MODE says dryrun"),
        ({"WANDB_MODE": "online"}, "online", "WANDB_MODE says"),
        ({"WANDB_MODE": "disabled"}, "disabled", "WANDB_MODE says"),
    ],
)
def test_login_state_from_the_environment(monkeypatch, variables, mode, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    state = login_state()
    assert state.mode == mode
    assert reason in state.reason


@pytest.mark.parametrize(
    ("path", "text", "server", "mode"),
    [
        (".netrc", f"machine api.wandb.ai\n login user\n password {API_KEY}\n", None, "online"),
        ("_netrc", f"machine api.wandb.ai\n login user\n password {API_KEY}\n", None, "online"),
        (".netrc", f"machine api.wandb.ai login user password {API_KEY}", NOBODY, "offline"),
        (".netrc", f"machine 127.0.0.1:9 login user password {API_KEY}", NOBODY, "online"),
        (".netrc", "machine github.com login user password x", None, "offline"),
        (".netrc", "what is this", None, "offline"),
        (".config/wandb/settings", f"[default]\napi_key = {API_KEY}\n", None, "online"),
        (".config/wandb/settings", "[default]\nmode = disabled\n", None, "disabled"),
        (".config/wandb/settings", "no section", None, "offline"),
        ("../cwd/wandb/settings", "[default]\nmode = offline\n", None, "offline"),
    ],
)
def test_login_state_from_files(monkeypatch, path, text, server, mode):
    file = Path.home() / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert login_state().mode == mode
