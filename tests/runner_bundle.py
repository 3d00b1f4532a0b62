"""A small bundle for the device runner, made with onnx alone, and what one run of it gave."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from smskd_export.manifest import TestSet, as_json
from smskd_export.runner import RUNNER
from smskd_export.targets import Precision, Protocol

SHAPE, CLASSES, HIDDEN = (1, 4, 4), 10, 32
FEATURES = 16
PROTOCOL = Protocol(
    name="test-v1", warmup_s=0.01, warmup_runs=5, min_duration_s=0.02, min_samples=30, windows=3,
    cooldown_s=0.0, sweep_duration_s=0.02, settle_s=0.0, start_below_c=0.0, abort_above_c=0.0,
    cuda_graph=True, energy_idle_s=0.0, energy_active_s=0.0, parity_images=14, distinct_inputs=7,
)  # fmt: skip
PRECISIONS = {
    "fp32": Precision("fp32", "fp32", 99.0, max_abs_diff=1e-3, max_drop=0.5),
    "fp16": Precision("fp16", "fp16", 90.0, "fp16", max_abs_diff=0.1, max_drop=5.0),
    "int8+fp32": Precision("int8+fp32", "int8_signed", 50.0, weak_fp16=True, max_drop=60.0),
}
REQUIRES = {
    "arch": [], "python": "3.8", "runtime_min": "", "runtime_max": "", "compute_capability": [],
    "board": "", "power_mode": "", "clocks_locked": False, "free_memory_mb": 0, "free_disk_mb": 0,
}  # fmt: skip


def weights():
    draw = np.random.default_rng(3)
    first = draw.normal(size=(FEATURES, HIDDEN)).astype(np.float32)
    second = draw.normal(size=(HIDDEN, CLASSES)).astype(np.float32) / 4
    return first, second


def torch_logits(images):
    """What "PyTorch" says of images (N, C, H, W) in 0..1."""
    first, second = weights()
    return np.maximum(images.reshape(len(images), -1) @ first, 0) @ second


def _quantised(nodes, constants, name, values=None, scale=0.1):
    """Q and DQ around a tensor, with a zero point of zero."""
    constants += [
        numpy_helper.from_array(np.float32(scale), f"{name}_scale"),
        numpy_helper.from_array(np.int8(0), f"{name}_zero"),
    ]
    ends = [f"{name}_scale", f"{name}_zero"]
    nodes.append(helper.make_node("QuantizeLinear", [name, *ends], [f"{name}_q"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *ends], [f"{name}_dq"]))
    return f"{name}_dq"


def graph(kind, batch, opset=17, extra=None):
    """ONNX bytes: flatten, linear, ReLU, linear; input and output are float32."""
    first, second = weights()
    nodes = [helper.make_node("Reshape", ["images", "flat_shape"], ["flat"])]
    constants = [numpy_helper.from_array(np.array([batch, FEATURES], np.int64), "flat_shape")]
    x, names = "flat", ["first", "second"]
    if kind == "fp16":
        first, second = first.astype(np.float16), second.astype(np.float16)
        nodes.append(helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16))
        x = "half"
    constants += [
        numpy_helper.from_array(w, n) for n, w in zip(names, (first, second), strict=True)
    ]
    if kind.startswith("int8"):
        x = _quantised(nodes, constants, "flat", scale=1 / 127)
        names = [
            _quantised(nodes, constants, n, scale=s) for n, s in (("first", 0.03), ("second", 0.01))
        ]
    nodes += [
        helper.make_node("MatMul", [x, names[0]], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", names[1]], ["c"]),
        helper.make_node("Cast", ["c"], ["logits"], to=TensorProto.FLOAT),
    ]
    if extra:
        nodes.append(helper.make_node(extra, ["c"], ["d"], name="/odd"))
    port = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes, "student",
        [port("images", TensorProto.FLOAT, (batch, *SHAPE))],
        [port("logits", TensorProto.FLOAT, (batch, CLASSES))], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def make_test_set(folder, n=50):
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    labels = torch_logits(images.astype(np.float32) / 255).argmax(1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels.astype(np.int64))
    return folder


def test_set_hash(folder):
    digest = hashlib.sha256()
    for name in ("images.npy", "labels.npy"):
        digest.update(name.encode() + sha256(folder / name).encode())
    return digest.hexdigest()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_bundle(
    folder, test_set, runtime="onnxruntime", names=("fp32",), batches=(1, 3), requires=None,
    protocol=PROTOCOL, graphs=None, opset=17, precisions=None, **target,
):  # fmt: skip
    """Write a bundle; ``graphs`` replaces files by path, ``requires`` fields of REQUIRES."""
    (folder / "model").mkdir(parents=True)
    (folder / "parity").mkdir()
    chosen = [(precisions or PRECISIONS)[name] for name in names]
    entries = []
    for precision in chosen:
        for batch in batches:
            path = f"model/{precision.name}-b{batch}.onnx"
            data = (graphs or {}).get(path) or graph(precision.graph, batch, opset)
            (folder / path).write_bytes(data)
            entry = {"precision": precision.name, "batch": batch, "path": path}
            entries.append({**entry, "sha256": sha256(folder / path)})
    images = np.load(test_set / "images.npy").astype(np.float32) / 255
    logits = torch_logits(images)
    np.save(folder / "parity/inputs.npy", images[:20])
    np.save(folder / "parity/logits.npy", logits[:20])
    np.save(folder / "parity/classes.npy", logits.argmax(1).astype(np.int32))
    top1 = 100.0 * float((logits.argmax(1) == np.load(test_set / "labels.npy")).mean())
    rules = json.loads(as_json(protocol))
    spec = {
        "schema": 1,
        "target": {
            "name": "test", "runtime": runtime, "threads": 1, "affinity": [], "tf32": False,
            "workspace_mb": 64, "opset": opset, **target,
        },
        "protocol": rules,
        "quick": json.loads(as_json(protocol.shortened())),
        "requires": {**REQUIRES, **(requires or {})},
        "precisions": [
            {**json.loads(as_json(p)), "quantised": p.quantised} for p in chosen
        ],
        "batches": list(batches), "graphs": entries, "num_classes": CLASSES,
        "image_shape": list(SHAPE), "torch_top1": top1,
        "test_set": json.loads(as_json(TestSet(test_set_hash(test_set), len(images)))),
    }  # fmt: skip
    (folder / "protocol.json").write_text(json.dumps(spec))
    (folder / "run.py").write_bytes(RUNNER.read_bytes())
    seal(folder)
    return folder


def seal(folder):
    """List every file in the manifest, as it is now."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "bundle.json"]
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in paths}
    (folder / "bundle.json").write_text(json.dumps({"files": files}, sort_keys=True))


def change_spec(bundle, **fields):
    """Change ``protocol.json`` as if it had been exported so."""
    path = bundle / "protocol.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    seal(bundle)


def events_of(text):
    return [json.loads(line) for line in text.splitlines()]


def run_process(bundle, *words, python=sys.executable, cache, timeout=120, env=None):
    """Run the bundle's runner as a process: exit status, events, standard error."""
    command = [str(python), str(Path(bundle) / "run.py"), str(bundle), *map(str, words)]
    done = subprocess.run(
        [*command, "--cache", str(cache)], capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, events_of(done.stdout), done.stderr


def named(events, name):
    return [event for event in events if event["event"] == name]
