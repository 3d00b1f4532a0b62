"""Graphs and builder code meet a real TensorRT, where one is installed; RTX builds without a GPU."""

from importlib import import_module

import pytest
from fake_tensorrt import SURFACES
from runner_bundle import PRECISIONS, graph
from smskd_export import tensorrt_check
from smskd_export.runner import run
from smskd_export.targets import load_target
from smskd_export.tensorrt_check import RTX, check_with_tensorrt, find_tensorrt

from smskd.errors import ExportError

JETSON = load_target("jetson")


@pytest.fixture
def real():
    name, module = find_tensorrt()
    if module is None:
        pytest.skip(f"no TensorRT here: {tensorrt_check.INSTALL}")
    return name, module


def check(tmp_path, precision="fp32", **options):
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph(PRECISIONS[precision].graph, 2, **options))
    return check_with_tensorrt(path, PRECISIONS[precision], JETSON)


@pytest.mark.parametrize("opset", [17, 19, 20])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_every_precision_is_read_and_built(real, tmp_path, precision, opset):
    found = check(tmp_path, precision, opset=opset)
    assert (found.parsed, found.built) == (True, True), found.message
    assert found.engine_bytes > 1000
    assert found.seconds > 0
    assert found.module == real[0]
    assert found.version == real[1].__version__
    assert "tf32_off" in found.message
    assert ("strongly_typed" in found.message) == (precision != "fp32")


def test_an_operator_it_does_not_know_is_named(real, tmp_path):
    found = check(tmp_path, extra="Det")
    assert (found.parsed, found.built, found.engine_bytes) == (False, False, 0)
    assert "'/odd' (Det)" in found.message


def test_what_is_no_graph_is_refused_not_crashed(real, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"no graph")
    found = check_with_tensorrt(path, PRECISIONS["fp32"], JETSON)
    assert found.parsed is False
    assert "cannot read the graph" in found.message


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT:DeprecationWarning")
def test_the_timing_cache_is_made_and_a_broken_one_does_no_harm(real, tmp_path):
    _, module = real
    cache = tmp_path / "a" / "timing.cache"
    settings = run.BuildSettings("fp32", timing_cache=str(cache))
    assert "timing_cache_new" in run.build_engine(module, graph("fp32", 1), settings)[1]
    assert cache.stat().st_size > 0
    cache.write_bytes(b"garbage")
    engine, branches, _ = run.build_engine(module, graph("fp32", 1), settings)
    assert engine
    assert {"timing_cache_read", "timing_cache_new"} & set(branches)


def test_the_logger_keeps_what_tensorrt_says(real):
    _, module = real
    logger = run.make_logger(module)
    assert module.Runtime(logger).deserialize_cuda_engine(b"no engine") is None
    assert logger.messages


def test_the_recorded_surface_is_the_real_one():
    try:
        module = import_module(RTX)
    except ImportError:
        pytest.skip(f"no TensorRT for RTX here: {tensorrt_check.INSTALL}")
    surface = SURFACES["rtx-1.7"]
    if not module.__version__.startswith("1.7."):
        pytest.skip(f"recorded from 1.7, here is {module.__version__}")
    for name, names in surface["classes"].items():
        assert sorted(n for n in dir(getattr(module, name)) if not n.startswith("_")) == names
    for name, members in surface["enums"].items():
        assert list(getattr(module, name).__members__) == members


def test_without_a_tensorrt_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_check, "find_tensorrt", lambda: ("", None))
    found = check(tmp_path)
    assert (found.module, found.parsed, found.built) == ("", None, None)
    assert "pip install" in found.message


def test_a_tensorrt_that_cannot_build_here_is_passed_over(monkeypatch):
    class Broken:
        __version__ = "10.3"

        def __getattr__(self, name):
            raise ImportError("libnvinfer is not there")

    def importing(name):
        if name == RTX:
            raise ImportError("not installed")
        return Broken()

    monkeypatch.setattr(tensorrt_check, "import_module", importing)
    assert find_tensorrt() == ("", None)


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(ExportError, match="cannot read"):
        check_with_tensorrt(tmp_path / "none.onnx", PRECISIONS["fp32"], JETSON)
