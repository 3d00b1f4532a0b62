"""kill -9 of worker, parent or both at random moments: the same command ends in the same bits.

    python -m pytest -m slow -s tests/faults/test_kills.py

``SMSKD_KILLS`` says how many (100), ``SMSKD_KILL_SEED`` repeats a run's moments.
"""

import collections
import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from command import Bench, finish, litter, outputs, tiny
from processes import kill_9, orphans, workers_of
from smskd_bench.store import Store

from smskd.errors import SmskdError

KILLS = int(os.environ.get("SMSKD_KILLS", "100"))
SEED = int(os.environ.get("SMSKD_KILL_SEED", time.time_ns() % 1_000_000))
TRAIN = ("--threads", 1, "--workers", 2, "--fold-seeds", "off", "--tracking", "none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A matrix of teacher, table, two stages and two seeds, undisturbed."""
    document = tiny(["fitnet", "kd"], ["dkd"], ["kd"], seeds=[0, 1], teacher={"epochs": 4})
    document["dataset"]["train_size"] = 600
    bench = Bench(tmp_path_factory.mktemp("whole"))
    matrix, store = bench.matrix(document), bench.folder / "store"
    finish(bench.start("run", "--matrix", matrix, "--store", store, *TRAIN))
    finish(bench.start(*export_words(matrix, store)))
    return matrix, store


def export_words(matrix, store):
    words = ("export", "--matrix", matrix, "--target", "cpu", "--store", store, "--quick")
    return (*words, "--tracking", "none")


def bundles(store):
    """Bytes of everything that was exported, measurements aside."""
    files = (p for p in (store / "exports").rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(store)): p.read_bytes() for p in files if p.name != "report.json"}


def running(store, kind):
    """Whether a stage run of this kind is held by a process that lives."""
    opened = Store(store)
    for folder in store.glob("stages/*/*"):
        try:
            spec = opened.spec_document(folder.name)
        except SmskdError:  # killed before it was written
            continue
        is_kind = "teacher" if not spec["teachers"] else "stage 2" if spec["parent"] else "stage 1"
        if is_kind == kind and opened.is_running(folder.name):
            return True
    return False


def filling(store):
    """Whether a table was written to a moment ago."""
    times = []
    for path in (store / "tables").rglob("*"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=0.0) < 0.3


def exporting(store):
    """Whether something of an export is there."""
    exports = store / "exports"
    return any(exports.glob("*/*")) or any(exports.glob("*/.*"))


PHASES = {
    "start": lambda store: True,
    "teacher": lambda store: running(store, "teacher"),
    "table": filling,
    "stage 1": lambda store: running(store, "stage 1"),
    "stage 2": lambda store: running(store, "stage 2"),
    "export": exporting,
}
"""What a kill waits for, by what it is to hit; then a random time passes."""


class Killer:
    """Starts a command again and again, and kills parts of it."""

    def __init__(self, bench, draw):
        self.bench, self.draw = bench, draw
        self.kills, self.phases = collections.Counter(), collections.Counter()

    def once(self, words, store, phase, longest_s=1.5):
        """Start it, kill something in or soon after a phase; True if it had ended by itself."""
        process = subprocess.Popen(
            [sys.executable, "-m", "smskd_bench.cli", *map(str, words)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=self.bench.environment(),
            cwd=self.bench.folder / "cwd", start_new_session=True,
        )  # fmt: skip
        while not PHASES[phase](store) and process.poll() is None:
            time.sleep(0.01)
        try:
            process.wait(self.draw.uniform(0.0, 4.0 if phase == "start" else longest_s))
        except subprocess.TimeoutExpired:
            self._kill(process)
            process.wait(60)
            assert orphans(process.pid) == []
            self.phases[phase] += 1
            return False
        return True

    def _kill(self, process):
        workers = workers_of(process.pid)
        kind = self.draw.choice(["parent", "worker", "both"] if workers else ["parent"])
        self.kills[kind] += 1
        if kind == "worker":
            kill_9([self.draw.choice(workers)])
            time.sleep(self.draw.uniform(0.0, 1.0))  # it goes on with another
            self.kills["then parent"] += process.poll() is None
            kill_9([process.pid])
        else:
            kill_9([process.pid, *(workers if kind == "both" else [])])

    def total(self):
        return sum(self.kills.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing(whole, tmp_path):
    matrix, undisturbed = whole
    bench, draw = Bench(tmp_path), random.Random(SEED)
    killer, stores = Killer(bench, draw), 0
    while killer.total() < KILLS:
        stores += 1
        store = tmp_path / f"store{stores}"
        run = ("run", "--matrix", matrix, "--store", store, *TRAIN)
        for phase in [phase for phase in PHASES if phase != "export"]:
            for _ in range(3):
                if killer.once(run, store, phase):
                    break
        finish(bench.start(*run), timeout_s=600)
        assert outputs(store) == outputs(undisturbed)
        assert litter(store) == []
        for _ in range(4):
            killer.once(export_words(matrix, store), store, "export")
        finish(bench.start(*export_words(matrix, store)), timeout_s=600)
        assert bundles(store) == bundles(undisturbed)
        assert litter(store) == []
        print(f"store {stores}: {dict(killer.kills)}, same bits, nothing left behind", flush=True)
    print(f"seed {SEED}: {killer.total()} kills in {stores} stores, 0 losses")
    print(f"what they hit: {dict(killer.phases)}")
