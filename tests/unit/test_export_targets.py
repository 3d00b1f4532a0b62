"""Target profiles: the shipped ones are right, and wrong ones are refused in one sentence."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from smskd_export.targets import Protocol, list_targets, load_target

from smskd.errors import ConfigError, UnknownNameError


def profile(**changes):
    """A valid profile as YAML text, with changes."""
    fields = {
        "name": "mine",
        "description": "d",
        "runtime": "onnxruntime",
        "opset": 18,
        "dynamic_batch": True,
        "batches": [1],
        "threads": 2,
        "measure_here": True,
        "protocol": {"warmup_s": "1e-3", "min_duration_s": 0, "min_samples": 5, "windows": 1},
        "parity": {"max_abs_diff": 0.01, "min_agreement": 99},
    }
    return yaml.safe_dump({**fields, **changes})


def test_shipped_profiles_are_named_as_their_files():
    assert list_targets() == ["cpu", "jetson"]
    assert [load_target(name).name for name in list_targets()] == ["cpu", "jetson"]


def test_cpu_is_measured_here_with_one_thread_and_any_batch_size():
    cpu = load_target("cpu")
    assert (cpu.runtime, cpu.threads, cpu.measure_here, cpu.dynamic_batch) == (
        "onnxruntime",
        1,
        True,
        True,
    )
    assert cpu.opset >= 18
    assert cpu.batches[0] == 1
    assert cpu.protocol.min_samples * cpu.protocol.windows >= 662  # what a p99 bound needs


def test_jetson_reads_opset_17_at_batch_1_and_is_not_measured_here():
    jetson = load_target("jetson")
    assert (jetson.runtime, jetson.opset, jetson.dynamic_batch) == ("tensorrt", 17, False)
    assert jetson.batches == (1,)
    assert not jetson.measure_here


def test_own_profile_is_read_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(profile())
    target = load_target(path)
    assert target == load_target(str(path))
    assert target.threads == 2
    assert target.protocol == Protocol(0.001, 0.0, 5, 1)  # YAML reads 1e-3 as a string


def test_misspelt_name_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'jetson'"):
        load_target("jetsn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 16}, "opset must be 17 to 23"),
        ({"batches": []}, "batches must be sizes"),
        ({"batches": [0]}, "batches must be sizes"),
        ({"threads": 0}, "threads must be"),
        ({"dynamic_batch": False, "batches": [1, 8]}, "exactly one batch size"),
        ({"runtime": "tensorrt"}, "measure_here: tensorrt is timed on its device"),
        ({"runtime": "openvino"}, "runtime"),
        ({"threds": 1}, "threds: Unexpected keyword"),
        ({"parity": {"max_abs_diff": 0, "min_agreement": 99}}, "parity: max_abs_diff must be"),
        ({"parity": {"max_abs_diff": 1, "min_agreement": 101}}, "percentage"),
    ],
)
def test_wrong_field_is_named(tmp_path, changes, message):
    path = tmp_path / "bad.yaml"
    path.write_text(profile(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_target(path)
    assert str(path) in caught.value.message
    assert "cpu, jetson" in caught.value.hint


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
    with pytest.raises(ConfigError, match="cannot read target profile"):
        load_target(tmp_path / "none.yaml")


def test_shortened_protocol_is_never_longer():
    full = load_target("cpu").protocol
    short = full.shortened()
    assert short.min_duration_s < full.min_duration_s
    assert short.windows * short.min_samples < full.windows * full.min_samples
    assert short.shortened() == short
    tiny = replace(short, min_samples=1, windows=1, warmup_s=0.0, min_duration_s=0.0)
    assert tiny.shortened() == tiny


def test_profiles_and_latency_maths_load_neither_torch_nor_onnx():
    code = (
        "import sys, smskd.errors; before = set(sys.modules)\n"
        "import smskd_export, smskd_export.targets, smskd_export.latency\n"
        "smskd_export.load_target('cpu')\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(new & {'torch', 'onnx', 'onnxruntime', 'onnxscript'}))"
    )
    path = [p for p in sys.path if p]
    env = {"PYTHONPATH": ":".join(path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
