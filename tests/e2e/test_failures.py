"""What goes wrong becomes a row with a reason or one clear message, and the rest goes on."""

import json
import os
import shutil

import pytest
from command import Bench, finish, folder_of, litter, outputs, records, results, tiny, wait_for
from disks import resize, set_writable, small_disk, without_roots_rights
from plugin_site import install

STUDENT = "resnet8_quarter"


def closing(done):
    """The lines after the table: the counts, then a line for each failure."""
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if "stage runs trained" in line)
    return lines[start], [line.strip() for line in lines[start + 1 :]]


def rows_of(bench, matrix, store):
    done = bench("leaderboard", "--matrix", matrix, "--store", store, "--format", "json")
    return {(row["pair"], row["row"]): row for row in json.loads(done.out)}


# Divergence.


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """Two pairs, the second with a learning rate that no network survives."""
    bench = Bench(tmp_path_factory.mktemp("diverged"))
    wild = {"teacher": "resnet8_half", "student": "resnet8_half", "lr": 1e6}
    pairs = [{"teacher": "resnet8_half", "student": STUDENT}, wild]
    matrix = bench.matrix(tiny(["kd"], ["kd", "fitnet"], pairs=pairs, teacher={"epochs": 3}))
    store = bench.folder / "store"
    return bench, matrix, store, bench.run(matrix, store, expect=4)


def test_a_divergence_becomes_a_row_and_the_rest_goes_on(diverged):
    bench, matrix, store, done = diverged
    counts, failures = closing(done)
    assert counts.startswith("3 stage runs trained, 0 already there, 2 failed")
    assert failures[0].startswith("resnet8_half kd s0 stage 1: diverged: loss term")
    assert "no longer finite in epoch" in failures[0]
    assert failures[1].startswith("resnet8_half fitnet s0 stage 2: blocked: resnet8_half kd s0")
    assert "--retry-failed" in failures[2]
    rows = rows_of(bench, matrix, store)
    good, bad = f"resnet8_half>{STUDENT}", "resnet8_half>resnet8_half"
    assert {rows[good, row]["status"] for row in ("kd", "kd>fitnet")} == {"done"}
    for row in ("kd", "kd>fitnet"):
        assert rows[bad, row]["status"].startswith("s0 diverged: loss term")
        assert rows[bad, row]["mean"] is None
    assert litter(store) == []


def test_a_divergence_is_not_tried_again_unless_asked(diverged):
    bench, matrix, store, _ = diverged
    (path,) = store.rglob("failed.json")
    before, status = path.read_bytes(), bench.start("status", "--store", store, "--matrix", matrix)
    counts, failures = closing(bench.run(matrix, store, expect=4))
    assert counts.startswith("0 stage runs trained, 3 already there, 2 failed")
    assert "diverged" in failures[0]
    assert path.read_bytes() == before
    said = finish(status).out
    assert "2 of 4 cells done" in said
    assert "resnet8_half kd s0 stage 1: diverged: loss term" in said
    counts, _ = closing(bench.run(matrix, store, "--retry-failed", expect=4))
    assert counts.startswith("0 stage runs trained, 3 already there, 2 failed")
    assert json.loads(path.read_text())["time"] > json.loads(before)["time"]


# Methods of other packages.

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from smskd.errors import IncompatibleError
from smskd.methods import Method, Needs


@dataclass(frozen=True)
class Picky(Method):
    name: ClassVar[str] = "picky"
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs()

    def build(self, shapes):  # what only the networks themselves tell, not their sizes
        classes = shapes.student.num_classes
        raise IncompatibleError(f"it wants 7 classes, and there are {classes}")

    def distill(self, signals, modules):
        return {}


@dataclass(frozen=True)
class Broken(Method):
    name: ClassVar[str] = "broken"
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs()
    works: bool = False

    def distill(self, signals, modules):
        if signals.epoch == 2 and not FIXED:
            raise RuntimeError("out of ideas in epoch 2")
        return {"kd": 0.5 * (signals.student.logits - signals.teacher.logits).square().mean()}
