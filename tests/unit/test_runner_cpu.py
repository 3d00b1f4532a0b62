"""The device runner through ONNX Runtime, as a process: what it says, what it leaves."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
from runner_bundle import (
    PRECISIONS,
    PROTOCOL,
    change_spec,
    graph,
    make_bundle,
    make_test_set,
    named,
    run_process,
    sha256,
    torch_logits,
)
from smskd_export.latency import summarise
from smskd_export.measurement import load_samples, read_measurement
from smskd_export.runner import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One full run: bundle, test set, results, exit status, events, standard error."""
    folder = tmp_path_factory.mktemp("cpu")
    tests = make_test_set(folder / "tests")
    bundle = make_bundle(folder / "bundle", tests, names=("fp32", "int8+fp32"))
    words = ["--out", folder / "out", "--test-set", tests]
    status, events, errors = run_process(bundle, *words, cache=folder / "cache")
    return bundle, tests, folder / "out", status, events, errors


def test_events_come_in_order(made):
    *_, status, events, errors = made
    assert (status, errors) == (0, "")
    names = [e["event"] for e in events if e["event"] != "accuracy_progress"]
    single = ["build", "parity", "accuracy", "settle", "warmup", *["window"] * 3, "row"]
    sweep = ["build", "parity", "settle", "warmup", "window", "row"]
    assert names == ["start", "probe", "verify", *(single + sweep) * 2, "reprobe", "end"]
    assert events[-1]["status"] == "ok"
    times = [event["t"] for event in events]
    assert times == sorted(times)


def test_events_are_kept_as_they_were_printed(made):
    _, _, out, _, events, _ = made
    kept = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert kept == events


