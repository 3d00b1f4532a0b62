"""One student from model to bundle: complete or absent, the same bytes twice, honest about gaps."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from smskd_export import graph_maker
from smskd_export import student_export as exporting
from smskd_export.archive import open_bundle
from smskd_export.bundle import verify_bundle
from smskd_export.cpu_session import CpuSession
from smskd_export.manifest import SCHEMA, as_json, bundle_id, read_manifest
from smskd_export.reference import session_logits
from smskd_export.report import ExportReport, read_report
from smskd_export.runner import RUNNER
from smskd_export.student_export import export_student
from smskd_export.targets import Calibration, load_target
from smskd_export.test_sets import hash_test_set
from torch import nn

from smskd.errors import ConfigError, DataError, ExportError, StoreError
from smskd.models import build_model

SHAPE, MEAN, STD = (3, 16, 16), (0.51, 0.49, 0.44), (0.27, 0.26, 0.28)
FEW = Calibration(n=24, reduce_range=True)
FIXED = ["calibration.json", "protocol.json", "run.py"]
PARITY = ["parity/classes.npy", "parity/inputs.npy", "parity/logits.npy"]


def pictures(n, seed):
    """Blobs of ten colours: something a network can learn in seconds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    colours = np.random.default_rng(0).integers(60, 200, (10, 3, 1, 1))
    noise = rng.normal(0, 20, (n, *SHAPE))
    return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels


def normalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(images) / 255 - mean) / std


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    net = build_model("resnet8_half", num_classes=10).train()
    images, labels = pictures(400, 1)
    x, y = normalised(images), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="module")
def tiny():
    """The quickest model to export, for tests that look at the directory."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))


def small(name="cpu", batches=(1, 3), **changes):
    """A shipped target that takes little time; one of 90 images may be lost."""
    target = load_target(name)
    precisions = tuple(replace(p, max_drop=5.0) for p in target.precisions)
    return replace(target, batches=batches, calibration=FEW, precisions=precisions, **changes)


def lenient(target):
    """The target with int8 that no gate stops: untrained networks have classes close together."""
    precisions = [
        replace(p, max_drop=100.0, min_agreement=min(p.min_agreement, 50.0))
        for p in target.precisions
    ]
    return replace(target, precisions=tuple(precisions))


def export(student, out_dir, target=None, **changes):
    test = pictures(90, 2)
    arguments = {
        "name": "resnet8",
        "dataset": "blobs",
        "image_shape": SHAPE,
        "num_classes": 10,
        "mean": MEAN,
        "std": STD,
        "train_images": pictures(60, 3)[0],
        "test_images": test[0],
        "test_labels": test[1],
        "target": target or small(),
        "out_dir": out_dir,
        "provenance": {"key": "abc", "seeds": [1, 2]},
    }
    return export_student(student, **{**arguments, **changes})


@pytest.fixture(scope="module")
def cpu(student, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("exports") / "deep" / "cpu"
    return out_dir, export(student, out_dir)


@pytest.fixture(scope="module")
def jetson(student, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("exports") / "jetson"
    return out_dir, export(student, out_dir, small("jetson-orin-nano", (1,)))


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Equal graphs are traced once: how torch traces is the subject of test_export_graph."""
    made, trace = {}, graph_maker.make_graph

    def remembered(model, *args, **options):
        weights = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        key = hashlib.sha256(weights).digest(), str(model), repr((args, options))
        if key not in made:
            made[key] = trace(model, *args, **options).SerializeToString(deterministic=True)
        return onnx.load_from_string(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_maker, "make_graph", remembered)
        yield made


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_bundle_holds_what_its_layout_says(cpu, jetson):
    for (out_dir, _), graphs in (
        (cpu, ["fp32-b1", "fp32-b3", "int8-b1", "int8-b3"]),
        (jetson, ["fp16-b1", "fp32-b1", "int8+fp16-b1", "int8+fp32-b1"]),
    ):
        models = [f"model/{name}.onnx" for name in graphs]
        assert names(out_dir / "bundle") == sorted([*FIXED, "bundle.json", *models, *PARITY])
        assert names(out_dir / "test_set") == ["images.npy", "labels.npy"]
        assert {p.name for p in out_dir.iterdir()} == {"bundle", "test_set", "report.json"}
        assert list(out_dir.parent.iterdir()) == [out_dir]