"""
METHODS = {"picky": "Picky", "broken": "Broken"}


def install_strange(folder, fixed):
    install(folder, "smskd_strange", f"FIXED = {fixed}\n{PLUGIN}", METHODS)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("plugins"))
    install_strange(bench.folder / "site", fixed=False)
    document = tiny(["picky"], ["broken", "kd"], ["fitnet", "picky"], plugins=["picky", "broken"])
    matrix = bench.matrix(document)
    path = os.pathsep.join([bench.environment()["PYTHONPATH"], str(bench.folder / "site")])
    store = bench.folder / "store"
    return bench, matrix, store, path, bench.run(matrix, store, expect=4, PYTHONPATH=path)


def test_methods_that_refuse_or_break_become_rows(plugins):
    _, _, store, _, done = plugins
    counts, failures = closing(done)
    assert counts.startswith("2 stage runs trained, 0 already there, 4 failed")  # teacher, fitnet
    reasons = dict(line.split(": ", 1) for line in failures[:-1])
    refusal = "it wants 7 classes, and there are 10"
    assert reasons[f"{STUDENT} picky s0 stage 1"].startswith("incompatible: ")
    assert refusal in reasons[f"{STUDENT} picky s0 stage 1"]
    assert refusal in reasons[f"{STUDENT} picky s0 stage 2"]
    crash = "failed: RuntimeError: out of ideas in epoch 2"
    assert reasons[f"{STUDENT} broken s0 stage 1"] == crash
    blocked = reasons[f"{STUDENT} kd s0 stage 2"]
    assert blocked == f"blocked: {STUDENT} broken s0 stage 1 {crash}"
    failed = [json.loads(path.read_text()) for path in store.rglob("failed.json")]
    assert sorted(f["status"] for f in failed) == ["failed", "incompatible", "incompatible"]
    assert [f["epoch"] for f in failed if f["status"] == "failed"] == [1]


def test_what_sizes_alone_rule_out_is_refused_before_anything_runs(bench):
    hint = {"hint_9": {"method": "fitnet", "settings": {"hint_layer": 9}}}
    store = bench.folder / "store"
    done = bench.run(bench.matrix(tiny(["kd"], ["kd", "hint_9"], methods=hint)), store, expect=3)
    assert "resnet8_half>resnet8_quarter: fitnet: hint_layer 9 asked for" in done.err
    assert "nothing was run" in done.err
    assert not list(store.glob("stages/*"))


def test_a_mended_method_goes_on_from_its_checkpoint(plugins):
    bench, matrix, store, path, _ = plugins
    install_strange(bench.folder / "site", fixed=True)
    counts, failures = closing(bench.run(matrix, store, expect=4, PYTHONPATH=path))
    assert counts.startswith("2 stage runs trained, 2 already there, 2 failed")
    assert all("incompatible" in line for line in failures[:-1])
    mended = results(store)[f"{STUDENT}/broken/s0"]
    assert [s["from_epoch"] for s in mended["sessions"]] == [0, 1]
    assert litter(store) == []


def test_a_plug_in_that_is_not_installed_is_refused(plugins):
    bench, matrix, store, _, _ = plugins
    before = outputs(store)
    done = bench.run(matrix, store, expect=2)
    assert "picky" in done.err
    assert "install it" in done.err
    assert outputs(store) == before


# Damage.


def test_a_damaged_parent_stops_with_its_name(bench, finished, copied):
    (folder_of(copied, f"{STUDENT}/fitnet>kd/s0") / "result.json").unlink()
    parent = folder_of(copied, f"{STUDENT}/fitnet/s0") / "student.safetensors"
    whole = parent.read_bytes()
    parent.write_bytes(whole[: len(whole) // 2])
    done = bench.run(finished.matrix, copied, expect=3)
    assert done.err.startswith(f"error: {parent} cannot be read: ")
    assert "delete its folder, and run the matrix again" in done.err
    shutil.rmtree(parent.parent)  # what the message says
    bench.run(finished.matrix, copied)
    assert outputs(copied) == outputs(finished.store)
    assert litter(copied) == []


def test_missing_data_are_said_before_anything_is_made(bench):
    document = tiny(["kd"], dataset={"name": "cifar100"})
    store = bench.folder / "store"
    done = bench.run(bench.matrix(document), store, "--data-root", bench.folder, expect=3)
    assert done.err.startswith("error: ")
    assert "cifar100" in done.err
    assert "--data-root" in done.err
    assert not list(store.glob("stages/*"))
    assert done.out == ""


# A disk that is full, a store that turns read-only.


def test_a_full_disk_stops_with_one_message_and_the_run_goes_on_after(bench, finished):
    # No table fits beside so little room, and a live teacher rounds otherwise.
    live, whole = ("--teacher-table", "off"), bench.folder / "live"
    bench.run(finished.matrix, whole, *live)
    with small_disk(bench.folder / "disk", "64k") as store:
        for size in ("64k", "400k"):
            resize(store, size)
            done = bench.run(finished.matrix, store, *live, expect=3)
            print(f"\n{size}: {len(records(store))} stage runs done; {done.err.splitlines()}")
            assert f"the store {store} cannot be written: No space left on device" in done.err
            assert "free some space" in done.err
            assert not list(store.rglob("failed.json"))
            assert not list(store.rglob("*.tmp"))
            kept = outputs(store)
            assert all(kept[key] == outputs(whole)[key] for key in records(store))
        resize(store, "50m")
        bench.run(finished.matrix, store, *live)
        assert outputs(store) == outputs(whole)
        assert litter(store) == []


@pytest.fixture
def ordinary(tmp_path):
    return without_roots_rights(tmp_path)


@pytest.mark.slow
def test_a_store_that_turns_read_only_stops_the_run_which_goes_on_after(ordinary):
    matrix, store = ordinary.matrix(_slow()), ordinary.folder / "store"
    process = ordinary.start_run(matrix, store)
    wait_for(lambda: len(records(store)) >= 1, process)
    set_writable(store, False)
    done = finish(process, expect=3)
    refusal = f"the store {store} cannot be written: "
    assert refusal + "Permission denied" in done.err
    again = ordinary.start_run(matrix, store)
    assert refusal in finish(again, expect=3).err
    set_writable(store, True)
    ordinary.run(matrix, store)
    assert litter(store) == []
    assert len(records(store)) == 4


def _slow():
    document = tiny(["kd", "fitnet"], ["scratch"], dataset={"name": "digits", "train_size": 500})
    document["recipe"]["epochs"] = [4, 4]
    return document


# Two at once.


@pytest.mark.slow
def test_two_processes_share_the_work_of_one_matrix(bench):
    matrix, store = bench.matrix(_slow()), bench.folder / "store"
    both = [bench.start_run(matrix, store) for _ in range(2)]
    done = [finish(process) for process in both]
    for result in records(store).values():
        assert [s["from_epoch"] for s in result["sessions"]] == [0]
    trained = [int(closing(d)[0].split()[0]) for d in done]
    print(f"\ntrained by each: {trained}")
    assert sum(trained) == len(records(store)) == 4
    assert litter(store) == []
