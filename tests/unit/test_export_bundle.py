"""One student from model to bundle: complete or absent, readable, and honest about what it lacks."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from smskd_export import bundle
from smskd_export.bundle import export_student
from smskd_export.cpu_session import CpuSession
from smskd_export.report import SCHEMA, read_report, verify_bundle
from smskd_export.targets import ParityThresholds, load_target

from smskd.errors import ConfigError, DataError, ExportError, StoreError
from smskd.models import build_model

SHAPE, MEAN, STD = (3, 32, 32), (0.51, 0.49, 0.44), (0.27, 0.26, 0.28)
FILES = ["parity/inputs.npy", "parity/logits.npy", "student.onnx"]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    net = build_model("resnet8", num_classes=10)
    with torch.no_grad():
        net.train()(torch.randn(32, *SHAPE))
    return net


@pytest.fixture(scope="module")
def test_set():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (80, *SHAPE), dtype=np.uint8), rng.integers(0, 10, 80)


@pytest.fixture(scope="module")
def tiny():
    """The quickest model to export, for tests that look at the directory."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))


def export(student, test_set, out_dir, target="cpu", **changes):
    arguments = {
        "name": "resnet8",
        "image_shape": SHAPE,
        "num_classes": 10,
        "mean": MEAN,
        "std": STD,
        "test_images": test_set[0],
        "test_labels": test_set[1],
        "target": load_target(target) if isinstance(target, str) else target,
        "out_dir": out_dir,
        "provenance": {"stage_run": "abc", "seeds": [1, 2]},
        "quick": True,
    }
    return export_student(student, **{**arguments, **changes})