def test_report_and_manifest_say_what_happened(cpu, student):
    out_dir, report = cpu
    manifest = verify_bundle(out_dir / "bundle")
    assert read_report(out_dir) == report
    assert report.bundle_id == bundle_id(out_dir / "bundle")
    assert (manifest.schema, manifest.name, manifest.dataset) == (SCHEMA, "resnet8", "blobs")
    assert manifest.provenance == {"key": "abc", "seeds": [1, 2]}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.parameters == report.parameters == sum(p.numel() for p in student.parameters())
    assert manifest.macs > manifest.parameters
    assert report.machine.cores >= report.machine.usable_cores >= 1
    assert report.left_out == manifest.left_out == {}
    for graph in manifest.graphs:
        data = (out_dir / "bundle" / graph.path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (graph.sha256, graph.bytes)
        assert graph.input_shape == (graph.batch, *SHAPE)
        assert graph.opset == load_target("cpu").opset


def test_every_precision_was_checked_on_the_whole_test_set(cpu, jetson):
    for (_, report), target in ((cpu, "cpu"), (jetson, "jetson-orin-nano")):
        expected = [precision.name for precision in load_target(target).precisions]
        assert [check.precision for check in report.checks] == expected
        for check in report.checks:
            assert check.parity.passed
            assert check.parity.n == check.parity.change.n == 90
            assert check.parity.torch_top1 == report.torch_top1 > 60
            assert [s.batch for s in check.sweep] == list(report.target.batches[1:])
            assert all(s.parity.passed for s in check.sweep)
            assert (check.tensorrt is None) == (report.target.runtime == "onnxruntime")
        sizes = {check.precision: check.bytes for check in report.checks}
        assert sizes["fp32"] > 1.8 * sizes.get("fp16", 0)


def test_parity_files_check_any_runtime(cpu, jetson):
    for out_dir, report in (cpu, jetson):
        bundle = out_dir / "bundle"
        inputs, logits, classes = (
            np.load(bundle / "parity" / f"{n}.npy") for n in ("inputs", "logits", "classes")
        )
        images, labels = (np.load(out_dir / "test_set" / f"{n}.npy") for n in ("images", "labels"))
        assert (inputs.shape, inputs.dtype) == ((90, *SHAPE), np.float32)  # 256 at most
        assert np.array_equal(inputs, images.astype(np.float32) / np.float32(255))
        assert (logits.dtype, classes.dtype, labels.dtype) == (np.float32, np.int32, np.int64)
        assert np.array_equal(logits.argmax(1), classes)
        assert 100 * np.mean(classes == labels) == pytest.approx(report.torch_top1)
        got = session_logits(CpuSession(bundle / "model" / "fp32-b1.onnx"), images)
        np.testing.assert_allclose(got, logits, atol=1e-4)


def test_only_so_many_images_are_kept_for_parity(tiny, tmp_path):
    target = lenient(small(batches=(1,)))
    few = replace(target, protocol=replace(target.protocol, parity_images=7))
    export(tiny, tmp_path / "x", few)
    assert len(np.load(tmp_path / "x" / "bundle" / "parity" / "inputs.npy")) == 7
    assert len(np.load(tmp_path / "x" / "bundle" / "parity" / "classes.npy")) == 90


def test_protocol_is_what_the_runner_reads(jetson):
    out_dir, report = jetson
    spec = json.loads((out_dir / "bundle" / "protocol.json").read_text())
    target = report.target
    assert spec["protocol"] == asdict(target.protocol)
    assert spec["quick"] == asdict(target.protocol.shortened())
    assert spec["requires"] == json.loads(json.dumps(asdict(target.requires)))
    assert spec["target"] == {
        "name": target.name, "runtime": "tensorrt", "threads": 1, "affinity": [], "tf32": False,
        "workspace_mb": 256, "opset": 19,
    }  # fmt: skip
    assert [p["name"] for p in spec["precisions"]] == ["fp32", "fp16", "int8+fp32", "int8+fp16"]
    assert [p["quantised"] for p in spec["precisions"]] == [False, False, True, True]
    assert spec["test_set"] == {"sha256": hash_test_set(out_dir / "test_set"), "n": 90}
    assert (spec["torch_top1"], spec["num_classes"]) == (report.torch_top1, 10)
    assert (spec["batches"], spec["image_shape"]) == ([1], list(SHAPE))
    for graph in spec["graphs"]:
        path = out_dir / "bundle" / graph["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == graph["sha256"]


def test_calibration_names_training_images(cpu):
    out_dir, _ = cpu
    record = json.loads((out_dir / "bundle" / "calibration.json").read_text())
    train = pictures(60, 3)[0]
    assert (record["split"], record["n"], record["of"], record["seed"]) == ("train", 24, 60, 0)
    assert (record["method"], record["quantiser"]) == ("minmax", "onnxruntime")
    pixels = train[record["indices"]].tobytes()
    assert hashlib.sha256(pixels).hexdigest() == record["pixels_sha256"]
    assert record["scales_sha256"].keys() == {"model/int8-b1.onnx", "model/int8-b3.onnx"}
    assert len(set(record["scales_sha256"].values())) == 1  # the same at every batch size


def test_runner_is_the_projects_own_and_accepts_the_bundle(cpu):
    out_dir, _ = cpu
    assert (out_dir / "bundle" / "run.py").read_bytes() == RUNNER.read_bytes()
    command = [sys.executable, "run.py", ".", "--probe"]
    done = subprocess.run(command, cwd=out_dir / "bundle", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "ok"


def test_second_export_gives_the_same_bytes(cpu, student, tmp_path, traced_once):
    traced_once.clear()
    again = export(student, tmp_path / "again")
    assert again.bundle_id == cpu[1].bundle_id
    for name in names(cpu[0] / "bundle"):
        assert (tmp_path / "again" / "bundle" / name).read_bytes() == (
            cpu[0] / "bundle" / name
        ).read_bytes()


def test_another_student_has_another_id(cpu, student, tmp_path):
    other = export(student, tmp_path / "x", provenance={"key": "abd"})
    assert other.bundle_id != cpu[1].bundle_id


def test_test_sets_are_stored_once(tiny, tmp_path):
    shared, target = tmp_path / "test_sets", small(batches=(1,))
    for name in ("a", "b", "c"):
        export(tiny, tmp_path / name, lenient(target), test_sets=shared)
    (kept,) = shared.iterdir()
    assert kept.name == hash_test_set(kept)
    for name in ("images.npy", "labels.npy"):
        places = [kept, *(tmp_path / n / "test_set" for n in "abc")]
        assert len({(place / name).stat().st_ino for place in places}) == 1
        assert [p.name for p in shared.iterdir()] == [kept.name]
    assert names(tmp_path / "b" / "test_set") == ["images.npy", "labels.npy"]


def test_damaged_shared_test_set_is_refused(tiny, tmp_path):
    shared, target = tmp_path / "test_sets", lenient(small(batches=(1,)))
    export(tiny, tmp_path / "a", target, test_sets=shared)
    (kept,) = shared.iterdir()
    (kept / "labels.npy").write_bytes(b"")
    with pytest.raises(StoreError, match="was changed"):
        export(tiny, tmp_path / "b", target, test_sets=shared)
    assert not (tmp_path / "b").exists()


def test_file_system_without_links_gets_copies(tiny, tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    target = lenient(small(batches=(1,)))
    export(tiny, tmp_path / "a", target, test_sets=tmp_path / "test_sets")
    assert open_bundle(tmp_path / "a", tmp_path).test_set is not None


def test_torch_tensors_are_taken_and_the_model_is_untouched(tiny, tmp_path):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    images, labels = map(torch.from_numpy, pictures(90, 2))
    changes = {"test_images": images, "test_labels": labels, "train_images": images}
    report = export(tiny, tmp_path / "x", lenient(small(batches=(1,))), **changes)
    assert report.checks[0].parity.n == 90
    assert tiny.training
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def strict(target, name, **limits):
    """The target with other limits for one precision."""
    precisions = (replace(p, **limits) if p.name == name else p for p in target.precisions)
    return replace(target, precisions=tuple(precisions))


def test_failed_fp32_leaves_nothing(tiny, tmp_path):
    target = strict(small(), "fp32", max_abs_diff=1e-12)
    with pytest.raises(ExportError, match="does not repeat the PyTorch model: a logit differs"):
        export(tiny, tmp_path / "x", target)
    assert list(tmp_path.iterdir()) == []


def test_precision_that_fails_its_gate_is_left_out_with_the_reason(student, tmp_path):
    report = export(student, tmp_path / "x", strict(small(), "int8", max_abs_diff=1e-6))
    manifest = verify_bundle(tmp_path / "x" / "bundle")
    assert manifest.left_out == report.left_out
    assert report.left_out.keys() == {"int8"}
    assert "a logit differs by" in report.left_out["int8"]
    assert {graph.precision for graph in manifest.graphs} == {"fp32"}
    assert [(c.precision, c.parity.passed) for c in report.checks] == [
        ("fp32", True),
        ("int8", False),
    ]
    files = names(tmp_path / "x" / "bundle")
    assert not [name for name in files if "int8" in name]
    assert "calibration.json" not in files
    spec = json.loads((tmp_path / "x" / "bundle" / "protocol.json").read_text())
    assert [p["name"] for p in spec["precisions"]] == ["fp32"]


def test_precision_that_fails_at_another_batch_size_is_left_out_as_a_whole(
    student, tmp_path, monkeypatch
):
    def worse_at_three(session, images):
        logits = session_logits(session, images)
        return -logits if session.batch == 3 and "int8" in session.path.name else logits

    class Named(CpuSession):
        def __init__(self, path, **options):
            super().__init__(path, **options)
            self.path = path

    monkeypatch.setattr(exporting, "CpuSession", Named)
    monkeypatch.setattr(exporting, "session_logits", worse_at_three)
    report = export(student, tmp_path / "x")
    assert "same class for" in report.left_out["int8"]
    assert report.checks[1].parity.passed
    assert [s.parity.passed for s in report.checks[1].sweep] == [False]
    assert not [name for name in names(tmp_path / "x" / "bundle") if "int8" in name]


def test_precision_that_cannot_be_made_is_left_out(tmp_path):
    class Float32Only(nn.Module):
        """Cannot compute in float16: one of its matrices stays what it was."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(768, 10)
            self.fixed = [torch.eye(10)]

        def forward(self, x):
            return self.fc(x.flatten(1)) @ self.fixed[0]

    torch.manual_seed(0)
    target = lenient(small("jetson", (1,)))
    report = export(Float32Only(), tmp_path / "x", target)
    assert "not valid ONNX" in report.left_out["fp16"]
    assert [check.precision for check in report.checks] == ["fp32", "int8+fp32"]


@pytest.mark.parametrize(
    ("name", "arch", "as_written"),
    [
        ("cpu", "x86_64", [False, False]),
        ("raspberry-pi-5", "x86_64", [False, True]),
        ("raspberry-pi-5", "aarch64", [False, False]),
    ],
)
def test_graphs_for_other_processors_are_checked_as_written(
    tiny, tmp_path, monkeypatch, name, arch, as_written
):
    seen = []

    class Seen(CpuSession):
        def __init__(self, path, **options):
            super().__init__(path, **options)
            seen.append(options["as_written"])

    monkeypatch.setattr(exporting, "CpuSession", Seen)
    monkeypatch.setattr(exporting.platform, "machine", lambda: arch)
    export(tiny, tmp_path / "x", lenient(small(name, (1,))))
    assert seen == as_written


def test_graph_that_tensorrt_refuses_is_left_out(student, tmp_path, monkeypatch):
    def refuses(path, precision, target):
        found = checked(path, precision, target)
        if precision.graph == "fp16":
            found = replace(
                found, module="trt", version="9", parsed=True, built=False, message="no"
            )
        return found

    checked = exporting.check_with_tensorrt
    monkeypatch.setattr(exporting, "check_with_tensorrt", refuses)
    report = export(student, tmp_path / "x", small("jetson", (1,)))
    assert report.left_out == {"fp16": "trt 9 refuses the graph: no"}


def test_crash_in_the_middle_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        inside = [p.name for p in tmp_path.iterdir()]
        assert len(inside) == 1
        assert inside[0].startswith(".x.partial-")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "model_cost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "x", lenient(small(batches=(1,))))
    assert list(tmp_path.iterdir()) == []
    assert read_report(tmp_path / "x") is None


def test_existing_export_is_kept(tiny, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep")
    with pytest.raises(StoreError, match="already exists"):
        export(tiny, tmp_path / "x")
    assert names(tmp_path) == ["x/mine"]


def test_place_that_is_no_directory_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        export(tiny, tmp_path / "file" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place_is_refused(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot write"):
        export(tiny, tmp_path / "locked" / "x")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 20}, ExportError, "10 logits, the dataset has 20 classes"),
        ({"num_classes": 5}, DataError, "labels run from 0 to 9, expected 0 to 4"),
        ({"image_shape": (3, 8, 8)}, DataError, "test images are uint8"),
        ({"test_images": np.zeros((90, *SHAPE), np.float32)}, DataError, "test images are float32"),
        (
            {"train_images": np.zeros((9, 1, 4, 4), np.uint8)},
            DataError,
            "training images are uint8",
        ),
        ({"train_images": np.zeros((0, *SHAPE), np.uint8)}, DataError, "training images are"),
        ({"test_labels": np.zeros(3, np.int64)}, DataError, "90 test images need as many labels"),
        ({"provenance": {"model": object()}}, ConfigError, "provenance is not JSON"),
        ({"provenance": {"loss": float("nan")}}, ConfigError, "provenance is not JSON"),
        ({"mean": (0.5,)}, ExportError, "mean has 1 values"),
    ],
)
def test_wrong_arguments_are_refused(tiny, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        export(tiny, tmp_path / "x", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy(jetson, tmp_path):
    return Path(shutil.copytree(jetson[0] / "bundle", tmp_path / "copy"))


def edit(folder):
    with (folder / "model" / "fp32-b1.onnx").open("ab") as file:
        file.write(b"x")


def remove(folder):
    (folder / "parity" / "logits.npy").unlink()


def add(folder):
    (folder / "model" / "extra.onnx").write_text("")


def add_strange(folder):
    (folder / "a\x1b[31m").write_text("")


@pytest.mark.parametrize("change", [edit, remove, add, add_strange])
def test_changed_bundle_is_noticed(copy, change):
    change(copy)
    with pytest.raises(StoreError, match="missing, changed or unknown files: ") as caught:
        verify_bundle(copy)
    assert caught.value.message.isprintable()


def test_links_in_a_bundle_are_refused(copy, tmp_path):
    (copy / "run.py").rename(tmp_path / "run.py")
    (copy / "run.py").symlink_to(tmp_path / "run.py")
    with pytest.raises(StoreError, match=r"'run\.py' is no plain file"):
        verify_bundle(copy)


def reseal(folder, **changes):
    """Write the manifest anew, as somebody who wants to deceive would."""
    manifest = replace(read_manifest(folder), **changes)
    (folder / "bundle.json").write_text(as_json(manifest))


def test_manifest_must_list_what_a_bundle_needs(copy):
    files = read_manifest(copy).files
    (copy / "run.py").unlink()
    reseal(copy, files={name: digest for name, digest in files.items() if name != "run.py"})
    with pytest.raises(StoreError, match=r"lacks run\.py"):
        verify_bundle(copy)


def test_manifest_must_speak_of_its_own_graphs(copy):
    graphs = read_manifest(copy).graphs
    reseal(copy, graphs=(replace(graphs[0], sha256="0" * 64), *graphs[1:]))
    with pytest.raises(StoreError, match="speaks of other graphs"):
        verify_bundle(copy)
    reseal(copy, graphs=())
    with pytest.raises(StoreError, match="speaks of other graphs"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"schema": 2, "name": "x"}', "is damaged: "),
        ('{"schema": 1}', "has schema 1, this program reads 2"),
        ('{"schema": 99}', "has schema 99, this program reads 2"),
    ],
)
def test_damaged_records_are_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        read_report(tmp_path)
    with pytest.raises(StoreError, match=message):
        verify_bundle(tmp_path)


def test_no_export_is_none(tmp_path):
    assert read_report(tmp_path / "none") is None
    with pytest.raises(StoreError, match="holds no bundle"):
        verify_bundle(tmp_path)


def test_every_field_of_the_report_is_explained():
    for name in ExportReport.__dataclass_fields__:
        assert f"{name}: " in ExportReport.__doc__
