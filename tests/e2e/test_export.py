"""``export`` and ``measure`` of students that were really trained: the graphs say what they said."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from command import predictions, results
from smskd_export import open_bundle, read_report
from smskd_export.measurement import read_measurement
from wandb_log import LoggedRun

from smskd.datasets import load_dataset

PAIR, STUDENT = "resnet8_half>resnet8_quarter", "resnet8_quarter"
CELL, NAME = f"{PAIR}/three/s0", f"{STUDENT}/fitnet>kd>dkd/s0"
BUNDLE = {"bundle.json", "protocol.json", "calibration.json", "run.py", "model", "parity"}


@pytest.fixture(scope="module")
def store(finished, tmp_path_factory):
    """A copy of the finished store that is exported into."""
    return shutil.copytree(finished.store, tmp_path_factory.mktemp("exported") / "store")


def export(bench, finished, store, *words, expect=0):
    matrix = ("--matrix", finished.matrix, "--store", store, "--tracking", "none")
    return bench("export", *matrix, *words, expect=expect)


def folder_of(done):
    """The folder that the first line of the output names."""
    return Path(done.out.splitlines()[0].rsplit(": ", 1)[1])


def graph_predictions(path):
    """What ONNX Runtime alone says of the test images as they are: the graph normalises."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = load_dataset("digits", None, False).test.images.astype(np.float32) / 255
    (entry,) = session.get_inputs()
    logits = [session.run(None, {entry.name: images[i : i + 1]})[0] for i in range(len(images))]
    return np.concatenate(logits).argmax(1)


def check_export(folder, store, name):
    """The bundle is whole, and its fp32 graph is the student that was evaluated."""
    opened, result = open_bundle(folder, folder / "never"), results(store)[name]
    assert {path.name for path in (folder / "bundle").iterdir()} == BUNDLE
    assert opened.manifest.provenance["key"] == result["key"]
    assert opened.manifest.torch_top1 == pytest.approx(result["test"]["top1"])
    ours = predictions(store, result["key"])
    assert np.mean(np.load(folder / "bundle" / "parity" / "classes.npy") == ours) >= 0.999
    agreement = np.mean(graph_predictions(folder / "bundle" / "model" / "fp32-b1.onnx") == ours)
    assert agreement >= 0.999
    report = read_report(folder)
    assert not report.left_out
    return opened, report


def test_the_best_row_goes_to_the_cpu_and_is_measured_once(bench, finished, store):
    words = ("--target", "cpu", "--quick")
    done = export(bench, finished, store, *words)
    ours = {name: r["test"]["top1"] for name, r in results(store).items() if STUDENT in name}
    # fitnet alone is a first stage and no row
    best = max((name for name in ours if name != f"{STUDENT}/fitnet/s0"), key=ours.__getitem__)
    folder = folder_of(done)
    assert folder.parent == store / "exports" / results(store)[best]["key"]
    opened, report = check_export(folder, store, best)
    (place,) = (store / "measurements" / opened.manifest.provenance["key"] / folder.name).iterdir()
    found = read_measurement(place)
    assert found.quick
    assert found.bundle_id == report.bundle_id
    assert [row.id for row in found.rows] == ["fp32-b1", "fp32-b8", "int8-b1", "int8-b8"]
    assert found.rows[0].accuracy.top1 == pytest.approx(opened.manifest.torch_top1, abs=0.2)
    assert "quick" in done.out
    for row in found.rows:
        times = np.load(place / row.samples.host_file)
        assert len(times) == sum(row.samples.window_sizes)
        assert times.min() > 0
    again = export(bench, finished, store, *words)
    assert again.out == done.out
    assert len(list(place.parent.iterdir())) == 1


def test_quick_numbers_never_rank(bench, finished, store):
    done = bench("leaderboard", "--matrix", finished.matrix, "--store", store, "--format", "json")
    shown = [export for row in json.loads(done.out) for export in row["exported"]]
    assert {export["status"] for export in shown} <= {"not measured"}
    assert {export["p50_ms"] for export in shown} <= {None}