@pytest.fixture(scope="module")
def cpu_bundle(student, test_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("bundles") / "deep" / "cpu"
    return out_dir, export(student, test_set, out_dir)


@pytest.fixture(scope="module")
def jetson_bundle(student, test_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("bundles") / "jetson"
    return out_dir, export(student, test_set, out_dir, "jetson", quick=False)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_report_on_disk_is_the_report_returned(cpu_bundle, jetson_bundle):
    for out_dir, report in (cpu_bundle, jetson_bundle):
        assert read_report(out_dir) == report == verify_bundle(out_dir)
        assert list(out_dir.parent.iterdir()) == [out_dir]


def test_cpu_bundle_is_complete(cpu_bundle):
    out_dir, report = cpu_bundle
    assert names(out_dir) == sorted([*FILES, "latency_ns.npy", "report.json"])
    assert (report.schema, report.name, report.num_classes) == (SCHEMA, "resnet8", 10)
    assert report.graph.opset == load_target("cpu").opset
    assert report.provenance == {"stage_run": "abc", "seeds": [1, 2]}
    assert report.versions["torch"] == torch.__version__
    assert report.machine.cores >= report.machine.usable_cores >= 1
    assert report.machine.cpu
    assert report.parameters == sum(p.numel() for p in build_model("resnet8", 10).parameters())
    assert report.macs > report.parameters


def test_latency_comes_with_its_evidence(cpu_bundle):
    out_dir, report = cpu_bundle
    raw = np.load(out_dir / "latency_ns.npy", allow_pickle=False)
    latency = report.latency
    assert report.not_measured == ""
    assert (latency.batch, latency.threads) == (1, 1)
    assert latency.summary.n == raw.size >= latency.protocol.min_samples
    assert latency.summary.min_ns == raw.min() > 0
    assert latency.summary.max_ns == raw.max()
    assert latency.first_ns > 0
    assert latency.load_ns > 0


def test_quick_is_marked(cpu_bundle, jetson_bundle):
    assert cpu_bundle[1].quick
    assert cpu_bundle[1].flags[0].code == "quick"
    assert not jetson_bundle[1].quick


def test_parity_files_check_any_runtime(cpu_bundle, jetson_bundle):
    for out_dir, _ in (cpu_bundle, jetson_bundle):
        inputs, logits = (np.load(out_dir / "parity" / f"{n}.npy") for n in ("inputs", "logits"))
        assert (inputs.shape, inputs.dtype) == ((16, *SHAPE), np.float32)
        assert inputs.min() >= 0
        assert inputs.max() <= 1
        session = CpuSession(out_dir / "student.onnx")
        got = np.concatenate([session.run(image[None]) for image in inputs])
        np.testing.assert_allclose(got, logits, atol=1e-4)


def test_jetson_latency_is_not_measured_and_says_why(jetson_bundle):
    out_dir, report = jetson_bundle
    assert names(out_dir) == sorted([*FILES, "report.json"])
    assert report.graph.opset == 17
    assert report.graph.input_shape == (1, *SHAPE)
    assert report.parity.passed
    assert report.parity.n == 80
    assert report.latency is None
    assert "tensorrt on its own device" in report.not_measured


def test_torch_tensors_are_taken_and_the_model_is_untouched(tiny, test_set, tmp_path):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    tensors = tuple(map(torch.from_numpy, test_set))
    assert export(tiny, tensors, tmp_path / "x", "jetson").parity.n == 80
    assert tiny.training
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_failed_parity_leaves_nothing(tiny, test_set, tmp_path):
    strict = replace(load_target("jetson"), parity=ParityThresholds(1e-12, 100))
    with pytest.raises(ExportError, match="does not repeat the PyTorch model"):
        export(tiny, test_set, tmp_path / "x", strict)
    assert list(tmp_path.iterdir()) == []


def test_crash_in_the_middle_leaves_nothing(tiny, test_set, tmp_path, monkeypatch):
    def interrupted(*_):
        inside = [p.name for p in tmp_path.iterdir()]
        assert len(inside) == 1
        assert inside[0].startswith(".x.partial-")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "model_cost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tiny, test_set, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert read_report(tmp_path / "x") is None


def test_existing_bundle_is_kept(tiny, test_set, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep")
    with pytest.raises(StoreError, match="already exists"):
        export(tiny, test_set, tmp_path / "x")
    assert names(tmp_path) == ["x/mine"]


def test_place_that_is_no_directory_is_refused(tiny, test_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        export(tiny, test_set, tmp_path / "file" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place_is_refused(tiny, test_set, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot write"):
        export(tiny, test_set, tmp_path / "locked" / "x")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 20}, ExportError, "10 logits, the dataset has 20 classes"),
        ({"num_classes": 5}, DataError, "labels run from 0 to 9, expected 0 to 4"),
        ({"image_shape": (3, 16, 16)}, DataError, "test images have shape"),
        ({"test_labels": np.zeros(3, np.int64)}, DataError, "as many labels"),
        ({"provenance": {"model": object()}}, ConfigError, "provenance is not JSON"),
        ({"provenance": {"loss": float("nan")}}, ConfigError, "provenance is not JSON"),
    ],
)
def test_wrong_arguments_are_refused(tiny, test_set, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        export(tiny, test_set, tmp_path / "x", "jetson", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_changed_bundle_is_noticed(jetson_bundle, tmp_path, change):
    folder = Path(shutil.copytree(jetson_bundle[0], tmp_path / "copy"))
    if change == "edit":
        with (folder / "student.onnx").open("ab") as file:
            file.write(b"x")
    elif change == "remove":
        (folder / "student.onnx").unlink()
    else:
        (folder / "extra.txt").write_text("")
    with pytest.raises(StoreError, match=r"missing, changed or unknown files: (student|extra)"):
        verify_bundle(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema": 1, "name": "x"}', "is damaged: "),
        ('{"schema": 99}', "has schema 99, this program reads 1"),
    ],
)
def test_damaged_report_is_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        read_report(tmp_path)


def test_no_bundle_is_none(tmp_path):
    assert read_report(tmp_path / "none") is None
    with pytest.raises(StoreError, match="holds no export"):
        verify_bundle(tmp_path)
