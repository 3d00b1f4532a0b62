"""From format to format: step by step, killed before every change, never under a process at work."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import PATHS
from matrices import plan_of, specs
from rich.console import Console
from smskd_bench import migrating, store
from smskd_bench.leases import LeaseBook
from smskd_bench.migrating import migrate
from smskd_bench.store import Store
from smskd_bench.usage import in_use

from smskd.errors import StoreError

HERE = Path(__file__).parent


@pytest.fixture
def root(tmp_path):
    """A store of format 1 with two stage runs begun."""
    made = Store.open(tmp_path / "runs")
    for spec in specs(plan_of(rows=[["fitnet", "kd"]]), "fitnet>kd"):
        made.begin(spec)
    return made.root


@pytest.fixture
def two(monkeypatch):
    """A program whose format is 2; the step leaves a file, and notes how often it was taken."""
    taken = []

    def step(folder):
        taken.append(json.loads((folder / "store.json").read_text())["format"])
        (folder / "made").write_text("by the step")

    monkeypatch.setattr(store, "STORE_FORMAT", 2)
    monkeypatch.setitem(migrating.STEPS, 1, step)
    return taken


def said(root):
    console = Console(file=io.StringIO(), width=200)
    migrate(root, console)
    return console.file.getvalue()


def format_of(root):
    return json.loads((root / "store.json").read_text())["format"]


def test_a_store_of_this_format_is_left_alone(root):
    before = sorted(root.rglob("*"))
    assert "has format 1, which is that of this program: nothing to do" in said(root)
    assert sorted(root.rglob("*")) == before


def test_there_is_a_step_from_every_older_format():
    assert sorted(migrating.STEPS) == list(range(1, store.STORE_FORMAT))


def test_one_step_and_its_trace(root, two):
    with pytest.raises(StoreError, match="has format 1; this version reads format 2") as refused:
        Store.open(root)
    assert refused.value.hint == f"bring it up to date: smskd-bench migrate --store {root}"
    assert "format 1 -> 2" in said(root)
    assert (two, format_of(root)) == (["1 to 2"], 2)
    assert json.loads((root / "store.format-1.json").read_text()) == {"format": 1}
    Store.open(root)
    assert "nothing to do" in said(root)


@pytest.mark.parametrize("value", [3, 99, -1, 0, "1", None, True, 1.0, "1 to 3", "2 to 3", [1], {}])
def test_newer_and_unknown_formats_are_refused_and_left(root, two, value):
    text = json.dumps({"format": value})
    (root / "store.json").write_text(text)
    with pytest.raises(StoreError, match="this version reads format 2"):
        said(root)
    assert (root / "store.json").read_text() == text
    assert two == []


def test_a_newer_one_under_way_is_left_to_who_began_it(root):
    (root / "store.json").write_text('{"format": "1 to 2"}')
    with pytest.raises(StoreError) as refused:
        said(root)
    assert "with the version that began it" in refused.value.hint


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        said(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_not_while_somebody_uses_it(root, two):
    with in_use(root, [], LeaseBook()), pytest.raises(StoreError, match="is in use by process"):
        said(root)
    opened = Store(root)
    key = next(opened.stage_keys())
    with opened.try_lock(key), pytest.raises(StoreError, match="is in use by process"):
        said(root)
    assert (two, format_of(root)) == ([], 1)
    said(root)
    assert format_of(root) == 2


def test_who_waited_for_a_migration_does_not_go_on_in_the_old_format(root, two, monkeypatch):
    monkeypatch.setattr(store, "STORE_FORMAT", 1)
    opened = Store.open(root)
    monkeypatch.setattr(store, "STORE_FORMAT", 2)
    said(root)
    monkeypatch.setattr(store, "STORE_FORMAT", 1)
    with pytest.raises(StoreError, match="has format 2"), opened.in_use([]):
        raise AssertionError("the store was used")
    assert list((root / "users").iterdir()) == []


def test_a_step_that_fails_leaves_a_store_that_can_go_on(root, two, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as worse:
        worse.setitem(migrating.STEPS, 1, full)
        with pytest.raises(StoreError, match="cannot be written: No space left on device"):
            said(root)
    with pytest.raises(StoreError, match="has format '1 to 2'") as refused:
        Store.open(root)
    assert "migrate --store" in refused.value.hint
    said(root)
    assert format_of(root) == 2


def test_killed_before_every_change_it_goes_on_to_the_same_store(root):
    done = subprocess.run(
        [sys.executable, HERE / "migration_kills.py", root], capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(PATHS), "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    formats = [line.split(maxsplit=2)[2] for line in done.stdout.splitlines()]
    # Lease, backup, marker, two files, marker; the same again; the lease's removal is no renaming.
    assert set(formats) == {"1", "1 to 2", "2", "2 to 3"}
    assert len(formats) >= 10
