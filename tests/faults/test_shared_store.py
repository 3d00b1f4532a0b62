"""Many processes on one store: every stage run is trained once, by whoever comes first.

python -m pytest -m slow -s tests/faults/test_shared_store.py
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from command import Bench, litter, outputs, tiny

ROWS = (["kd"], ["dkd"], ["fitnet"], ["sp"], ["fitnet", "kd"], ["dkd", "kd"])
HOSTS = """
import os
from smskd_bench import leases
leases.this_host = lambda: os.environ["SMSKD_TEST_HOST"]
leases.try_lock = lambda handle: True
"""
"""Every process a machine of its own, on a file system that carries no locks."""


def document(rows, seeds):
    made = tiny(*rows, seeds=list(range(seeds)), teacher={"epochs": 1})
    made["recipe"]["epochs"] = [1, 1]
    return made


def start_all(bench, matrix, store, count, **env):
    command = [sys.executable, "-m", "smskd_bench.cli", "run", "--matrix", matrix, "--store", store,
               "--threads", 1, "--workers", 1, "--fold-seeds", "off", "--teacher-table", "off",
               "--tracking", "none"]  # fmt: skip
    return [
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=bench.environment(SMSKD_TEST_HOST=f"machine{i}", **env), cwd=bench.folder / "cwd",
        )
        for i in range(count)
    ]  # fmt: skip


def check(processes, store, expected):
    said = [process.communicate(timeout=1500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    counts = [int(text.split(" stage runs trained")[0].split()[-1]) for text in said]
    done = [json.loads(p.read_text()) for p in store.glob("stages/*/*/result.json")]
    sessions = Counter(len(record["sessions"]) for record in done)
    print(
        f"{len(done)} stage runs by {len(processes)} processes: {counts}; sessions {dict(sessions)}"
    )
    assert len(done) == expected
    assert sum(counts) == expected  # none twice
    assert sessions == {1: expected}
    assert litter(store) == []


@pytest.mark.parametrize("hosts", [False, True], ids=["one machine", "several machines"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_processes_share_200_stage_runs(tmp_path, hosts):
    bench = Bench(tmp_path)
    env = {}
    if hosts:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(HOSTS)
        env["PYTHONPATH"] = f"{tmp_path / 'site'}{os.pathsep}{bench.environment()['PYTHONPATH']}"
    # Each seed trains six students, as two rows begin like others; the teacher is shared by all.
    matrix, store = bench.matrix(document(ROWS, 34)), tmp_path / "store"
    processes = start_all(bench, matrix, store, 8, **env)
    check(processes, store, 6 * 34 + 1)


def test_three_processes_share_a_small_matrix(tmp_path):
    bench = Bench(tmp_path)
    matrix, store = bench.matrix(document(ROWS[:2], 3)), tmp_path / "store"
    check(start_all(bench, matrix, store, 3), store, 7)
    alone = tmp_path / "alone"
    check(start_all(bench, matrix, alone, 1), alone, 7)
    assert outputs(store) == outputs(alone)
