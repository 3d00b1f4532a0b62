"""Results trained again from their records: the same bits, others that agree, others that do not."""

import hashlib
import json
import shutil
import signal

import pytest
import torch
from command import PAIR, finish, kill, outputs, records, results, tiny, wait_for
from safetensors.torch import load_file, save_file
from smskd_bench.store import Store

from smskd.datasets import load_dataset

PAIR_NAME = f"{PAIR['teacher']}>{PAIR['student']}"
STUDENT = PAIR["student"]


def cell(row, seed=0):
    return f"{PAIR_NAME}/{row}/s{seed}"


def verify(bench, name, matrix, store, *words, expect=0):
    return bench("verify", name, "--matrix", matrix, "--store", store, *words, expect=expect)


def folder(store, name):
    return Store(store).folder(results(store)[name]["key"])


def edit(place, **changes):
    """Change entries of a result, and let it tell the hashes of its files as they are."""
    path = place / "result.json"
    record = json.loads(path.read_text()) | changes
    for name in record["files"]:
        record["files"][name] = hashlib.sha256((place / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(record))


def as_sessions(record, **changes):
    return [session | changes for session in record["sessions"]]


def test_same_bits_of_the_last_stage_and_the_store_as_it_was(bench, finished, copied):
    before = outputs(copied)
    done = verify(bench, cell("three"), finished.matrix, copied)
    assert f"{STUDENT} dkd s0 stage 3: same bits" in done.out
    assert done.out.count("training it again") == 1
    assert done.out.splitlines()[-1] == "verified: 1 same bits"
    assert outputs(copied) == before
    assert not list((copied / "verify").iterdir())
    assert not list((copied / "users").iterdir())


def test_same_bits_of_everything(bench, finished, copied):
    done = verify(bench, cell("fitnet>kd"), finished.matrix, copied, "--all-stages")
    assert done.out.splitlines()[-1] == "verified: 3 same bits"
    assert done.out.count("training it again") == 3
    done = verify(bench, f"{PAIR_NAME}/swapped", finished.matrix, copied, "--stage", 1)
    assert f"{STUDENT} kd s0 stage 1: same bits" in done.out


def test_what_cannot_be_asked(bench, finished, copied):
    done = verify(bench, cell("fitnt>kd"), finished.matrix, copied, expect=2)
    assert "did you mean" in done.err
    assert cell("fitnet>kd") in done.err
    done = verify(bench, cell("kd"), finished.matrix, copied, "--stage", 2, expect=2)
    assert "has no stage 2" in done.err
    words = ("--stage", 1, "--all-stages")
    assert "drop one" in verify(bench, cell("kd"), finished.matrix, copied, *words, expect=2).err
    words = ("--scratch", copied)
    done = verify(bench, cell("kd"), finished.matrix, copied, *words, expect=2)
    assert "neither empty nor a scratch" in done.err


def test_what_is_not_there_or_damaged_is_refused(bench, finished, copied):
    empty = bench.folder / "empty"
    done = verify(bench, cell("kd"), finished.matrix, empty, expect=3)
    assert "is not trained yet" in done.err
    assert not empty.exists()
    weights = folder(copied, f"{STUDENT}/kd/s0") / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = verify(bench, cell("kd"), finished.matrix, copied, expect=3)
    assert "student.safetensors is damaged: its SHA-256 is not that of its result" in done.err
    done = verify(bench, cell("swapped"), finished.matrix, copied, expect=3)  # builds on it
    assert "student.safetensors is damaged" in done.err
    place = folder(copied, f"{STUDENT}/fitnet/s0")
    edit(place, spec={**results(copied)[f"{STUDENT}/fitnet/s0"]["spec"], "seed": 7})
    done = verify(bench, cell("fitnet>kd"), finished.matrix, copied, "--stage", 1, expect=3)
    assert "its specification is not that of its key" in done.err
    shutil.rmtree(folder(copied, "resnet8_half/scratch/s0"))
    done = verify(bench, cell("fitnet+kd"), finished.matrix, copied, expect=3)
    assert "resnet8_half scratch s0 stage 1, on which it was built, is not in the store" in done.err


@pytest.mark.slow
def test_a_table_that_the_record_denies_gives_other_bits(bench):
    matrix, store = bench.matrix(tiny(["kd"], ["dkd"])), bench.folder / "store"
    bench.run(matrix, store, "--teacher-table", "fp16")
    name = f"{STUDENT}/kd/s0"
    assert results(store)[name]["fast_paths"]["teacher"] == "table fp16"
    assert "1 same bits" in verify(bench, cell("kd"), matrix, store).out  # from a table of its own
    record = results(store)[name]
    edit(folder(store, name), sessions=as_sessions(record, teacher="live"))
    done = verify(bench, cell("kd"), matrix, store)
    assert f"{STUDENT} kd s0 stage 1: other bits, accuracy agrees" in done.out
    assert "exact McNemar p = " in done.out
    assert "may be why: " in done.out or "was it altered" in done.out


@pytest.mark.slow
def test_sessions_of_several_manners_are_said_to_be_the_reason(bench, finished, copied):
    name = f"{STUDENT}/kd/s0"
    place, record = folder(copied, name), results(copied)[name]
    weights = load_file(place / "student.safetensors")
    weights["fc.weight"] += 1e-7
    save_file(weights, place / "student.safetensors")
    edit(place, sessions=as_sessions(record) + as_sessions(record, threads=2))
    done = verify(bench, cell("kd"), finished.matrix, copied)
    assert "other bits, accuracy agrees" in done.out
    assert "its sessions differ in threads, which cannot be repeated" in done.out


@pytest.mark.parametrize("forged", ["number", "predictions"])
def test_a_forged_result_differs(bench, finished, copied, forged):
    name = f"{STUDENT}/kd/s0"
    place, record = folder(copied, name), results(copied)[name]
    if forged == "number":
        edit(place, test={**record["test"], "top1": 99.0})
    else:
        path = place / "predictions.safetensors"
        labels = torch.from_numpy(load_dataset("digits", None).test.labels)
        save_file({"predictions": labels.to(torch.int32)}, path)  # every image right
        edit(place, test={**record["test"], "top1": 100.0})
    done = verify(bench, cell("kd"), finished.matrix, copied, expect=4)
    assert f"{STUDENT} kd s0 stage 1: differs" in done.out
    expected = "the record says 99.0 %" if forged == "number" else "exact McNemar p = "
    assert expected in done.out


@pytest.mark.slow
def test_folded_seeds_are_folded_again_unless_one_is_missing(bench):
    matrix, store = bench.matrix(tiny(["kd"], seeds=[0, 1])), bench.folder / "store"
    bench.run(matrix, store, "--fold-seeds", "on")
    assert results(store)[f"{STUDENT}/kd/s0"]["fast_paths"]["folded"] == 2
    done = verify(bench, f"{PAIR_NAME}/kd", matrix, store)
    assert done.out.splitlines()[-1] == "verified: 2 same bits"
    assert "2 seeds as one network" in done.out
    shutil.rmtree(folder(store, f"{STUDENT}/kd/s1"))
    done = verify(bench, cell("kd"), matrix, store)
    if "other bits" in done.out:
        assert "may be why: folded: 2 recorded, 1 here" in done.out


@pytest.mark.slow
def test_the_recorded_number_of_threads_is_taken(bench):
    matrix, store = bench.matrix(tiny(["kd"])), bench.folder / "store"
    bench.run(matrix, store, "--threads", 2)
    done = verify(bench, cell("kd"), matrix, store, "--all-stages")
    assert "2 threads" in done.out
    assert done.out.splitlines()[-1] == "verified: 2 same bits"


@pytest.mark.slow
def test_imported_weights_are_imported_again(bench, finished):
    teacher = folder(finished.store, "resnet8_half/scratch/s0") / "student.safetensors"
    shutil.copy(teacher, bench.folder / "teacher.safetensors")
    document = tiny(["kd"], teacher={"weights": {"resnet8_half": "teacher.safetensors"}})
    matrix, store = bench.matrix(document), bench.folder / "store"
    bench.run(matrix, store)
    done = verify(bench, cell("kd"), matrix, store, "--all-stages")
    assert "resnet8_half imported s0 stage 1: same bits" in done.out
    assert done.out.splitlines()[-1] == "verified: 2 same bits"


@pytest.mark.slow
def test_a_killed_one_goes_on_in_its_scratch(bench, undisturbed):
    store = shutil.copytree(undisturbed.store, bench.folder / "store")
    scratch = bench.folder / "scratch"
    words = ("verify", cell("fitnet>kd"), "--matrix", undisturbed.matrix, "--store", store)
    words = (*words, "--scratch", scratch)
    process = bench.start(*words)
    wait_for(lambda: bool(list(scratch.glob("*/stages/*/*/checkpoint.pt"))), process)
    kill(process)
    done = bench(*words)
    assert done.out.splitlines()[-1] == "verified: 1 same bits"
    (inside,) = (path for path in scratch.iterdir() if path.is_dir())
    again = records(inside)[results(store)[f"{STUDENT}/fitnet>kd/s0"]["key"]]
    assert [session["from_epoch"] > 0 for session in again["sessions"]] == [False, True]
    assert "trained again before" not in done.out
    assert bench(*words).out.splitlines()[-1] == "verified: 1 same bits"  # nothing is trained


@pytest.mark.slow
def test_one_that_is_stopped_leaves_nothing(bench, undisturbed):
    store = shutil.copytree(undisturbed.store, bench.folder / "store")
    words = ("--matrix", undisturbed.matrix, "--store", store, "--all-stages")
    process = bench.start("verify", cell("fitnet>kd"), *words)
    wait_for(lambda: bool(list(store.glob("verify/*/*/stages/*/*/checkpoint.pt"))), process)
    process.send_signal(signal.SIGINT)
    finish(process, expect=130)
    assert not list((store / "verify").iterdir())
    assert outputs(store) == outputs(undisturbed.store)
