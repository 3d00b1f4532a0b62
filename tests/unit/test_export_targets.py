"""Target profiles: the shipped ones are right, and wrong ones are refused in one sentence."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from smskd_export.targets import Calibration, Precision, list_targets, load_target

from smskd.errors import ConfigError, UnknownNameError

SHIPPED = [
    "cpu", "cuda", "jetson", "jetson-agx-orin", "jetson-orin-jp5", "jetson-orin-nano",
    "jetson-thor", "raspberry-pi-5",
]  # fmt: skip
PROTOCOL = {
    "name": "mine-v1", "warmup_s": "1e-3", "warmup_runs": 1, "min_duration_s": 0, "min_samples": 5,
    "windows": 1, "cooldown_s": 0, "sweep_duration_s": 0, "settle_s": 0, "start_below_c": 0,
    "abort_above_c": 0, "cuda_graph": False, "energy_idle_s": 0, "energy_active_s": 0,
}  # fmt: skip
FP32 = {"name": "fp32", "graph": "fp32", "min_agreement": 99}
SIGNED = {"name": "int8", "graph": "int8_signed", "min_agreement": 90}
UNSIGNED = {"name": "int8", "graph": "int8_unsigned", "min_agreement": 90}


def profile(**changes):
    """A valid profile as YAML text, with changes."""
    fields = {
        "name": "mine",
        "description": "d",
        "runtime": "onnxruntime",
        "opset": 18,
        "batches": [1],
        "precisions": [FP32],
        "threads": 2,
        "protocol": PROTOCOL,
    }
    return yaml.safe_dump({**fields, **changes})


def test_shipped_profiles_are_named_as_their_files():
    assert list_targets() == SHIPPED
    assert [load_target(name).name for name in list_targets()] == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_can_bound_its_percentiles_and_starts_with_one_image(name):
    target = load_target(name)
    assert target.protocol.min_samples * target.protocol.windows >= 662  # what a p99 bound needs
    assert target.batches[0] == 1
    assert target.precisions[0].name == "fp32"
    assert target.threads == 1
    assert not target.tf32
    assert any(precision.quantised for precision in target.precisions)


@pytest.mark.parametrize("name", [n for n in SHIPPED if n.startswith("jetson")])
def test_jetsons_need_arm_and_tensorrt(name):
    target = load_target(name)
    assert (target.runtime, target.requires.arch) == ("tensorrt", ("aarch64",))
    assert {p.graph for p in target.precisions} == {"fp32", "fp16", "int8_signed"}
    if target.requires.runtime_min.startswith("8"):
        assert target.opset == 17  # what TensorRT 8.5 reads
        assert all(p.weak_fp16 for p in target.precisions if p.quantised)


def test_cpus_get_unsigned_graphs_that_are_right_without_vnni():
    cpu = load_target("cpu")
    assert [p.graph for p in cpu.precisions] == ["fp32", "int8_unsigned"]
    assert cpu.calibration.reduce_range


def test_own_profile_is_read_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(profile())
    target = load_target(path)
    assert target == load_target(str(path))
    assert target.threads == 2
    assert target.protocol.warmup_s == 0.001  # YAML reads 1e-3 as a string
    assert target.precisions == (Precision("fp32", "fp32", 99.0),)
    assert target.calibration == Calibration()
    assert target.with_threads(4) == replace(target, threads=4)


def test_misspelt_name_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'jetson'"):
        load_target("jetsn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 16}, "opset must be 17 to 23"),
        ({"opset": 24}, "opset must be 17 to 23"),
        ({"batches": []}, "batches must be sizes"),
        ({"batches": [0]}, "batches must be sizes"),
        ({"batches": [1, 1]}, "batches must differ"),
        ({"threads": 0}, "threads must be"),
        ({"runtime": "openvino"}, "runtime"),
        ({"threds": 1}, "threds: Unexpected keyword"),
        ({"precisions": []}, "need different names"),
        ({"precisions": [FP32, FP32]}, "need different names"),
        ({"precisions": [UNSIGNED]}, "first precision must be an fp32 graph"),
        ({"precisions": [FP32 | {"min_agreement": 101}]}, "min_agreement is a percentage"),
        ({"precisions": [FP32 | {"max_abs_diff": 0}]}, "max_abs_diff must be above 0"),
        ({"precisions": [FP32 | {"max_drop": -1}]}, "max_drop must not be negative"),
        ({"precisions": [FP32 | {"name": "../x"}]}, "name: use a-z"),
        ({"precisions": [FP32 | {"graph": "int4"}]}, "precisions.0.graph"),
        ({"runtime": "tensorrt", "precisions": [FP32, UNSIGNED]}, "TensorRT reads signed int8"),
        ({"precisions": [FP32, SIGNED | {"residue": "fp16"}]}, "residue fp16 needs opset 19"),
        ({"protocol": PROTOCOL | {"warmup_s": -1}}, "warmup_s must not be negative"),
        ({"protocol": PROTOCOL | {"windows": 0}}, "windows must be >= 1"),
        ({"calibration": {"n": 0}}, "n must be >= 1"),
        ({"calibration": {"method": "magic"}}, "calibration.method"),
        ({"requires": {"runtime_min": "new"}}, "runtime_min: not a version"),
    ],
)
def test_wrong_field_is_named(tmp_path, changes, message):
    path = tmp_path / "bad.yaml"
    path.write_text(profile(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_target(path)
    assert str(path) in caught.value.message
    assert "cpu, cuda, jetson" in caught.value.hint


def test_all_wrong_fields_are_told_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(profile(opset="many", threads="few"))
    with pytest.raises(ConfigError, match=r"opset: .*threads: "):
        load_target(path)


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_file_that_is_no_profile(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_target(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_target(tmp_path / "none.yaml")


def test_shortened_protocol_is_never_longer():
    full = load_target("cpu").protocol
    short = full.shortened()
    assert short.name == "quick"
    assert short.min_duration_s < full.min_duration_s
    assert short.windows * short.min_samples < full.windows * full.min_samples
    assert short.shortened() == short
    tiny = replace(short, min_samples=1, windows=1, warmup_s=0.0, min_duration_s=0.0)
    assert tiny.shortened() == tiny


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
"""


def without(packages, code):
    """Run code in a process in which packages cannot be imported."""
    path = [p for p in sys.path if p]
    script = BLOCKED.format(blocked=tuple(packages)) + code
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env={"PYTHONPATH": ":".join(path)}, capture_output=True, text=True
    )


def test_what_an_engineer_with_a_bundle_needs_runs_without_torch_and_onnx(tmp_path):
    code = (
        "from pathlib import Path\n"
        "import numpy as np\n"
        "import smskd_export\n"
        "from smskd_export import archive, bundle, latency, manifest, measurement, paired\n"
        "from smskd_export import measuring, judging, test_sets\n"
        "smskd_export.load_target('cpu')\n"
        "smskd_export.paired_change(np.array([True]), np.array([False]))\n"
        "try:\n"
        f"    smskd_export.open_bundle(Path({str(tmp_path)!r}), Path('cache'))\n"
        "except smskd_export.archive.StoreError as error:\n"
        "    print(error.message)\n"
    )
    done = without(["torch", "onnx", "onnxruntime", "onnxscript", "scipy", "sklearn"], code)
    assert "holds no bundle" in done.stdout, done.stderr


def test_public_names_are_there():
    import smskd_export

    for name in smskd_export.__all__:
        assert getattr(smskd_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = smskd_export.nonsense
