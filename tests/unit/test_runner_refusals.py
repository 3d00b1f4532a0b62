"""What the device runner refuses: one line for each reason, with cause, remedy and what there is."""

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
from fake_tensorrt import FakeCudart, make_tensorrt
from runner_bundle import (
    change_spec,
    events_of,
    make_bundle,
    make_test_set,
    named,
    run_process,
    seal,
)
from smskd_export.runner import run

MODES = "".join(f"< POWER_MODEL ID={n} NAME={m} >\n" for n, m in enumerate(("15W", "7W", "MAXN")))


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    """No nvidia-smi of this machine takes part."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def tests(tmp_path):
    return make_test_set(tmp_path / "tests")


@pytest.fixture
def bundle(tmp_path, tests):
    return make_bundle(tmp_path / "bundle", tests)


def jetson(root, **files):
    """The files of a small Jetson below ``root``; ``files`` adds or replaces some."""
    content = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
        "etc/nvpmodel.conf": MODES,
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/meminfo": "MemTotal: 7000000 kB\nMemAvailable: 3000000 kB\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
        "sys/class/devfreq/17000000.gpu/max_freq": "624750000",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
        "sys/class/thermal/thermal_zone0/type": "tj-thermal",
        "sys/class/thermal/thermal_zone0/temp": "51500",
        **files,
    }
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def refused(capsys, bundle, tmp_path, *words, root="/", **given):
    """Run in this process; the refusals, and that nothing was left."""
    out = tmp_path / "results"
    words = [str(bundle), "--out", str(out), "--cache", str(tmp_path / "cache"), *map(str, words)]
    status = run.main(words, root=str(root), **given)
    events = events_of(capsys.readouterr().out)
    assert status == 3
    assert not out.exists()
    assert events[-1]["event"] == "end"
    assert events[-1]["status"] == "refused"
    lines = named(events, "refused")
    assert lines
    for line in lines:
        assert line["message"]
        assert line["remedy"]
        assert isinstance(line["offers"], list)
    return {line["code"]: line for line in lines}


def changed(bundle, how):
    spec = json.loads((bundle / "protocol.json").read_text())
    change_spec(bundle, requires={**spec["requires"], **how})


def gpu(**options):
    library = FakeCudart(**options)
    return {"trt": make_tensorrt("10.3", library), "cuda": run.Cuda(library)}


def test_wrong_architecture(capsys, bundle, tmp_path):
    changed(bundle, {"arch": ["sparc"]})
    found = refused(capsys, bundle, tmp_path)
    assert set(found) == {"arch"}
    assert found["arch"]["offers"] == [os.uname().machine]


def test_old_python_and_old_runtime_are_both_listed(capsys, bundle, tmp_path):
    changed(bundle, {"python": "3.99", "runtime_min": "99.0"})
    assert set(refused(capsys, bundle, tmp_path)) == {"python", "runtime_version"}


def test_runtime_newer_than_the_target_knows(capsys, bundle, tmp_path):
    changed(bundle, {"runtime_min": "0.1", "runtime_max": "1.2"})
    found = refused(capsys, bundle, tmp_path)
    assert "0.1 to 1.2" in found["runtime_version"]["message"]


def test_missing_runtime(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt")
    if find_spec("tensorrt"):
        pytest.skip("TensorRT is here")
    found = refused(capsys, bundle, tmp_path)
    assert set(found) == {"runtime_missing"}
    assert "libnvinfer" in found["runtime_missing"]["remedy"]
    assert set(refused(capsys, bundle, tmp_path, "--allow", "runtime_missing")) == set(found)


def test_missing_cuda(capsys, tmp_path, tests, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt")
    monkeypatch.setattr(run.ctypes, "CDLL", _no_library)
    found = refused(capsys, bundle, tmp_path, trt=make_tensorrt("8.5"))
    assert "libcudart" in found["runtime_missing"]["message"]


def _no_library(name):
    raise OSError(f"{name} cannot be opened")


def test_cuda_without_a_gpu(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt")
    given = gpu()
    given["cuda"]._library.cudaRuntimeGetVersion = lambda *_: 35
    found = refused(capsys, bundle, tmp_path, **given)
    assert "fake error 35" in found["runtime_missing"]["message"]


def test_compute_capability_and_board(capsys, tmp_path, tests):
    wanted = {"compute_capability": ["11.0"], "board": "AGX Thor"}
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt", requires=wanted)
    found = refused(capsys, bundle, tmp_path, root=jetson(tmp_path / "root"), **gpu())
    assert set(found) == {"compute_capability", "board"}
    assert found["compute_capability"]["offers"] == ["Fake GPU 8.7"]
    assert found["board"]["offers"] == ["NVIDIA Jetson Orin Nano Developer Kit"]


def test_power_mode_and_clocks(capsys, tmp_path, tests):
    wanted = {"power_mode": "MAXN", "clocks_locked": True}
    bundle = make_bundle(tmp_path / "bundle", tests, requires=wanted)
    found = refused(capsys, bundle, tmp_path, root=jetson(tmp_path / "root"))
    assert set(found) == {"power_mode", "clocks_locked"}
    assert "'7W'" in found["power_mode"]["message"]
    assert found["power_mode"]["remedy"] == "sudo nvpmodel -m 2"
    assert found["power_mode"]["offers"] == ["0=15W", "1=7W", "2=MAXN"]
    assert found["clocks_locked"]["remedy"] == "sudo jetson_clocks"


def test_a_power_mode_that_the_board_lacks(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, requires={"power_mode": "40W"})
    found = refused(capsys, bundle, tmp_path, root=jetson(tmp_path / "root"))
    assert "no such mode" in found["power_mode"]["remedy"]


def test_the_power_mode_is_asked_from_nvpmodel_first(tmp_path):
    tool = tmp_path / "bin" / "nvpmodel"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1" = -q ] && printf "NV Power Mode: MAXN\\n2\\n"\n')
    tool.chmod(0o755)
    root = run.Machine(str(jetson(tmp_path / "root")))
    assert run.power_mode(root, run.power_modes(root)) == "MAXN"


def test_not_enough_memory_on_the_host(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, requires={"free_memory_mb": 3000})
    root = jetson(tmp_path / "root")
    assert set(refused(capsys, bundle, tmp_path, root=root)) == {"memory"}


def test_not_enough_memory_on_the_gpu(capsys, tmp_path, tests):
    bundle = make_bundle(
        tmp_path / "bundle", tests, runtime="tensorrt", requires={"free_memory_mb": 500}
    )
    found = refused(capsys, bundle, tmp_path, **gpu(free=100 << 20))
    assert "memory of the GPU" in found["memory"]["message"]
    assert found["memory"]["offers"] == ["100 MB"]


def test_not_enough_disk(capsys, bundle, tmp_path):
    changed(bundle, {"free_disk_mb": 1 << 40})
    found = refused(capsys, bundle, tmp_path)
    assert set(found) == {"disk"}
    assert str(1 << 40) in found["disk"]["message"]


def test_disk_for_the_engines_is_asked_even_if_the_target_asks_for_none(
    bundle, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "disk_free_mb", lambda folder: run.SPARE_DISK_MB - 1)
    assert set(refused(capsys, bundle, tmp_path)) == {"disk"}


def test_other_process_on_the_gpu_of_a_jetson(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt")
    root = jetson(tmp_path / "root")
    for pid, name, target in (
        (71, "python3", "/dev/nvhost-gpu"), (72, "Xorg", "/dev/nvhost-gpu"),
        (73, "sshd", "/dev/null"), (os.getpid(), "pytest", "/dev/nvhost-gpu"),
    ):  # fmt: skip
        (root / f"proc/{pid}/fd").mkdir(parents=True)
        (root / f"proc/{pid}/comm").write_text(name + "\n")
        (root / f"proc/{pid}/fd/3").symlink_to(target)
    found = refused(capsys, bundle, tmp_path, root=root, **gpu())
    assert set(found) == {"gpu_processes"}
    assert found["gpu_processes"]["offers"] == ["71 python3"]


def test_other_process_on_a_desktop_gpu(capsys, tmp_path, tests):
    bundle = make_bundle(tmp_path / "bundle", tests, runtime="tensorrt")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        f'#!/bin/sh\ncase "$1" in *compute-apps*) echo "{os.getpid()}, pytest"; echo "1, train";; esac\n'
    )
    smi.chmod(0o755)
    found = refused(capsys, bundle, tmp_path, **gpu())
    assert found["gpu_processes"]["offers"] == ["1 train"]


def test_too_hot_to_begin(capsys, tmp_path, bundle):
    spec = json.loads((bundle / "protocol.json").read_text())
    change_spec(bundle, protocol={**spec["protocol"], "abort_above_c": 51.0})
    found = refused(capsys, bundle, tmp_path, root=jetson(tmp_path / "root"))
    assert set(found) == {"thermal"}
    assert "tj-thermal is at 51.5 C" in found["thermal"]["message"]


def test_waived_requirements_are_recorded(tmp_path, tests, capsys):
    wanted = {"arch": ["sparc"], "board": "Nano"}
    bundle = make_bundle(tmp_path / "bundle", tests, requires=wanted, batches=(1,))
    assert set(refused(capsys, bundle, tmp_path, "--allow", "arch")) == {"board"}
    words = ["--allow", "arch", "--allow", "board", "--allow", "disk", "--out", tmp_path / "out"]
    status, *_ = run_process(bundle, *words, cache=tmp_path / "cache")
    assert status == 0
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["allowed"] == ["arch", "board"]


def damaged(capsys, bundle, tmp_path, *words):
    found = refused(capsys, bundle, tmp_path, *words)
    assert len(found) == 1
    return found.popitem()


@pytest.mark.parametrize(
    "path", ["model/fp32-b1.onnx", "parity/logits.npy", "run.py", "protocol.json"]
)
def test_one_changed_byte(capsys, bundle, tmp_path, path):
    data = bytearray((bundle / path).read_bytes())
    data[-2] ^= 1
    (bundle / path).write_bytes(data)
    code, line = damaged(capsys, bundle, tmp_path, "--allow", "bundle")
    assert code == "bundle"
    assert path in line["message"] or "schema" in line["message"] or "bundle" in line["message"]


def test_missing_file(capsys, bundle, tmp_path):
    (bundle / "model/fp32-b3.onnx").unlink()
    code, line = damaged(capsys, bundle, tmp_path)
    assert (code, "model/fp32-b3.onnx is missing" in line["message"]) == ("bundle", True)


def test_unknown_file(capsys, bundle, tmp_path):
    (bundle / "model/sitecustomize.py").write_text("")
    assert "does not belong" in damaged(capsys, bundle, tmp_path)[1]["message"]


def test_link_in_the_bundle(capsys, bundle, tmp_path):
    (tmp_path / "elsewhere").write_bytes((bundle / "run.py").read_bytes())
    (bundle / "run.py").unlink()
    (bundle / "run.py").symlink_to(tmp_path / "elsewhere")
    assert "no plain file" in damaged(capsys, bundle, tmp_path)[1]["message"]


def test_no_bundle(capsys, tmp_path):
    assert damaged(capsys, tmp_path / "nothing", tmp_path)[0] == "bundle"


def test_bundle_of_another_version(capsys, bundle, tmp_path):
    change_spec(bundle, schema=99)
    assert "schema 99" in damaged(capsys, bundle, tmp_path)[1]["message"]


def test_another_bundle_than_expected(capsys, bundle, tmp_path):
    code, line = damaged(capsys, bundle, tmp_path, "--expect-id", "0" * 64)
    assert code == "bundle_id"
    assert "0" * 64 in line["message"]


def test_parity_arrays_that_do_not_fit(capsys, bundle, tmp_path):
    np.save(bundle / "parity/logits.npy", np.zeros((20, 3), np.float32))
    seal(bundle)
    assert "parity/logits.npy holds" in damaged(capsys, bundle, tmp_path)[1]["message"]


def test_pickles_are_not_opened(capsys, bundle, tmp_path):
    np.save(bundle / "parity/inputs.npy", np.array([{}]), allow_pickle=True)
    seal(bundle)
    assert "parity/inputs.npy cannot be read" in damaged(capsys, bundle, tmp_path)[1]["message"]


def test_test_set_with_more_classes_than_the_student(capsys, bundle, tmp_path, tests):
    labels = np.load(tests / "labels.npy")
    labels[7] = 10
    np.save(tests / "labels.npy", labels)
    code, line = damaged(capsys, bundle, tmp_path, "--test-set", tests)
    assert code == "test_set"
    assert "the student knows 10 classes" in line["message"]


def test_negative_labels(capsys, bundle, tmp_path, tests):
    np.save(tests / "labels.npy", np.load(tests / "labels.npy") - 5)
    assert (
        "labels go from -3" in damaged(capsys, bundle, tmp_path, "--test-set", tests)[1]["message"]
    )


def test_test_set_of_other_images(capsys, bundle, tmp_path, tests):
    np.save(tests / "images.npy", np.zeros((50, 3, 4, 4), np.uint8))
    assert (
        "the student reads" in damaged(capsys, bundle, tmp_path, "--test-set", tests)[1]["message"]
    )


def test_labels_of_another_length(capsys, bundle, tmp_path, tests):
    np.save(tests / "labels.npy", np.zeros(49, np.int64))
    assert (
        "50 images have labels"
        in damaged(capsys, bundle, tmp_path, "--test-set", tests)[1]["message"]
    )


def test_another_test_set(capsys, bundle, tmp_path, tests):
    images = np.load(tests / "images.npy")
    images[0, 0, 0, 0] ^= 1
    np.save(tests / "images.npy", images)
    assert (
        "another test set" in damaged(capsys, bundle, tmp_path, "--test-set", tests)[1]["message"]
    )


def test_no_test_set_there(capsys, bundle, tmp_path):
    code, line = damaged(capsys, bundle, tmp_path, "--test-set", tmp_path / "none")
    assert (code, "images.npy" in line["remedy"]) == ("test_set", True)


def test_unknown_precision(capsys, bundle, tmp_path):
    code, line = damaged(capsys, bundle, tmp_path, "--precision", "fp4")
    assert (code, line["offers"]) == ("precision", ["fp32"])


def test_cores_that_are_not_there(capsys, bundle, tmp_path):
    assert damaged(capsys, bundle, tmp_path, "--affinity", "99999")[0] == "affinity"


def test_results_are_not_written_over_others(bundle, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    status, events, _ = run_process(bundle, "--out", tmp_path / "out", cache=tmp_path / "cache")
    assert status == 3
    assert named(events, "refused")[0]["code"] == "out"
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_probe_writes_nothing_and_lists_what_is_wrong(bundle, tmp_path):
    changed(bundle, {"arch": ["sparc"]})
    status, events, errors = run_process(bundle, "--probe", cache=tmp_path / "cache")
    assert (status, errors) == (3, "")
    assert [e["event"] for e in events] == ["start", "probe", "refused", "end"]
    assert not (tmp_path / "cache").exists()
    words = ["--probe", "--allow", "arch"]
    status, events, _ = run_process(bundle, *words, cache=tmp_path / "cache")
    assert status == 0
    assert [e["event"] for e in events] == ["start", "probe", "end"]
    assert events[-1]["status"] == "ok"
