"""A bundle with the stand-in runner, and a test set, for tests of how they travel."""

from pathlib import Path

import numpy as np
from smskd_export.bundle import hash_file, seal_bundle
from smskd_export.manifest import (
    PROTOCOL,
    RUNNER,
    SCHEMA,
    GraphInfo,
    Manifest,
    TestSet,
)
from smskd_export.targets import load_target
from smskd_export.test_sets import hash_test_set

STANDIN = Path(__file__).with_name("standin_runner.py")
GRAPH = "model/fp32-b1.onnx"


def make_test_set(folder, n=20, seed=0):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    np.save(folder / "images.npy", draw.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(n) % 10)
    return folder


def make_bundle(folder, test_set, runner=STANDIN, filling=b"no real graph"):
    (folder / "model").mkdir(parents=True)
    (folder / GRAPH).write_bytes(filling)
    (folder / PROTOCOL).write_text("{}\n")
    (folder / RUNNER).write_bytes(runner.read_bytes())
    for name in ("inputs", "logits", "classes"):
        (folder / "parity").mkdir(exist_ok=True)
        (folder / "parity" / f"{name}.npy").write_bytes(b"no array")
    graph = GraphInfo(
        "fp32", 1, GRAPH, hash_file(folder / GRAPH), 1, 20, 10, (1, 1, 4, 4), (1, 10), {}
    )
    manifest = Manifest(
        schema=SCHEMA, name="stand-in", dataset="none", image_shape=(1, 4, 4), num_classes=10,
        mean=(0.5,), std=(0.5,), parameters=1, macs=1, torch_top1=10.0, target=load_target("cpu"),
        graphs=(graph,), left_out={}, test_set=TestSet(hash_test_set(test_set), 20), versions={},
        provenance={}, files={},
    )  # fmt: skip
    seal_bundle(folder, manifest)
    return folder
