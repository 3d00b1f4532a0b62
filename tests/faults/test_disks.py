"""A disk that is full at one write after another: one message each time, and the run goes on after.

python -m pytest -m slow -s tests/faults/test_disks.py
"""

import pytest
from command import Bench, litter, outputs, records, tiny
from disks import resize, small_disk

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
