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

import pytest
from command import Bench, finish, litter, outputs, tiny
from processes import kill_9, orphans, workers_of

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


def training(store):
    """Tells whether a stage run is held."""
    return lambda: any(store.glob("stages/*/*/lease.json"))


def exporting(store):
    """Tells whether something of an export was begun."""
    return lambda: any((store / "exports").glob("*/*")) or any((store / "exports").glob("*/.*"))


class Killer:
    """Starts a command again and again, and kills parts of it."""

    def __init__(self, bench, draw):
        self.bench, self.draw = bench, draw
        self.kills = collections.Counter()

    def once(self, words, busy, longest_s):
        """Start it, kill something at a random moment; True if it had ended by itself.

        Most of the time the moment comes after ``busy`` says that it is at work.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "smskd_bench.cli", *map(str, words)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=self.bench.environment(),
            cwd=self.bench.folder / "cwd", start_new_session=True,
        )  # fmt: skip
        patient = self.draw.random() < 0.9
        while patient and not busy() and process.poll() is None:
            time.sleep(0.02)
        try:
            process.wait(self.draw.uniform(0.0, longest_s))
        except subprocess.TimeoutExpired:
            self._kill(process)
            process.wait(60)
            assert orphans(process.pid) == []
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
        while killer.total() < KILLS and not killer.once(run, training(store), 4.0):
            pass
        finish(bench.start(*run), timeout_s=600)
        assert outputs(store) == outputs(undisturbed)
        assert litter(store) == []
        for _ in range(3):
            killer.once(export_words(matrix, store), exporting(store), 2.0)
        finish(bench.start(*export_words(matrix, store)), timeout_s=600)
        assert bundles(store) == bundles(undisturbed)
        assert litter(store) == []
        print(f"store {stores}: {dict(killer.kills)}, same bits, nothing left behind", flush=True)
    print(f"seed {SEED}: {killer.total()} kills in {stores} stores, 0 losses")
