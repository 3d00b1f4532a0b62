"""``run`` on real images: what is trained, what is shared, what is kept, and the same bits again."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from command import ROOT, folder_of, litter, outputs, predictions, results, tiny
from hardware import needs_bf16
from safetensors.torch import load_file, save_file

TEACHER, STUDENT = "resnet8_half/scratch/s0", "resnet8_quarter"
NAMES = {
    TEACHER, f"{STUDENT}/scratch/s0", f"{STUDENT}/kd/s0", f"{STUDENT}/fitnet/s0",
    f"{STUDENT}/fitnet>kd/s0", f"{STUDENT}/fitnet+kd/s0", f"{STUDENT}/kd>fitnet/s0",
    f"{STUDENT}/fitnet>kd>dkd/s0",
}  # fmt: skip


def counts(done):
    """The closing line: trained, already there, failed."""
    line = next(line for line in done.out.splitlines() if "stage runs trained" in line)
    return tuple(int(part.split()[0]) for part in line.split(";")[0].split(","))


def stamps(store):
    files = [p for p in store.rglob("*") if p.is_file()]
    return {p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


def same_outputs(one, other):
    ours, theirs = outputs(one), outputs(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []


def rows_of(bench, matrix, store):
    done = bench("leaderboard", "--matrix", matrix, "--store", store, "--format", "json")
    return {row["row"]: row for row in json.loads(done.out)}


def test_a_run_ends_in_a_table_of_every_row(finished):
    assert counts(finished.done) == (len(NAMES), 0, 0)
    assert set(results(finished.store)) == NAMES
    for row in ("scratch", "kd", "fitnet>kd", "fitnet+kd", "swapped", "three"):
        # Controls stand indented under what they control.
        assert re.search(rf"│ +{re.escape(row)} +│", finished.done.out), row
    assert litter(finished.store) == []


def test_the_table_says_what_the_results_say(bench, finished):
    rows, stored = rows_of(bench, finished.matrix, finished.store), results(finished.store)
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds == {
        "scratch": "student", "kd": "single", "fitnet+kd": "joint",
        "fitnet>kd": "smskd", "swapped": "smskd", "three": "smskd",
    }  # fmt: skip
    three = stored[f"{STUDENT}/fitnet>kd>dkd/s0"]
    assert rows["three"]["top1"] == {"0": three["test"]["top1"]}
    assert rows["three"]["kept"] == three["kept"]["kept"]
    assert rows["three"]["epochs"] == 3 + 2 + 2
    assert {row["teacher_top1"] for row in rows.values()} == {stored[TEACHER]["test"]["top1"]}
    best = max("kd", "fitnet+kd", key=lambda name: rows[name]["mean"])
    versus = rows["fitnet>kd"]["versus"]
    assert rows[versus["control"]]["mean"] == rows[best]["mean"]
    assert versus["difference"] == rows["fitnet>kd"]["mean"] - rows[best]["mean"]
    assert list(rows) == sorted(rows, key=lambda name: -rows[name]["mean"])


def test_every_result_says_where_it_comes_from(finished):
    for name, result in results(finished.store).items():
        folder = folder_of(finished.store, name)
        assert folder.name == result["key"]
        spec = json.loads((folder / "spec.json").read_text())
        assert spec == {"key": result["key"], **result["spec"]}
        environment = result["environment"]
        if (ROOT / ".git").exists():  # else nothing is known of the code's revision
            assert len(environment["code"]["revision"]) == 40
            assert isinstance(environment["code"]["dirty"], bool)
        assert environment["packages"]["torch"] == torch.__version__
        assert environment["machine"]["cores"] >= 1
        assert environment["device"]
        assert environment["threads"] == 1
        assert result["data"] == {"name": "digits", "fingerprint": spec["dataset"]["fingerprint"]}
        assert len(result["history"]) == spec["training"]["epochs"]
        assert result["images_per_s"] > 0
        assert 0 < result["train_seconds"] <= result["wall_seconds_last_session"]
        assert [s["from_epoch"] for s in result["sessions"]] == [0]
        assert (result["kept"] is None) == (spec["number"] == 1)
        guessed = predictions(finished.store, result["key"])
        assert guessed.shape == (797,)


def test_top1_is_that_of_the_stored_predictions(finished):
    from smskd.datasets import load_dataset

    labels = load_dataset("digits", None, False).test.labels
    for result in results(finished.store).values():
        right = (predictions(finished.store, result["key"]) == labels).mean()
        assert result["test"]["top1"] == pytest.approx(100 * right, abs=1e-4)


def test_the_same_command_again_trains_nothing(bench, finished):
    before = stamps(finished.store)
    done = bench.run(finished.matrix, finished.store)
    print(f"\nrerun of a finished matrix: {done.seconds:.2f} s")
    assert counts(done) == (0, len(NAMES), 0)
    assert done.out.splitlines()[:8] == finished.done.out.splitlines()[len(NAMES) :][:8]
    assert stamps(finished.store) == before


@pytest.fixture(scope="module")
def parts(finished, tmp_path_factory):
    """The same matrix in two goes, with accuracy curves: a store and the two outputs."""
    from command import Bench

    bench = Bench(tmp_path_factory.mktemp("parts"))
    store = bench.folder / "store"
    text = finished.matrix.read_text().replace("seeds:", "evaluate_every: 1\nseeds:")
    matrix = bench.folder / "matrix.yaml"
    matrix.write_text(text)
    first = bench.run(matrix, store, "--only", "/fitnet>kd/")
    return store, first, bench.run(matrix, store)


def test_a_part_of_the_matrix_first_shares_its_stage_runs(parts):
    _, first, second = parts
    assert counts(first) == (3, 0, 0)  # the teacher, fitnet, fitnet>kd
    assert counts(second) == (len(NAMES) - 3, 3, 0)


def test_another_store_gets_the_same_bits(finished, parts):
    same_outputs(finished.store, parts[0])
    ours, theirs = results(finished.store), results(parts[0])
    for name, result in ours.items():
        assert result["test"] == theirs[name]["test"]
        assert result["kept"] == theirs[name]["kept"]


def test_evaluate_every_adds_a_curve_and_changes_nothing_else(finished, parts):
    ours, theirs = results(finished.store), results(parts[0])
    timed = ("seconds", "images_per_s", "test_top1")
    for name, result in theirs.items():
        curve = [row.get("test_top1") for row in result["history"]]
        assert None not in curve[:-1]
        plain = [{k: v for k, v in row.items() if k not in timed} for row in result["history"]]
        others = [{k: v for k, v in row.items() if k not in timed} for row in ours[name]["history"]]
        assert plain == others


def test_changes_train_what_they_must_and_no_more(bench, finished, copied):
    text, other = finished.matrix.read_text(), shutil.copytree(copied, bench.folder / "other")
    later, seeds = bench.folder / "later.yaml", bench.folder / "seeds.yaml"
    later.write_text(text.replace("- 3\n  - 2\n", "- 3\n  - 1\n"))
    seeds.write_text(text.replace("seeds:\n- 0\n", "seeds:\n- 0\n- 1\n"))
    shorter, more = counts(bench.run(later, copied)), counts(bench.run(seeds, other))
    assert shorter == (3, len(NAMES) - 3, 0)  # fitnet>kd, kd>fitnet, fitnet>kd>dkd
    assert more == (len(NAMES) - 1, len(NAMES), 0)  # the teacher has its own seed
    for store in (copied, other):
        made = outputs(store)
        assert {key: made[key] for key in outputs(finished.store)} == outputs(finished.store)


def test_imported_teachers_work_as_trained_ones_do(bench, finished):
    trained = folder_of(finished.store, TEACHER) / "student.safetensors"
    tensors = load_file(trained)
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(half, bench.folder / "half.safetensors")
    (bench.folder / "full.safetensors").write_bytes(trained.read_bytes())
    ours = results(finished.store)
    for name in ("full", "half"):
        section = {"weights": {"resnet8_half": f"{name}.safetensors"}}
        matrix = bench.matrix(tiny(["kd"], ["fitnet", "kd"], teacher=section), name)
        assert counts(bench.run(matrix, bench.folder / name)) == (4, 0, 0)
        assert litter(bench.folder / name) == []
        theirs = results(bench.folder / name)
        teacher = theirs[TEACHER]
        file = (bench.folder / f"{name}.safetensors").read_bytes()
        assert teacher["spec"]["imported"] == hashlib.sha256(file).hexdigest()
        assert teacher["history"] == []
        off = 0.0 if name == "full" else 10.0  # half of the bits, nearly the same teacher
        for stage in theirs.keys() - {TEACHER}:
            assert theirs[stage]["test"]["top1"] == pytest.approx(
                ours[stage]["test"]["top1"], abs=off
            )
        assert teacher["test"]["top1"] == pytest.approx(ours[TEACHER]["test"]["top1"], abs=off / 5)
    stores = (finished.store, bench.folder / "full", bench.folder / "half")
    keys = set().union(*(outputs(store) for store in stores))
    assert len(keys) == len(NAMES) + 4 + 4  # what learns from another file has another key


def test_wrong_teacher_weights_are_refused(bench, finished):
    student = folder_of(finished.store, f"{STUDENT}/kd/s0") / "student.safetensors"
    cases = {
        "other": (student.read_bytes(), ["other.safetensors", "resnet8_half", "10 classes"]),
        "torn": (student.read_bytes()[:2000], ["torn.safetensors cannot be read"]),
    }
    for name, (content, words) in cases.items():
        (bench.folder / f"{name}.safetensors").write_bytes(content)
        teacher = {"weights": {"resnet8_half": f"{name}.safetensors"}}
        matrix = bench.matrix(tiny(["kd"], teacher=teacher), name)
        done = bench.run(matrix, bench.folder / name, expect=2)
        assert done.err.startswith("error: ")
        for word in words:
            assert word in done.err
        assert "delete its folder" not in done.err  # the file is the user's, not the store's
        assert outputs(bench.folder / name) == {}


def test_best_on_dev_hands_on_the_best_epoch(undisturbed):
    stored = results(undisturbed.store)
    for row in ("fitnet", "fitnet>kd"):
        result = stored[f"{STUDENT}/{row}/s0"]
        dev = [epoch["dev_top1"] for epoch in result["history"]]
        best = dev.index(max(dev))  # ties keep the earlier
        if best < len(dev) - 1:  # the curve has no last point: that is the result
            assert result["test"]["top1"] == result["history"][best]["test_top1"]


@needs_bf16
def test_bf16_trains_other_weights(bench, finished):
    document = tiny(["fitnet", "kd"])
    document["recipe"]["precision"] = "bf16"
    store = bench.folder / "store"
    bench.run(bench.matrix(document), store)
    assert outputs(store).keys().isdisjoint(outputs(finished.store))
    name = f"{STUDENT}/fitnet>kd/s0"
    ours, theirs = (
        load_file(folder_of(s, name) / "student.safetensors") for s in (store, finished.store)
    )
    assert {t.dtype for t in ours.values()} == {torch.float32, torch.int64}
    assert not torch.equal(ours["fc.weight"], theirs["fc.weight"])
    assert torch.allclose(ours["fc.weight"], theirs["fc.weight"], atol=0.2)
