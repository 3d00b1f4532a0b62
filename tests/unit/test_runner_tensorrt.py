"""The TensorRT path of the device runner, end to end, for every version's recorded API surface.

The module and the CUDA library are stand-ins that compute right numbers; see fake_tensorrt.
"""

import gc
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from fake_tensorrt import SURFACES, VERSIONS, FakeCudart, make_tensorrt
from runner_bundle import (
    PRECISIONS,
    PROTOCOL,
    events_of,
    graph,
    make_bundle,
    make_test_set,
    named,
    sha256,
)
from smskd_export.measurement import load_samples, read_measurement
from smskd_export.runner import run

NAMES = ("fp32", "fp16", "int8+fp32")


@pytest.fixture(autouse=True, scope="module")
def light_collector():
    """The runner collects garbage before every window; not what the rest of the tests holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    """No nvidia-smi of this machine takes part."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorrt")
    tests = make_test_set(folder / "tests")
    return make_bundle(folder / "bundle", tests, runtime="tensorrt", names=NAMES), tests


def device(version="10.3", **options):
    library = FakeCudart(cuda=SURFACES[version]["cuda"], **options)
    return library, make_tensorrt(version, library)


def measure(bundle, tests, out, library, trt, *words, cache=None):
    words = [*words, "--out", str(out), "--test-set", str(tests)]
    words += ["--cache", str(cache or out.parent / "cache")]
    status = run.main([str(bundle), *words], trt=trt, cuda=run.Cuda(library))
    return status, read_measurement(out)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_measures_every_precision(inputs, tmp_path, version):
    library, trt = device(version)
    status, found = measure(*inputs, tmp_path / "out", library, trt)
    assert status == 0
    assert library.live == []
    assert library.spinning
    wanted = [f"{name}-b{end}" for name in NAMES for end in ("1", "1-graph", "3")]
    assert [row.id for row in found.rows] == wanted
    assert {row.status for row in found.rows} == {"ok"}
    assert [row.cuda_graph for row in found.rows] == [False, True, False] * 3
    for row in found.rows:
        assert (
            row.parity.max_abs_diff < {"fp32": 1e-4, "fp16": 0.02, "int8+fp32": 0.5}[row.precision]
        )
        assert (row.accuracy is None) == (row.scenario == "sweep")
        host, gpu, enqueue = (
            load_samples(tmp_path / "out", name)
            for name in (row.samples.host_file, row.samples.gpu_file, row.samples.enqueue_file)
        )
        assert host.size == gpu.size == enqueue.size == sum(row.samples.window_sizes)
        assert (host >= gpu).mean() > 0.99  # the events lie within; float32 rounds
        assert min(gpu.min(), enqueue.min()) >= 0
    assert found.before.runtime_version == trt.__version__
    assert found.before.compute_capability == "8.7"


