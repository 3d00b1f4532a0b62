"""A disk that is full, or read-only, at one write after another: one message, and it goes on after.

python -m pytest -m slow -s tests/faults/test_disks.py
"""

import random
import time

import pytest
from command import Bench, litter, outputs, records, tiny, wait_for
from disks import resize, set_writable, small_disk, without_roots_rights
from smskd_bench.store import Store

READ_ONLY_TIMES = 12
FIRST_KB, STEP_KB, LAST_KB = 32, 20, 2000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_that_is_full_again_and_again(tmp_path):
    bench, live = Bench(tmp_path), ("--teacher-table", "off")
    matrix, whole = bench.matrix(tiny(["fitnet", "kd"], ["dkd"])), tmp_path / "whole"
    bench.run(matrix, whole, *live)
    stops = 0
    with small_disk(tmp_path / "disk", f"{FIRST_KB}k") as store:
        for size in range(FIRST_KB, LAST_KB, STEP_KB):
            resize(store, f"{size}k")
            process = bench.start_run(matrix, store, *live)
            _, err = process.communicate(timeout=300)
            assert "Traceback" not in err
            if process.returncode == 0:
                break
            assert process.returncode == 3, err
            assert "No space left on device" in err
            assert "free some space" in err
            assert not list(store.rglob("*.tmp"))
            kept = outputs(store)
            assert all(kept[key] == outputs(whole)[key] for key in records(store))
            stops += 1
        assert process.returncode == 0
        assert outputs(store) == outputs(whole)
        assert litter(store) == []
    print(f"stopped by a full disk {stops} times, the same bits in the end")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_store_that_turns_read_only_again_and_again(tmp_path):
    bench, live, draw = without_roots_rights(tmp_path), ("--teacher-table", "off"), random.Random(3)
    document = tiny(["fitnet", "kd"], ["dkd"], dataset={"name": "digits", "train_size": 500})
    matrix, whole = bench.matrix(document), tmp_path / "whole"
    store, stops = tmp_path / "store", 0
    bench.run(matrix, whole, *live)
    opened = Store.open(store)
    for _ in range(READ_ONLY_TIMES):
        process = bench.start_run(matrix, store, *live)
        wait_for(lambda: any(map(opened.is_running, opened.stage_keys())), process)
        time.sleep(draw.uniform(0.0, 1.0))
        set_writable(store, False)
        _, err = process.communicate(timeout=300)
        set_writable(store, True)
        assert "Traceback" not in err
        if process.returncode == 0:
            break
        assert process.returncode == 3, err
        assert f"the store {store} cannot be written: Permission denied" in err
        kept = outputs(store)
        assert all(kept[key] == bits for key, bits in outputs(whole).items() if key in kept)
        stops += 1
    bench.run(matrix, store, *live)
    assert outputs(whole).items() <= outputs(store).items()
    assert litter(store) == []
    print(f"stopped by a read-only store {stops} times, the same bits in the end")