def test_a_named_cell_goes_to_the_jetson_unmeasured_and_the_second_time_it_is_there(
    bench, finished, store, tmp_path
):
    archive = tmp_path / "student.tar"
    words = ("--target", "jetson", "--cell", CELL, "--archive", archive)
    first = export(bench, finished, store, *words)
    folder = folder_of(first)
    opened, report = check_export(folder, store, NAME)
    assert {graph.opset for graph in opened.manifest.graphs} == {17}
    assert [check.precision for check in report.checks] == ["fp32", "fp16", "int8+fp32"]
    assert "latency: not measured" in first.out
    assert f"smskd-bench measure {folder} --device USER@HOST" in first.out
    data = archive.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    second = export(bench, finished, store, *words)
    assert second.out == first.out
    assert archive.read_bytes() == data
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    print(f"\nexport {first.seconds:.1f} s, again {second.seconds:.1f} s")
    refused = bench("measure", archive, "--quick", expect=3)
    assert "the target is made for aarch64" in refused.err
    assert "nothing was measured" in refused.err


def test_measure_needs_no_torch(bench, finished, store, tmp_path):
    folder = folder_of(export(bench, finished, store, "--target", "cpu", "--quick"))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from smskd_bench.cli import main\n"
        f"main(['measure', {str(folder / 'bundle')!r}, '--quick', '--precision', 'fp32',"
        f" '--test-set', {str(folder / 'test_set')!r}, '--out', {str(tmp_path / 'out')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fp32 b1" in done.stdout
    (place,) = (tmp_path / "out").iterdir()
    assert read_measurement(place).rows[0].accuracy is not None


@pytest.mark.slow
def test_a_measurement_is_mirrored_with_its_files(bench, finished, store):
    words = ("--target", "cpu", "--cell", CELL, "--quick", "--precision", "fp32")
    done = bench(
        "export", "--matrix", finished.matrix, "--store", store, "--tracking", "wandb", *words
    )
    assert "tracking: W&B: 1 run is recorded offline" in done.out
    runs = [LoggedRun(folder) for folder in (store / "wandb").rglob("offline-run-*")]
    (run,) = [run for run in runs if run.run.job_type == "measurement"]
    assert run.summary["fp32-b1/status"] == "ok"
    assert run.summary["fp32-b1/p50_ms"] > 0
    assert {a.type for a in run.artifacts} >= {"bundle", "measurement", "engine-facts"}


@pytest.mark.slow
def test_full_numbers_join_the_leaderboard(bench, finished, store, tmp_path):
    started = time.monotonic()
    done = export(bench, finished, store, "--target", "cpu", "--cell", CELL)
    print(f"\nfull protocol: {time.monotonic() - started:.1f} s")
    assert "picture: " in done.out
    _, report = check_export(folder_of(done), store, NAME)
    board = ("leaderboard", "--matrix", finished.matrix, "--store", store)
    (three,) = [r for r in json.loads(bench(*board, "--format", "json").out) if r["row"] == "three"]
    numbers = {
        e["precision"]: e for e in three["exported"] if e["target"] == "cpu" and e["batch"] == 1
    }
    assert numbers["fp32"]["top1"] == pytest.approx(report.torch_top1, abs=0.2)
    assert numbers["int8"]["status"] == "ok"
    assert f"{numbers['fp32']['p50_ms']:.3f} / " in bench(*board).out
    assert f"{numbers['int8']['p50_ms']:.3f}" in bench(*board, "--devices").out
    picture = tmp_path / "pareto.png"
    bench(*board, "--devices", "--format", "markdown", "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cell_without_student_says_the_command_that_trains_it(bench, finished, tmp_path):
    done = export(bench, finished, tmp_path / "empty", "--target", "cpu", "--cell", CELL, expect=3)
    assert f"{CELL} is not trained yet" in done.err
    command = f"smskd-bench run --matrix {finished.matrix} --only '{CELL}'"
    assert command in done.err
    assert not list((tmp_path / "empty").rglob("*.onnx"))