BRANCHES = {
    "8.5": {"fp16": "flag_fp16", "int8+fp32": "flag_fp16 flag_int8"},
    "8.6": {"fp16": "flag_fp16", "int8+fp32": "flag_fp16 flag_int8"},
    "10.3": {"fp16": "strongly_typed", "int8+fp32": "strongly_typed"},
    "10.13": {"fp16": "strongly_typed", "int8+fp32": "strongly_typed"},
    "11.1": {"fp16": "strongly_typed", "int8+fp32": "strongly_typed"},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_branches_are_those_of_the_version_and_recorded(inputs, tmp_path, version):
    library, trt = device(version)
    _, found = measure(*inputs, tmp_path / "out", library, trt, "--quick")
    first = ["explicit_batch"] if version != "11.1" else []
    for row in found.rows:
        taken = BRANCHES[version].get(row.precision, "").split()
        expected = [*first, *taken, "tf32_off", "memory_pool_limit"]
        assert list(row.build.branches[:-1]) == expected
        assert row.build.branches[-1] in ("timing_cache_new", "timing_cache_read")
        assert row.build.device_memory_bytes == (1000 if version.startswith("8") else 2000)
        assert "a fake warns" in row.build.warnings
        assert "not of interest" not in row.build.warnings
    assert found.rows[0].build.branches[-1] == "timing_cache_new"
    assert found.rows[2].build.branches[-1] == "timing_cache_read"
    flags = {name for build in trt.builds for name in build["flags"]}
    assert flags <= {"FP16", "INT8"}
    assert {build["config"]._pools["WORKSPACE"] for build in trt.builds} == {64 << 20}


def test_tf32_and_strict_int8_follow_the_profile(tmp_path):
    tests = make_test_set(tmp_path / "tests")
    strict = {**PRECISIONS, "int8+fp32": replace(PRECISIONS["int8+fp32"], weak_fp16=False)}
    bundle = make_bundle(
        tmp_path / "bundle", tests, runtime="tensorrt", names=("int8+fp32",), batches=(1,),
        precisions=strict, tf32=True,
    )  # fmt: skip
    library, trt = device("8.6")
    _, found = measure(bundle, tests, tmp_path / "out", library, trt, "--quick")
    assert trt.builds[0]["flags"] == {"INT8", "TF32"}
    assert "tf32_on" in found.rows[0].build.branches


def test_names_that_a_version_lacks_raise_as_they_would():
    _, old = device("8.5")
    _, new = device("11.1")
    assert not hasattr(new.BuilderFlag, "FP16")
    assert not hasattr(new.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    assert not hasattr(old.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    assert not hasattr(new.ICudaEngine, "device_memory_size")
    assert not hasattr(old.ICudaEngine, "device_memory_size_v2")
    assert not hasattr(old.ParserError, "node_operator")
    with pytest.raises(AttributeError):
        new.IBuilderConfig().max_workspace_size = 1


def test_a_version_without_memory_pools_gets_the_older_limit(inputs):
    _, trt = device("8.5")
    config = trt.IBuilderConfig
    del config.set_memory_pool_limit
    _, branches, _ = run.build_engine(trt, graph("fp32", 1), run.BuildSettings("fp32"))
    assert "max_workspace_size" in branches


def test_engines_are_built_once_and_kept_as_they_are(inputs, tmp_path):
    library, trt = device()
    _, first = measure(*inputs, tmp_path / "one", library, trt, "--quick")
    builds = len(trt.builds)
    library, trt = device()
    _, second = measure(*inputs, tmp_path / "two", library, trt, "--quick")
    assert builds == 6
    assert trt.builds == []
    for before, after in zip(first.rows, second.rows, strict=True):
        assert (before.build.cached, after.build.cached) == (False, True)
        assert before.build.build_s > 0
        assert after.build.build_s == 0
        assert before.build.engine_sha256 == after.build.engine_sha256
        assert before.build.branches == after.build.branches
    folders = sorted((tmp_path / "cache/engines").iterdir())
    assert len(folders) == 6
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["engine", "engine.json"]
        facts = json.loads((folder / "engine.json").read_text())
        assert facts["sha256"] == sha256(folder / "engine")
        assert facts["built_for"] == {"tensorrt": trt.__version__, "gpu": "Fake GPU", "cc": "8.7"}


def test_another_version_builds_its_own_engines(inputs, tmp_path):
    for version in ("10.3", "10.13"):
        library, trt = device(version)
        measure(*inputs, tmp_path / version, library, trt, "--quick")
        assert len(trt.builds) == 6
    assert len(list((tmp_path / "cache/engines").iterdir())) == 12
    assert len(list((tmp_path / "cache/timing").iterdir())) == 2


@pytest.mark.parametrize("how", ["changed", "unreadable", "of another driver"])
def test_a_kept_engine_that_is_no_good_is_built_again(inputs, tmp_path, how):
    library, trt = device()
    measure(*inputs, tmp_path / "one", library, trt, "--quick", "--precision", "fp32")
    folders = list((tmp_path / "cache/engines").iterdir())
    plans = [(folder / "engine").read_bytes() for folder in folders]
    for folder, other in zip(folders, reversed(plans), strict=True):
        facts = json.loads((folder / "engine.json").read_text())
        if how == "changed":
            (folder / "engine").write_bytes(other)
        elif how == "unreadable":
            (folder / "engine.json").write_text("{")
        else:
            (folder / "engine").write_bytes(b"foreign")
            facts["sha256"] = sha256(folder / "engine")
            (folder / "engine.json").write_text(json.dumps(facts))
    library, trt = device()
    status, found = measure(
        *inputs, tmp_path / "two", library, trt, "--quick", "--precision", "fp32"
    )
    assert status == 0
    assert len(trt.builds) == 2
    assert not any(row.build.cached for row in found.rows)


@pytest.mark.parametrize("version", ["8.5", "10.3"])
def test_a_graph_that_cannot_be_read_is_a_failed_row_with_the_node(tmp_path, version):
    tests = make_test_set(tmp_path / "tests")
    bundle = make_bundle(
        tmp_path / "bundle", tests, runtime="tensorrt", names=("fp32", "fp16"), batches=(1,),
        graphs={"model/fp32-b1.onnx": graph("fp32", 1, extra="Det")},
    )  # fmt: skip
    library, trt = device(version)
    status, found = measure(bundle, tests, tmp_path / "out", library, trt, "--quick")
    assert status == 5
    assert [row.status for row in found.rows] == ["failed", "ok", "ok"]
    reason = found.rows[0].reason
    assert "node 5" in reason
    assert "opset 17" in reason
    assert "no importer for Det" in reason
    assert ("'/odd' (Det)" in reason) == (version == "10.3")
    assert library.live == []


def test_an_operator_set_that_is_too_new_is_named(tmp_path):
    tests = make_test_set(tmp_path / "tests")
    bundle = make_bundle(tmp_path / "b", tests, runtime="tensorrt", batches=(1,), opset=20)
    library, trt = device("8.5")
    status, found = measure(bundle, tests, tmp_path / "out", library, trt)
    assert status == 5
    assert "TensorRT 8.5.3.1 cannot read the graph (opset 20)" in found.rows[0].reason


def test_a_build_that_fails_repeats_what_tensorrt_said(tmp_path):
    _, trt = device("8.6")
    with pytest.raises(run.BuildError, match="fp16 is not enabled"):
        run.build_engine(trt, graph("fp16", 1), run.BuildSettings("fp32"))


def test_work_that_cannot_be_captured_fails_only_its_row(inputs, tmp_path):
    library, trt = device(uncapturable=True)
    status, found = measure(
        *inputs, tmp_path / "out", library, trt, "--quick", "--precision", "fp32"
    )
    assert status == 5
    assert [row.status for row in found.rows] == ["ok", "failed", "ok"]
    assert "cudaStreamEndCapture" in found.rows[1].reason
    assert library.live == []


def test_the_graph_row_replays_and_the_other_does_not(inputs, tmp_path):
    library, trt = device()
    words = ("--quick", "--precision", "fp32")
    _, found = measure(*inputs, tmp_path / "out", library, trt, *words)
    graph_row = found.rows[1]
    timed = sum(graph_row.samples.window_sizes) + graph_row.samples.warmup_runs
    checked = graph_row.parity.n + graph_row.accuracy.n  # batch 1: one launch an image
    assert library.cudaGraphLaunch.calls == timed + checked
    assert library.cudaStreamBeginCapture.calls == 1


def test_inputs_really_change_from_one_inference_to_the_next(inputs, tmp_path):
    """The timed path copies the slot's own images: its answer is the slot's, not the last one's."""
    bundle, _ = inputs
    library, trt = device()
    runtime = run.Runtime("tensorrt", trt, trt.__version__, run.Cuda(library))
    backend = run.TensorRTBackend(runtime, run.BuildSettings("fp32"), tmp_path, {})
    path = bundle / "model/fp32-b3.onnx"
    backend.build(path, 3, sha256(path), (1, 4, 4))
    images = np.load(bundle / "parity/inputs.npy")[:7]
    logits = np.load(bundle / "parity/logits.npy")[:7]
    backend.set_inputs(images)
    for slot in (0, 5, 6):
        backend.time_one(slot)
        wanted = logits[[(slot + k) % 7 for k in range(3)]]
        assert np.allclose(backend._output, wanted, atol=1e-4)
    backend.close()
    assert library.live == []


def test_rows_say_what_a_sample_includes(inputs, tmp_path, capsys):
    library, trt = device()
    _, found = measure(*inputs, tmp_path / "out", library, trt, "--quick", "--precision", "fp32")
    assert "copy to the GPU" in found.rows[0].samples.scope
    windows = named(events_of(capsys.readouterr().out), "window")
    assert {(w["batch"], w["cuda_graph"]) for w in windows} == {(1, False), (1, True), (3, False)}


def test_failures_of_cuda_are_named():
    library = FakeCudart()
    cuda = run.Cuda(library)
    with pytest.raises(run.CudaError, match="cudaFree: fake error 1"):
        cuda.call("cudaFree", 12345)
    with pytest.raises(run.CudaError, match="cudaEventElapsedTime: fake error 600"):
        cuda.elapsed_ns(cuda.make("cudaEventCreate"), cuda.make("cudaEventCreate"))


@pytest.mark.parametrize(("cuda", "said"), [(11, "11.6"), (12, "12.6"), (13, "13.6")])
def test_cuda_describes_itself_under_every_name_of_its_functions(cuda, said):
    library = FakeCudart(cuda=cuda)
    assert hasattr(library, "cudaGetDeviceProperties_v2") == (cuda == 12)
    found = run.Cuda(library)
    assert (found.version(), found.name(), found.compute_capability()) == (said, "Fake GPU", "8.7")
    assert found.bus_id() == "0000:01:00.0"
    assert found.free_bytes() == 8 << 30


def test_the_bundles_graphs_are_what_the_versions_need(inputs):
    bundle, _ = inputs
    model = onnx.load(bundle / "model/fp16-b1.onnx")
    assert {t.data_type for t in model.graph.initializer} >= {onnx.TensorProto.FLOAT16}
    assert {o.version for o in model.opset_import} == {17}


def test_energy_is_measured_through_the_same_engine_and_graph(inputs, tmp_path):
    monitor = tmp_path / "root/sys/class/hwmon/hwmon0"
    monitor.mkdir(parents=True)
    for name, text in (
        ("name", "ina3221"), ("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "300"),
    ):  # fmt: skip
        (monitor / name).write_text(text)
    rules = replace(PROTOCOL, energy_idle_s=0.1, energy_active_s=0.3)
    tests = inputs[1]
    bundle = make_bundle(
        tmp_path / "bundle", tests, runtime="tensorrt", batches=(1, 3), protocol=rules
    )
    library, trt = device()
    words = [str(bundle), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert run.main(words, root=str(tmp_path / "root"), trt=trt, cuda=run.Cuda(library)) == 0
    plain, replayed, sweep = read_measurement(tmp_path / "out").rows
    assert sweep.energy is None
    assert plain.energy.active_w == replayed.energy.active_w == pytest.approx(1.5)
    assert len(trt.builds) == 2
    assert library.cudaStreamBeginCapture.calls == 2
    assert library.live == []
