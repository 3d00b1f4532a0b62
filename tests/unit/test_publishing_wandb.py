"""Publications with the real wandb: on disk, synced later, and online against a server of this machine."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from filled import fill, filled
from matrices import plan_of, write_matrix
from rich.console import Console
from smskd_bench.cli import main
from smskd_bench.publishing import sending
from smskd_bench.publishing.addresses import read_addresses
from smskd_bench.publishing.command import PublishRequest, publish
from wandb_account import Account
from wandb_home import isolate
from wandb_log import logged_runs
from wandb_server import serving

from smskd.errors import ConfigError, RefusedError, RunError, StoreError

API_KEY = "a" * 40
ROWS = [
    {"stages": ["scratch"], "name": "student"},
    {
        "stages": ["kd"],
        "name": "<b>kd</b> \U0001f600 " + "long " * 40 + "end",
        "controls": ["student"],
    },
]
ENTRIES = {"name": "board [of] <i>tests</i>", "rows": ROWS, "seeds": [0, 1, 2]}
TOP1 = {"student": [70.0, 70.4, 70.2], ROWS[1]["name"]: [77.0, 77.3, 77.1]}
EPOCHS = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]


class Bench:
    """A matrix with made results, and the command on it."""

    def __init__(self, folder):
        self.folder = folder
        self.plan = plan_of(**ENTRIES)
        self.matrix = write_matrix(folder, **ENTRIES)
        self.store = filled(folder / "runs", self.plan, TOP1, history=EPOCHS, train_seconds=2.0)
        fill(self.store, self.plan, self.plan.cells[-1].teacher, 90.0)

    def publish(self, **changes):
        """Publish, and return what was printed."""
        console = Console(file=io.StringIO(), width=200)
        publish(PublishRequest(self.matrix, self.store.root, 0.3, "proof", **changes), console)
        return console.file.getvalue()

    def command(self, *words):
        """The same by its command."""
        named = [
            "--matrix",
            str(self.matrix),
            "--store",
            str(self.store.root),
            "--project",
            "proof",
        ]
        return CliRunner().invoke(main, ["leaderboard", *named, "--publish", "wandb", *words])

    def change(self):
        """Another result of one cell."""
        cell = next(c for c in self.plan.cells if c.row == "student" and c.seed == 2)
        fill(self.store, self.plan, cell.stages[-1], 71.0)

    @property
    def published(self):
        return self.store.root / "wandb" / "published"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)
    return Bench(tmp_path)


@pytest.fixture
def account(monkeypatch, bench):
    with serving(Account()) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        yield server


def of_type(account, job_type):
    return {name: run for name, run in account.runs.items() if run["jobType"] == job_type}


# ---------------------------------------------------------------------------------------- offline


def sync(bench, server):
    """The command that was printed, as a user would run it."""
    folders = sorted(bench.published.glob("wandb/offline-run-*"))
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, folders)],
        env={**environment, "WANDB_ERROR_REPORTING": "false"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_offline_publications_are_read_back_and_a_repeat_records_nothing(bench):
    said = bench.publish()
    assert f"wandb sync {bench.published}/wandb/offline-run-*" in said
    runs = {run.run.run_id: run for run in logged_runs(bench.published)}
    rows = [run for run in runs.values() if run.run.job_type == "leaderboard"]
    assert sorted(run.summary["rank"] for run in rows) == [1, 2]
    best = next(run for run in rows if run.summary["rank"] == 1)
    assert best.config["row"] == ROWS[1]["name"]
    assert len(best.run.display_name) <= 128
    assert best.run.run_group == ENTRIES["name"]
    assert best.run.project == "proof"
    assert (best.summary["verdict"], best.summary["cost/train_seconds"]) == ("better", 2.0)
    assert {a.type for a in best.artifacts if a.use_after_commit} == {"stage"}
    assert {run.exit_code for run in runs.values()} == {0}
    (board,) = (run for run in runs.values() if run.run.job_type == "board")
    assert {a.name.rpartition("-")[2] for a in board.artifacts} == {"leaderboard", "curves"}
    stages = [run for run in runs.values() if run.run.job_type == "stage"]
    assert len(stages) == len(bench.plan.cells) + 1
    assert not any("NaN" in json.dumps(run.summary) for run in runs.values())
    before = sorted(bench.published.glob("wandb/*"))
    assert "0 runs new or changed" in bench.publish()
    assert sorted(bench.published.glob("wandb/*")) == before


@pytest.mark.slow
def test_what_is_recorded_again_replaces_what_was_recorded(bench):
    bench.publish()
    first = {run.run.run_id: run.folder for run in logged_runs(bench.published)}
    bench.change()
    said = bench.publish()
    assert "4 runs new or changed" in said  # a stage run, both rows and their table
    again = logged_runs(bench.published)
    assert sorted(run.run.run_id for run in again) == sorted(first)
    assert sum(run.folder not in first.values() for run in again) == 4


@pytest.mark.slow
def test_offline_runs_are_synced_and_then_there_is_nothing_left_to_send(bench, monkeypatch):
    bench.publish()
    with serving(Account()) as account:
        sync(bench, account)
        rows = of_type(account, "leaderboard")
        assert len(rows) == 2
        for name, run in rows.items():
            assert run["summary"]["accuracy/n"] == 3
            assert len(account.used(name)) == 3
        bench.change()
        bench.publish()
        sync(bench, account)
        assert of_type(account, "leaderboard").keys() == rows.keys()
        assert len(of_type(account, "board")) == 1
        means = {
            run["summary"]["accuracy/mean"] for run in of_type(account, "leaderboard").values()
        }
        assert round(min(means), 3) == 70.467
        opened = len(account.opened)
        monkeypatch.setenv("WANDB_BASE_URL", account.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        assert " 0 runs new or changed" in bench.publish()
        assert len(account.opened) == opened
        assert len(account.reports) == 1  # which has to be made online


# ----------------------------------------------------------------------------------------- online


def test_online_a_board_is_there_once_however_often_it_is_published(bench, account):
    said = bench.publish()
    assert re.search(r"runs: +http://\S+/me/proof\n", said)
    assert re.search(r"report: http://\S+/me/proof/reports/\S+--view1\n", said)
    found = read_addresses(bench.store.root, bench.plan.matrix.name)
    assert set(found.runs) == set(account.runs)
    assert f"{found.project}\n" in said
    assert f"{found.report}\n" in said
    rows, stages = of_type(account, "leaderboard"), of_type(account, "stage")
    assert (len(rows), len(stages), len(of_type(account, "board"))) == (2, 7, 1)
    teacher = f"stage-{bench.plan.cells[-1].teacher}"
    taught = [name for name in stages if teacher in account.used(name)]
    assert len(taught) == 3  # of each seed
    for name in taught:
        (made,) = account.made(name)
        assert any(made in account.used(row) for row in rows)
    assert all(run["summary"]["digest"] for run in account.runs.values())
    counts = len(account.runs), len(account.artifacts), len(account.reports)
    opened = len(account.opened)
    assert " 0 runs new or changed" in bench.publish()
    assert (len(account.runs), len(account.artifacts), len(account.reports)) == counts
    assert len(account.opened) == opened
    assert len(account.asked("upsertView")) == 1


@pytest.mark.slow
def test_matrices_that_share_stage_runs_do_not_send_them_in_turns(bench, account):
    bench.publish()
    first = bench.matrix
    bench.matrix = write_matrix(bench.folder / "cwd", **(ENTRIES | {"name": "other"}))
    assert " 3 runs new or changed, 7 as they were" in bench.publish()
    bench.matrix = first
    assert " 0 runs new or changed" in bench.publish()
    assert len(account.reports) == 2


@pytest.mark.slow
def test_online_changes_are_updates_and_what_is_not_measured_any_more_goes(bench, account):
    bench.publish()
    (row, kept) = of_type(account, "leaderboard").items()
    row[1]["summary"] |= {"digest": "old", "latency/cpu/p50_ms": 1.0}
    account.runs["row-gone"] = {**kept[1], "summary": {}}
    bench.change()
    said = bench.publish()
    assert "4 runs new or changed" in said
    assert "rows in W&B that the matrix has no more; delete these runs there: row-gone" in said
    assert len(of_type(account, "leaderboard")) == 3
    assert "latency/cpu/p50_ms" not in row[1]["summary"]
    assert 71.0 in row[1]["summary"]["store/top1"] or 71.0 in kept[1]["summary"]["store/top1"]
    assert len(account.reports) == 1
    assert len(account.asked("upsertView")) == 2
    assert account.asked("upsertView")[1]["id"] == "view1"


@pytest.mark.slow
def test_a_report_of_somebody_else_is_left_alone(bench, account):
    account.reports["theirs"] = {
        "id": "theirs", "name": "x", "displayName": f"Leaderboard of {ENTRIES['name']}", "description": "mine",
        "spec": "{}", "user": {"username": "you", "photoUrl": "", "email": ""}, "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    said = bench.publish()
    assert "was not made here; rename it" in said
    assert account.reports["theirs"]["spec"] == "{}"
    assert len(account.reports) == 1


@pytest.mark.slow
def test_weights_go_along_if_they_are_asked_for(bench, account):
    bench.publish(weights=True)
    models = [a for a in account.artifacts.values() if a["type"] == "model"]
    assert len(models) == 7
    uploads = [name for name in account.uploads if name.endswith("weights.safetensors")]
    assert len({account.uploads[name] for name in uploads}) == len(models)
    assert not list((bench.published / "staged").iterdir())


@pytest.mark.slow
def test_without_the_package_of_the_report_all_else_is_sent(bench, account, monkeypatch, tmp_path):
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "wandb_workspaces.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
    said = bench.publish()
    assert "pip install 'smskd-bench[wandb-report]'" in said
    assert len(of_type(account, "leaderboard")) == 2
    assert account.reports == {}


# ------------------------------------------------------------------------------------ when it fails


def test_switched_off_is_said(bench, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match="switched off"):
        bench.publish()


def test_an_empty_store_publishes_nothing(bench, tmp_path):
    with pytest.raises(StoreError, match="nothing to publish"):
        publish(PublishRequest(bench.matrix, tmp_path / "none", 0.3, "proof"), Console())
    assert not (tmp_path / "none").exists()


def test_online_without_a_login_is_one_message_and_nothing_sent(bench, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(RefusedError, match="W&B cannot be used") as found:
        bench.publish()
    assert "--offline" in found.value.hint


@pytest.mark.slow  # wandb asks a server that is away again and again
def test_a_server_that_is_away_is_one_message(bench, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    with pytest.raises(RefusedError, match="W&B cannot be used") as found:
        bench.publish()
    assert API_KEY not in str(found.value)
    written = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert not [path for path in written if API_KEY.encode() in path.read_bytes()]


def test_a_login_that_is_refused_is_one_message_and_exit_code_3(bench, account):
    account.refuse = {"Viewer", "GetDefaultEntity"}
    done = bench.command()
    assert done.exit_code == 3
    assert "error: W&B cannot be used" in done.output
    assert account.runs == {}


@pytest.mark.slow
def test_what_fails_on_the_way_is_mended_by_a_repeat(bench, account):
    account.refuse = {"CommitArtifact"}
    with pytest.raises(RunError, match=r"of 10 runs are up to date") as found:
        bench.publish()
    assert "goes on where it stopped" in found.value.hint
    assert not any(
        "digest" in run["summary"] for run in account.runs.values() if run["jobType"] == "stage"
    )
    account.refuse = set()
    bench.publish()
    assert len(account.runs) == 10
    assert all(run["summary"]["digest"] for run in account.runs.values())
    assert len(account.reports) == 1


def test_a_server_that_never_answers_is_left(bench, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        document = {"mode": "online", "project": "proof", "entity": None, "groups": [], "folder": str(bench.folder),
                    "known": {}, "runs": [], "report": {}}  # fmt: skip
        with pytest.raises(RunError, match="no answer for 3 s"):
            sending.run_sender(document, bench.folder, lambda outcome: None, stall_s=3.0)


def test_a_folder_that_cannot_be_written_is_one_message(bench):
    (bench.store.root / "wandb").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        bench.publish()


def test_the_command_records_offline_and_writes_nothing_outside_the_store(bench):
    done = bench.command("--offline")
    assert done.exit_code == 0, done.output
    assert f"wandb sync {bench.published}/wandb/offline-run-*" in done.output
    home = Path.home()
    assert [p for p in (*home.rglob("*"), *Path.cwd().rglob("*")) if p.is_file()] == []