def test_the_record_is_the_one_that_the_host_reads(made):
    bundle, _, out, *_ = made
    found = read_measurement(out)
    assert found.bundle_id == sha256(bundle / "bundle.json")
    assert found.runner_sha256 == sha256(bundle / "run.py")
    assert (found.protocol, found.threads, found.affinity, found.aborted) == ("test-v1", 1, (), "")
    assert [row.id for row in found.rows] == ["fp32-b1", "fp32-b3", "int8+fp32-b1", "int8+fp32-b3"]
    assert [row.scenario for row in found.rows] == ["single_stream", "sweep"] * 2
    assert {row.status for row in found.rows} == {"ok"}
    assert set(found.files) == {p.name for p in out.iterdir()} - {"result.json"}
    text = (out / "result.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    fields = {field.name for field in dataclasses.fields(found)}
    assert set(json.loads(text)) == fields
    assert found.before.runtime == "onnxruntime"
    assert found.before.gpu_processes == ()
    assert found.before.cores == len(os.sched_getaffinity(0))


def test_every_sample_is_kept(made):
    _, _, out, _, events, _ = made
    for row in read_measurement(out).rows:
        samples = load_samples(out, row.samples.host_file)
        sizes = row.samples.window_sizes
        assert samples.size == sum(sizes)
        assert samples.min() > 0
        assert min(sizes) >= PROTOCOL.min_samples
        assert len(sizes) == (1 if row.scenario == "sweep" else 3)
        said = [e for e in named(events, "window") if e["id"] == row.id]
        assert [e["n"] for e in said] == list(sizes)
        assert [e["number"] for e in said] == list(range(1, len(sizes) + 1))
        parts = np.split(samples, np.cumsum(sizes)[:-1])
        for event, part in zip(said, parts, strict=True):
            assert event["p50_ms"] == pytest.approx(np.median(part) / 1e6)
            assert part.sum() < 2e9
        assert summarise(samples, sizes).n == samples.size
        assert (row.samples.gpu_file, row.samples.enqueue_file) == (None, None)
        assert row.samples.warmup_runs >= PROTOCOL.warmup_runs
        assert row.samples.warmup_s >= PROTOCOL.warmup_s


def test_quality_is_measured_on_the_whole_test_set(made):
    _, tests, out, *_ = made
    images, labels = np.load(tests / "images.npy"), np.load(tests / "labels.npy")
    torch_classes = torch_logits(images.astype(np.float32) / 255).argmax(1)
    fp32, sweep, *_ = read_measurement(out).rows
    assert sweep.accuracy is None
    assert sweep.parity.n == PROTOCOL.parity_images
    classes = np.load(out / fp32.accuracy.classes_file)
    assert classes.dtype == np.int32
    assert (classes == torch_classes).all()
    assert fp32.accuracy.n == 50
    assert fp32.accuracy.top1 == pytest.approx(100 * (torch_classes == labels).mean())
    assert fp32.accuracy.top1 < fp32.accuracy.top5 <= 100
    assert fp32.accuracy.agreement == 100
    assert fp32.parity.max_abs_diff < 1e-4
    assert fp32.parity.min_cosine == pytest.approx(1)


def test_top5_is_what_sorting_says(made):
    _, tests, out, *_ = made
    images, labels = np.load(tests / "images.npy"), np.load(tests / "labels.npy")
    order = np.argsort(-torch_logits(images.astype(np.float32) / 255), axis=1)[:, :5]
    right = (order == labels[:, None]).any(axis=1)
    assert read_measurement(out).rows[0].accuracy.top5 == pytest.approx(100 * right.mean())


def test_build_facts_of_a_graph_without_engine(made):
    bundle, _, out, *_ = made
    row = read_measurement(out).rows[0]
    data = (bundle / "model/fp32-b1.onnx").read_bytes()
    assert row.build.engine_bytes == len(data)
    assert row.build.engine_sha256 == row.graph_sha256 == hashlib.sha256(data).hexdigest()
    assert (row.build.build_s, row.build.cached, row.build.device_memory_bytes) == (0, False, None)
    assert row.build.load_ns > 0
    assert row.build.first_ns > 0
    assert row.build.peak_rss_bytes > 10 << 20


def run_here(tmp_path, *words, **bundle_options):
    tests = make_test_set(tmp_path / "tests")
    options = {"batches": (1,), **bundle_options}
    bundle = make_bundle(tmp_path / "bundle", tests, **options)
    out = tmp_path / "out"
    words = ["--out", out, "--test-set", tests, *words]
    status, events, errors = run_process(bundle, *words, cache=tmp_path / "cache")
    return status, events, errors, read_measurement(out)


def test_quick_is_marked(tmp_path):
    status, _, _, found = run_here(tmp_path, "--quick")
    assert status == 0
    assert found.quick
    assert len(found.rows[0].samples.window_sizes) == 2


def test_options_choose_precision_threads_and_cores(tmp_path):
    core = min(os.sched_getaffinity(0))
    words = ["--precision", "int8+fp32", "--threads", "2", "--affinity", str(core), "--no-energy"]
    status, _, _, found = run_here(tmp_path, *words, names=("fp32", "int8+fp32"))
    assert status == 0
    assert [row.precision for row in found.rows] == ["int8+fp32"]
    assert (found.threads, found.affinity) == (2, (core,))
    assert found.after.cores == 1


def test_without_a_test_set_there_is_no_accuracy(tmp_path):
    tests = make_test_set(tmp_path / "tests")
    bundle = make_bundle(tmp_path / "bundle", tests, batches=(1,))
    status, events, _ = run_process(bundle, "--out", tmp_path / "out", cache=tmp_path / "c")
    assert status == 0
    assert not named(events, "accuracy")
    row = read_measurement(tmp_path / "out").rows[0]
    assert row.accuracy is None
    assert row.samples is not None


def failing(tmp_path, precision, **options):
    name = precision.name
    return run_here(tmp_path, names=(name, "int8+fp32"), **options,
                    precisions={**PRECISIONS, name: precision})  # fmt: skip


def test_a_logit_too_far_from_pytorch_means_no_latency(tmp_path):
    strict = dataclasses.replace(PRECISIONS["fp16"], max_abs_diff=1e-6)
    status, events, _, found = failing(tmp_path, strict)
    assert status == 5
    bad, good = found.rows
    assert (bad.status, bad.samples, bad.accuracy) == ("gate_failed", None, None)
    assert "differs from PyTorch's" in bad.reason
    assert bad.parity.max_abs_diff > 1e-6
    assert good.status == "ok"
    assert events[-1]["status"] == "gate_failed"
    assert not [e for e in named(events, "window") if e["precision"] == "fp16"]


def test_predictions_that_agree_too_seldom_mean_no_latency(tmp_path):
    wrong = graph("fp32", 1)
    negated = np.float32(-1) * np.frombuffer(_weight(wrong), np.float32)
    wrong = wrong.replace(_weight(wrong), negated.tobytes())
    loose = dataclasses.replace(PRECISIONS["fp32"], max_abs_diff=None)
    status, _, _, found = failing(tmp_path, loose, graphs={"model/fp32-b1.onnx": wrong})
    assert status == 5
    assert found.rows[0].status == "gate_failed"
    assert "agree with PyTorch's" in found.rows[0].reason


def _weight(model):
    import onnx

    tensors = {t.name: t.raw_data for t in onnx.load_from_string(model).graph.initializer}
    return tensors["second"]


def test_logits_that_are_not_finite_mean_no_latency(tmp_path):
    model = graph("fp32", 1)
    poisoned = np.frombuffer(_weight(model), np.float32).copy()
    poisoned[0] = np.nan
    model = model.replace(_weight(model), poisoned.tobytes())
    status, _, _, found = failing(
        tmp_path, PRECISIONS["fp32"], graphs={"model/fp32-b1.onnx": model}
    )
    assert status == 5
    assert found.rows[0].parity.max_abs_diff == 1e308
    assert "not finite" in found.rows[0].reason


def test_accuracy_below_the_limit_means_no_latency(tmp_path):
    tests = make_test_set(tmp_path / "tests")
    bundle = make_bundle(tmp_path / "bundle", tests, batches=(1,))
    change_spec(bundle, torch_top1=99.0)
    words = ["--out", tmp_path / "out", "--test-set", tests]
    status, _, _ = run_process(bundle, *words, cache=tmp_path / "c")
    row = read_measurement(tmp_path / "out").rows[0]
    assert status == 5
    assert row.status == "gate_failed"
    assert row.samples is None
    assert row.accuracy.top1 == pytest.approx(74)
    assert "25.00 points below" in row.reason


def test_a_graph_that_does_not_load_is_a_failed_row(tmp_path):
    status, _, errors, found = run_here(
        tmp_path, names=("fp32", "fp16"), graphs={"model/fp32-b1.onnx": b"no graph"}
    )
    assert status == 5
    assert [row.status for row in found.rows] == ["failed", "ok"]
    assert found.rows[0].build is None
    assert found.rows[0].reason
    assert "Traceback" in errors


def test_a_graph_of_another_batch_size_is_a_failed_row(tmp_path):
    status, _, _, found = run_here(tmp_path, graphs={"model/fp32-b1.onnx": graph("fp32", 2)})
    assert status == 5
    assert found.rows[0].status == "failed"


def test_inputs_go_on_from_window_to_window(tmp_path, monkeypatch):
    slots = []
    original = run.OnnxRuntimeBackend.time_one

    def recording(self, slot):
        slots.append(slot)
        return original(self, slot)

    monkeypatch.setattr(run.OnnxRuntimeBackend, "time_one", recording)
    bundle = make_bundle(tmp_path / "bundle", make_test_set(tmp_path / "tests"), batches=(1,))
    words = [str(bundle), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert run.main(words) == 0
    samples = read_measurement(tmp_path / "out").rows[0].samples
    assert len(slots) == samples.warmup_runs + sum(samples.window_sizes)
    timed = slots[samples.warmup_runs :]
    assert timed == [n % PROTOCOL.distinct_inputs for n in range(len(timed))]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_has_exactly_these_threads_and_ran_once(tmp_path, monkeypatch, threads):
    seen = []
    original = run.OnnxRuntimeBackend.run

    def counting(self, images):
        seen.append(images.shape)
        return original(self, images)

    monkeypatch.setattr(run.OnnxRuntimeBackend, "run", counting)
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph("fp32", 3))
    backend = run.OnnxRuntimeBackend(run.load_runtime("onnxruntime"), threads)
    backend.build(path, 3, "", (1, 4, 4))
    options = backend._session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.inter_op_num_threads == 1
    assert options.execution_mode.name == "ORT_SEQUENTIAL"
    assert backend._session.get_providers() == ["CPUExecutionProvider"]
    assert seen == [(3, 1, 4, 4)]


def test_it_rests_between_windows(tmp_path):
    tests = make_test_set(tmp_path / "tests")
    rules = dataclasses.replace(PROTOCOL, cooldown_s=0.2, settle_s=0.3)
    bundle = make_bundle(tmp_path / "bundle", tests, batches=(1,), protocol=rules)
    _, events, _ = run_process(bundle, "--out", tmp_path / "out", cache=tmp_path / "c")
    times = [e["t"] for e in named(events, "window")]
    assert (np.diff(times) >= 0.2).all()
    assert named(events, "settle")[0]["s"] >= 0.3
