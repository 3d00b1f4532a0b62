"""The device benchmarks: real small graphs, and a trtexec that writes what the real one documents."""

import dataclasses
import hashlib
import json
import stat
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from smskd_export.judging import judge, write_judged

from benchmarks import trtexec
from benchmarks.edge import both_clocks, operator_shares
from benchmarks.edge_page import render
from benchmarks.report import filled
from tests.device_results import make_manifest, make_measurement, make_probe, make_row, true_classes

ROOT = Path(__file__).parents[2]

TRTEXEC = """#!/usr/bin/env python3
import json, sys
options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if open(options["--loadEngine"]).read() != "engine":
    print("[E] the engine does not load", file=sys.stderr)
    sys.exit(1)
trace = [{"startComputeMs": i, "endComputeMs": i + 0.5, "computeMs": ms, "latencyMs": ms + 1}
         for i, ms in enumerate([0.1, 0.102, 9.0])]
json.dump(trace, open(options["--exportTimes"], "w"))
open(options["--loadEngine"] + ".args", "w").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "trtexec"
    path.write_text(TRTEXEC)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def engine(tmp_path, content="engine"):
    path = tmp_path / "cache" / "engines" / "a" / "engine"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("version", "graph", "expected"),
    [
        (8, False, ["--noDataTransfers", "--useSpinWait"]),
        (10, True, ["--noDataTransfers", "--useSpinWait", "--useCudaGraph"]),
        (11, False, ["--noCudaGraph"]),
        (11, True, []),
    ],
)
def test_every_release_is_told_to_do_the_same_work(version, graph, expected):
    assert trtexec.switches(version, graph) == expected


def test_each_row_with_an_engine_is_compared(program, tmp_path):
    path = engine(tmp_path)
    folder, files = tmp_path / "m" / "local-1", {}
    folder.mkdir(parents=True)
    gpu = np.full(1000, 100_000)
    row = make_row(folder, files, np.full(1000, 200_000), gpu_ns=gpu, enqueue_ns=gpu // 10)
    built = dataclasses.replace(
        row.build, engine_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    plain = make_row(folder, files, np.full(1000, 200_000), batch=8)
    probe = make_probe(runtime="tensorrt", runtime_version="10.3.0")
    rows = [dataclasses.replace(row, build=built), plain]
    found = make_measurement(folder, rows, files, before=probe, after=probe)
    judged = judge(
        make_manifest(), found, folder, "local", true_classes(), true_classes().astype(np.int32)
    )
    write_judged(folder, judged)
    student = SimpleNamespace(name="s", measurements=tmp_path / "m", judged=judged)
    engines = trtexec.engines_by_hash(tmp_path / "cache")
    (comparison,) = trtexec.compare(student, program, engines)
    assert (comparison.row, comparison.ours_ms, comparison.theirs_ms) == ("fp32-b1", 0.1, 0.102)
    assert comparison.ratio == pytest.approx(0.1 / 0.102)
    assert "--noDataTransfers --useSpinWait" in path.with_name("engine.args").read_text()


def test_trtexec_that_fails_or_is_not_there_is_told(program, tmp_path):
    row = SimpleNamespace(cuda_graph=False)
    with pytest.raises(click.ClickException, match=r"\[E\] the engine does not load"):
        trtexec.run_trtexec(program, engine(tmp_path, "other"), row, 10)
    with pytest.raises(click.ClickException, match="name it with --trtexec"):
        trtexec.find_trtexec(tmp_path / "none")


@pytest.fixture
def graph(tmp_path):
    node = helper.make_node("Conv", ["images", "w"], ["logits"])
    weights = helper.make_tensor("w", TensorProto.FLOAT, (4, 3, 8, 8), np.ones(768).tolist())
    model = helper.make_model(
        helper.make_graph(
            [node], "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 8, 8))],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 4, 1, 1))],
            [weights],
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    path = tmp_path / "g-b1.onnx"
    onnx.save(model, path)
    return path


def test_both_clocks_time_one_session(graph, monkeypatch):
    monkeypatch.setattr("benchmarks.edge.ROUNDS", 3)
    monkeypatch.setattr("benchmarks.edge.BLOCK_S", 0.001)
    clocks = both_clocks(graph, 1)
    assert clocks.ours_ms > 0
    assert clocks.low <= clocks.ratio <= clocks.high


def test_operators_share_an_inference(graph, monkeypatch):
    monkeypatch.setattr("benchmarks.edge.PROFILED_RUNS", 3)
    shares = operator_shares(graph, 1)
    assert sum(shares.values()) == pytest.approx(1)
    assert "Conv" in shares


def test_the_page_shows_the_record():
    page = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
    record = (ROOT / "benchmarks" / "results" / "edge-cpu.json").read_text(encoding="utf-8")
    assert page == filled(page, render(json.loads(record)))
