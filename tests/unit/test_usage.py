"""Who uses a store: seen by those who would take something away, and waiting for them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from smskd_bench.leases import LeaseBook
from smskd_bench.usage import DEAD_S, dead_users, in_use, maintenance, users

from smskd.errors import StoreError

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys
from pathlib import Path
from smskd_bench.leases import LeaseBook
from smskd_bench.usage import in_use
with in_use(Path(sys.argv[1]), ["a", "b"], LeaseBook()):
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that uses the store in ``tmp_path``."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "bench", "export"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    yield process
    process.kill()
    process.communicate(timeout=60)


def test_another_process_is_seen_while_it_is_there(tmp_path, other):
    (user,) = users(tmp_path)
    assert (user.owner.pid, user.keys) == (other.pid, {"a", "b"})
    other.communicate("", timeout=60)
    assert other.returncode == 0
    assert users(tmp_path) == []
    assert list((tmp_path / "users").iterdir()) == []


def test_one_that_was_killed_is_not_seen_and_the_next_one_clears_its_folder(tmp_path, other):
    (folder,) = (tmp_path / "users").iterdir()
    assert dead_users(tmp_path) == []
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=60)
    assert users(tmp_path) == []
    assert dead_users(tmp_path) == [folder]
    (folder / "lease.json").unlink()
    assert dead_users(tmp_path) == []  # it might be one that starts, or of another machine
    past = time.time() - DEAD_S - 1
    os.utime(folder, (past, past))
    assert dead_users(tmp_path) == [folder]
    with in_use(tmp_path, [], LeaseBook()):
        assert not folder.exists()
        assert len(users(tmp_path)) == 1


def test_what_a_running_process_needs_and_cannot_be_read_is_refused(tmp_path, other, monkeypatch):
    monkeypatch.setattr("smskd_bench.usage.LOOK_AGAIN_S", 0.001)
    (folder,) = (tmp_path / "users").iterdir()
    (folder / "keys.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        users(tmp_path)
    (folder / "keys.json").unlink()
    with pytest.raises(StoreError, match="No such file"):
        users(tmp_path)


def test_a_newcomer_waits_for_maintenance(tmp_path):
    told, came = threading.Event(), threading.Event()

    def newcomer():
        with in_use(tmp_path, ["a"], LeaseBook(), told.set):
            came.set()

    thread = threading.Thread(target=newcomer)
    with maintenance(tmp_path, LeaseBook()):
        thread.start()
        assert told.wait(60)
        assert [user.keys for user in users(tmp_path)] == [{"a"}]  # seen though it waits
        assert not came.is_set()
    assert came.wait(60)
    thread.join()


def test_one_at_a_time_at_maintenance(tmp_path, monkeypatch):
    monkeypatch.setattr("smskd_bench.usage.LOOK_AGAIN_S", 0.001)
    with (
        maintenance(tmp_path, LeaseBook()),
        pytest.raises(StoreError, match="another process cleans up"),
        maintenance(tmp_path, LeaseBook()),
    ):
        pass
    with maintenance(tmp_path, LeaseBook()):
        pass
