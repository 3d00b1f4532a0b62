"""Measurements for tests: a manifest and what a runner would have left, with samples of one's choice."""

import dataclasses
import hashlib
import json

import numpy as np
from smskd_export.manifest import GraphInfo, Manifest, TestSet
from smskd_export.measurement import (
    Build,
    DeviceAccuracy,
    DeviceParity,
    DeviceRow,
    Energy,
    Measurement,
    Probe,
    Samples,
)
from smskd_export.targets import load_target

IMAGES, CLASSES = 200, 10
KEY = "k" * 64


def make_manifest(target="cpu"):
    profile = load_target(target)
    graphs = [
        GraphInfo(p.name, b, f"model/{p.name}-b{b}.onnx", "0" * 64, 1_500_000, profile.opset, 8,
                  (b, 3, 32, 32), (b, CLASSES), {"Conv": 3})
        for p in profile.precisions for b in profile.batches
    ]  # fmt: skip
    return Manifest(
        schema=2, name="a>b/kd/s0", dataset="digits", image_shape=(3, 32, 32), num_classes=CLASSES,
        mean=(0.5,) * 3, std=(0.2,) * 3, parameters=1000, macs=5000, torch_top1=90.0, target=profile,
        graphs=tuple(graphs), left_out={}, test_set=TestSet("1" * 64, IMAGES), versions={},
        provenance={"key": KEY}, files={},
    )  # fmt: skip


def make_probe(**changes):
    probe = Probe(
        utc="2026-01-01T00:00:00+00:00", arch="x86_64", board="", cpu="A CPU", cores=2, os="Linux",
        kernel="6", l4t="", python="3.11", numpy="2", runtime="onnxruntime", runtime_version="1.31",
        cuda="", gpu="", compute_capability="", memory_total_mb=1, memory_free_mb=1,
        gpu_memory_free_mb=None, disk_free_mb=1, power_mode="", power_modes=(), clocks_locked=None,
        clocks_khz={"gpu": 1000}, temperatures_c={"cpu": 40.0}, throttle_counts={"cpu0": 3},
        load_1min=0.1, gpu_processes=(), emulated=False,
    )  # fmt: skip
    return dataclasses.replace(probe, **changes)


def make_row(folder, files, host_ns, precision="fp32", batch=1, *, windows=5, right=180, gpu_ns=None,
             enqueue_ns=None, graph=False, energy=False, status="ok", timer=40):  # fmt: skip
    """A row whose samples lie in ``folder``; ``right`` of the images are classified rightly."""
    row_id = f"{precision}-b{batch}" + ("-graph" if graph else "")

    def save(kind, array):
        name = f"{row_id}-{kind}.npy"
        np.save(folder / name, array)
        files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        return name

    accuracy = samples = None
    if status == "ok":
        host = np.asarray(host_ns, dtype=np.int64)
        sizes = tuple(len(part) for part in np.array_split(host, windows))
        samples = Samples(
            save("host_ns", host),
            save("gpu_ns", np.asarray(gpu_ns, dtype=np.int64)) if gpu_ns is not None else None,
            save("enqueue_ns", np.asarray(enqueue_ns, dtype=np.int64)) if enqueue_ns is not None else None,
            sizes, timer, 200, 2.0, "one inference",
        )  # fmt: skip
        if batch == 1:
            classes = true_classes().copy()
            classes[right:] = (classes[right:] + 1) % CLASSES
            name = save("classes", classes.astype(np.int32))
            accuracy = DeviceAccuracy(IMAGES, 100 * right / IMAGES, 99.0, 95.0, name)
    return DeviceRow(
        id=row_id, precision=precision, batch=batch,
        scenario="single_stream" if batch == 1 else "sweep", cuda_graph=graph, status=status,
        reason="" if status == "ok" else "agreement 80 % (limit 90 %)", graph_sha256="0" * 64,
        build=Build(0.0, False, 1, 2, "", 1_500_000, None, None),
        parity=DeviceParity(16, 1e-6, 1e-7, 1.0, 100.0), accuracy=accuracy, samples=samples,
        energy=Energy("rapl", ("package",), 10.0, 100, 5.0, 9.0, 1000, 2.5, 1.5, 10, "p") if energy else None,
    )  # fmt: skip


def true_classes():
    return np.arange(IMAGES, dtype=np.int64) % CLASSES


def make_measurement(folder, rows, files, *, before=None, after=None, **changes):
    """A finished measurement, written to ``folder``."""
    found = Measurement(
        schema=1, bundle_id="2" * 64, runner_sha256="3" * 64, protocol="cpu-v1", threads=1, affinity=(),
        started_utc="2026-01-01T00:00:00+00:00", ended_utc="2026-01-01T00:01:00+00:00", allowed=(),
        before=before or make_probe(), after=after or make_probe(), rows=tuple(rows), files=files,
    )  # fmt: skip
    found = dataclasses.replace(found, **changes)
    (folder / "result.json").write_text(json.dumps(dataclasses.asdict(found)))
    return found
