"""``run`` with its shortcuts: what results say of them, and the same bits after a kill."""

import os
import signal
import time

import pytest
import yaml
from command import ROOT, Bench, outputs, results

PAIR = {"teacher": "resnet8_half", "student": "resnet8_quarter"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("fast"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def matrix(shared):
    content = {
        "name": "seeds", "dataset": {"name": "digits", "train_size": 300}, "pairs": [PAIR],
        "seeds": [0, 1, 2], "rows": [["kd", "kd"], ["fitnet"], ["kd", "dkd"]],
        "recipe": {"epochs": [4, 3]}, "teacher": {"epochs": 3},
    }  # fmt: skip
    file = shared.folder / "seeds.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folded(shared, matrix):
    store = shared.folder / "folded"
    return shared.run(matrix, store, "--fold-seeds", "on"), store


def paths_of(store):
    return {name: result["fast_paths"] for name, result in results(store).items()}


def test_results_say_how_they_were_made(folded):
    done, store = folded
    assert "13 stage runs trained, 0 already there, 0 failed" in done.out
    found = paths_of(store)
    assert len(found) == 1 + 4 * 3
    students = {name: path for name, path in found.items() if "scratch" not in name}
    assert all(path["folded"] == 3 for path in students.values())
    assert students["resnet8_quarter/kd/s1"]["teacher"] == "table fp16"
    assert students["resnet8_quarter/kd>dkd/s1"]["reference"] == "table fp16"
    assert students["resnet8_quarter/fitnet/s0"]["teacher"] == "live"
    assert not any(path["compiled"] for path in found.values())


@pytest.mark.slow
def test_exact_results_need_no_shortcut_and_agree(bench, matrix, folded):
    store = bench.folder / "exact"
    bench(
        "run", "--matrix", matrix, "--store", store, "--exact", "--threads", 1, "--tracking", "none"
    )
    for path in paths_of(store).values():
        assert path["folded"] == 1
        assert path.get("teacher", "live") == path.get("reference", "live") == "live"
    ours, exact = results(folded[1]), results(store)
    assert ours.keys() == exact.keys()
    assert {n: r["key"] for n, r in ours.items()} == {n: r["key"] for n, r in exact.items()}
    assert not (store / "tables").exists()
    first = "resnet8_quarter/kd/s0"  # before rounding has grown
    losses = [r[first]["history"][0]["loss"] for r in (ours, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_folds_end_in_the_same_bits(bench, matrix, folded, workers):
    store = bench.folder / f"killed-{workers}"
    options = ("--fold-seeds", "on", "--workers", workers)
    kills = 0
    for delay in (0.0, 0.15, 0.4):
        process = bench.start_run(matrix, store, *options)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if any(store.glob("stages/*/*/checkpoint.pt")):
                time.sleep(delay)
                break
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills
    bench.run(matrix, store, *options)
    assert outputs(store) == outputs(folded[1])


def test_a_precision_that_the_device_lacks_is_refused_at_once(bench, matrix):
    content = yaml.safe_load(matrix.read_text())
    content["recipe"]["precision"] = "tf32"
    file, store = bench.folder / "tf32.yaml", bench.folder / "tf32"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = bench.run(file, store, expect=2)
    assert "precision 'tf32' is not to be had on cpu" in done.err
    assert not list(store.glob("stages/*/*/spec.json"))


def test_a_table_that_was_altered_is_filled_anew(bench, matrix, folded):
    store = bench.folder / "altered"
    bench.run(matrix, store, "--fold-seeds", "on", "--only", "*/kd>kd/*")
    for path in store.glob("tables/*/logits.bin"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    bench.run(matrix, store, "--fold-seeds", "on")
    assert outputs(store) == outputs(folded[1])


@pytest.mark.slow  # compiling takes a minute
def test_compiled_is_recorded(bench, matrix):
    store = bench.folder / "compiled"
    bench.run(matrix, store, "--compile", "--only", "*/fitnet/s0")
    assert paths_of(store)["resnet8_quarter/fitnet/s0"]["compiled"] is True


def test_the_quickstart_folds_in_its_dry_run(bench):
    done = bench(
        "run", "--matrix", ROOT / "leaderboards/quickstart.yaml", "--store", bench.folder / "none",
        "--dry-run", "--fold-seeds", "on",
    )  # fmt: skip
    assert "+ folded seeds" in done.out
