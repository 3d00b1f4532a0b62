"""``export`` of students that were really trained: the graph says what the student said."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from command import predictions, results
from smskd_export import verify_bundle

from smskd.datasets import load_dataset

PAIR, STUDENT = "resnet8_half>resnet8_quarter", "resnet8_quarter"
CELL, NAME = f"{PAIR}/three/s0", f"{STUDENT}/fitnet>kd>dkd/s0"
FILES = {"student.onnx", "report.json", "parity", "latency_ns.npy"}


@pytest.fixture(scope="module")
def store(finished, tmp_path_factory):
    """A copy of the finished store that is exported into."""
    return shutil.copytree(finished.store, tmp_path_factory.mktemp("exported") / "store")


def export(bench, finished, store, *words, expect=0):
    return bench("export", "--matrix", finished.matrix, "--store", store, *words, expect=expect)


def bundle_of(done):
    """The folder that the first line of the output names."""
    return Path(done.out.splitlines()[0].rsplit(": ", 1)[1])


def graph_predictions(path, batch):
    """What ONNX Runtime alone says of the test images as they are: the graph normalises."""
    session = onnxruntime.InferenceSession(
        path / "student.onnx", providers=["CPUExecutionProvider"]
    )
    images = load_dataset("digits", None, False).test.images.astype(np.float32) / 255
    (entry,) = session.get_inputs()
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    return np.concatenate([session.run(None, {entry.name: part})[0].argmax(1) for part in parts])


def check_bundle(bundle, store, name, batch):
    report, result = verify_bundle(bundle), results(store)[name]
    assert report.provenance["key"] == result["key"]
    assert report.parity.torch_top1 == pytest.approx(result["test"]["top1"])
    assert report.parity.onnx_top1 == pytest.approx(result["test"]["top1"], abs=0.5)
    agreement = np.mean(graph_predictions(bundle, batch) == predictions(store, result["key"]))
    assert agreement >= 0.999
    return report


def test_the_best_row_goes_to_the_cpu_and_is_timed(bench, finished, store):
    done = export(bench, finished, store, "--target", "cpu", "--quick")
    ours = {name: r["test"]["top1"] for name, r in results(store).items() if STUDENT in name}
    # fitnet alone is a first stage and no row
    best = max((name for name in ours if name != f"{STUDENT}/fitnet/s0"), key=ours.__getitem__)
    bundle = bundle_of(done)
    assert bundle.parent == store / "exports" / results(store)[best]["key"]
    assert bundle.name.startswith("cpu-")
    assert bundle.name.endswith("-quick")
    assert {path.name for path in bundle.iterdir()} == FILES
    report = check_bundle(bundle, store, best, 64)
    assert report.quick
    assert 0 < report.latency.summary.p50_ns <= report.latency.summary.p99_ns
    assert "latency p50" in done.out
    assert "shortened" in done.out


def test_a_named_cell_goes_to_the_jetson_untimed_and_the_second_time_it_is_there(
    bench, finished, store
):
    first = export(bench, finished, store, "--target", "jetson", "--cell", CELL)
    bundle = bundle_of(first)
    assert bundle.parent == store / "exports" / results(store)[NAME]["key"]
    assert bundle.name.startswith("jetson-")
    assert {path.name for path in bundle.iterdir()} == FILES - {"latency_ns.npy"}
    report = check_bundle(bundle, store, NAME, 1)
    assert report.graph.opset == 17
    assert report.latency is None
    assert "latency not measured: " in first.out
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    second = export(bench, finished, store, "--target", "jetson", "--cell", CELL)
    assert second.out == first.out
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    print(f"\nexport {first.seconds:.1f} s, again {second.seconds:.1f} s")


def test_quick_numbers_never_rank(bench, finished, store):
    done = bench("leaderboard", "--matrix", finished.matrix, "--store", store, "--format", "json")
    rows = {row["row"]: row["exported"] for row in json.loads(done.out)}
    assert {e["target"] for found in rows.values() for e in found} <= {"jetson"}
    assert [e["p50_ms"] for e in rows["three"] if e["target"] == "jetson"] == [None]


@pytest.mark.slow
def test_full_numbers_join_the_leaderboard(bench, finished, store):
    started = time.monotonic()
    done = export(bench, finished, store, "--target", "cpu", "--cell", CELL)
    bundle = bundle_of(done)
    print(f"\nfull protocol: {time.monotonic() - started:.1f} s")
    report = check_bundle(bundle, store, NAME, 64)
    assert not report.quick
    done = bench("leaderboard", "--matrix", finished.matrix, "--store", store, "--format", "json")
    (three,) = [row for row in json.loads(done.out) if row["row"] == "three"]
    (numbers,) = [e for e in three["exported"] if e["target"] == "cpu"]
    assert numbers["p50_ms"] == report.latency.summary.p50_ns / 1e6
    assert numbers["top1"] == report.parity.onnx_top1
    shown = bench("leaderboard", "--matrix", finished.matrix, "--store", store).out
    assert f"{numbers['p50_ms']:.3f} / {numbers['p90_ms']:.3f} / {numbers['p99_ms']:.3f}" in shown


def test_a_cell_without_student_says_the_command_that_trains_it(bench, finished, tmp_path):
    done = export(bench, finished, tmp_path / "empty", "--target", "cpu", "--cell", CELL, expect=3)
    assert f"{CELL} is not trained yet" in done.err
    command = f"smskd-bench run --matrix {finished.matrix} --only '{CELL}'"
    assert command in done.err
    assert not list((tmp_path / "empty").rglob("*.onnx"))
