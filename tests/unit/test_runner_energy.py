"""Where the device runner reads power, and what it makes of it."""

import contextlib
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runner_bundle import change_spec, events_of, make_bundle, make_test_set, named
from smskd_export.measurement import read_measurement
from smskd_export.runner import RUNNER, run


@pytest.fixture(autouse=True, scope="module")
def light_collector():
    """The runner collects garbage before every window; not what the rest of the tests holds."""
    gc.freeze()
    yield
    gc.unfreeze()


NO_GPU = run.Runtime("onnxruntime", None, "1", None)
ORIN_NANO = (
    "04-10-2024 12:00:00 RAM 2448/7620MB (lfb 14x4MB) SWAP 0/3810MB (cached 0MB) CPU [1%@729,0%@729]"
    " EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] NVDEC off cpu@45.5C soc2@44.5C tj@46C"
    " VDD_IN 4055mW/4010mW VDD_CPU_GPU_CV 560mW/560mW VDD_SOC 1240mW/1240mW"
)
AGX_ORIN = (
    "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) CPU [90%@2201] EMC_FREQ 1%@2133"
    " GR3D_FREQ 14%@[407,407] CV0@73.625C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW"
    " VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
THOR = (
    "RAM 5000/125772MB CPU [0%@972] GR3D_FREQ @[1575,1575,1575] cpu@41C tj@45C VDD_GPU 0mW/0mW"
    " VDD_CPU_SOC_MSS 6514mW/6514mW VIN_SYS_5V0 6520mW/6520mW VIN 23110mW/23000mW"
)


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}")


def monitor(root, number, rails, name="ina3221", **files):
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name)
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        (folder / f"in{channel}_label").write_text(label + "\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
    for file, text in files.items():
        (folder / file).write_text(text)
    return folder


def tegrastats(tmp_path, line):
    path = tmp_path / "bin/tegrastats"
    path.write_text(f"#!/bin/sh\nwhile :; do echo '{line}'; /bin/sleep 0.05; done\n")
    path.chmod(0o755)
    release = tmp_path / "root/etc/nv_tegra_release"
    release.parent.mkdir(parents=True)
    release.write_text("# R36 (release), REVISION: 4.3")


def machine(tmp_path):
    return run.Machine(str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (ORIN_NANO, {"VDD_IN": 4055, "VDD_CPU_GPU_CV": 560, "VDD_SOC": 1240}),
        (AGX_ORIN, {"VDD_GPU_SOC": 3150, "VDD_CPU_CV": 14312, "VIN_SYS_5V0": 4968, "VDDQ_VDD2_1V8AO": 1091}),
        (THOR, {"VDD_GPU": 0, "VDD_CPU_SOC_MSS": 6514, "VIN_SYS_5V0": 6520, "VIN": 23110}),
        ("RAM 1/2MB", {}),
    ],
)  # fmt: skip
def test_tegrastats_lines_give_the_power_now_not_its_mean(line, rails):
    assert run.parse_tegrastats(line) == rails


def test_the_rail_of_the_whole_module_is_preferred(tmp_path):
    monitor(tmp_path / "root", 2, [("VDD_IN", 5000, 800), ("VDD_CPU_GPU_CV", 5000, 1), ("VDD_SOC", 1, 1)],
            update_interval="35")  # fmt: skip
    found = run.find_power_source(machine(tmp_path), NO_GPU)
    assert (found.kind, found.rails, found.interval_ms) == ("ina3221", ("VDD_IN",), 35.0)
    assert [Path(p).name for p in found.details[0]] == ["in1_input", "curr1_input"]


def test_without_it_the_input_rails_are_summed_once(tmp_path):
    rails = [("VDD_GPU_SOC", 1, 1), ("VDD_CPU_CV", 1, 1), ("VIN_SYS_5V0", 1, 1)]
    monitor(tmp_path / "root", 3, rails)
    monitor(tmp_path / "root", 4, [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 1, 1)])
    found = run.find_power_source(machine(tmp_path), NO_GPU)
    assert found.rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert found.interval_ms == run.SAMPLE_MS


def test_rails_that_nobody_knows_are_not_added_up(tmp_path):
    monitor(tmp_path / "root", 3, [("A", 1, 1), ("B", 1, 1)])
    monitor(tmp_path / "root", 4, [("VDD_IN", 1, 1)], name="other")
    assert run.find_power_source(machine(tmp_path), NO_GPU) is None


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (ORIN_NANO, ("VDD_IN",)), (THOR, ("VIN",)),
        (AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
    ],
)  # fmt: skip
def test_tegrastats_stands_in(tmp_path, line, rails):
    tegrastats(tmp_path, line)
    found = run.find_power_source(machine(tmp_path), NO_GPU)
    assert (found.kind, found.rails) == ("tegrastats", rails)


def test_nothing_to_read(tmp_path):
    assert run.find_power_source(machine(tmp_path), NO_GPU) is None
    tegrastats(tmp_path, "RAM 1/2MB")
    assert run.find_power_source(machine(tmp_path), NO_GPU) is None


def rapl(root, name, value, largest=262143328850, zone="intel-rapl:0"):
    folder = root / f"sys/class/powercap/{zone}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name)
    (folder / "max_energy_range_uj").write_text(str(largest))
    if value is not None:
        (folder / "energy_uj").write_text(str(value))
    return folder


def test_rapl_sums_packages_and_memory_but_not_the_parts_of_a_package(tmp_path):
    root = tmp_path / "root"
    rapl(root, "package-0", 1)
    rapl(root, "core", 1, zone="intel-rapl:0:0")
    rapl(root, "dram", 1, zone="intel-rapl:0:2")
    found = run.find_power_source(machine(tmp_path), NO_GPU)
    assert (found.kind, found.rails) == ("rapl", ["package-0", "dram"])


def test_rapl_that_only_root_may_read(tmp_path):
    rapl(tmp_path / "root", "package-0", None)
    assert run.find_power_source(machine(tmp_path), NO_GPU) is None


@pytest.mark.parametrize(
    ("before", "after", "largest", "step"),
    [(10, 25, 99, 15), (10, 10, 99, 0), (90, 5, 99, 15), (99, 0, 99, 1)],
)
def test_counters_start_again(before, after, largest, step):
    assert run.counter_step(before, after, largest) == step


def test_rapl_readings_across_the_wraparound(tmp_path):
    folder = rapl(tmp_path / "root", "package-0", 900_000, largest=999_999)
    source = run.find_power_source(machine(tmp_path), NO_GPU)
    values, moments = iter([950_000, 0, 50_000]), []

    def stop(seconds):
        assert seconds == run.SAMPLE_MS / 1000
        time.sleep(0.01)
        moments.append(time.perf_counter_ns())
        with contextlib.suppress(StopIteration):
            (folder / "energy_uj").write_text(str(next(values)))
            return False
        return True

    start = time.perf_counter_ns()
    readings = list(run._rapl_readings(source, stop))
    assert len(readings) == 3
    spans = np.diff([start, *moments[:3]]) / 1e9
    for (moment, watts), span in zip(readings, spans, strict=True):
        assert watts == pytest.approx(0.05 / span, rel=0.5)  # 50 mJ each, the second across the end
        assert start < moment < moments[-1]


def sampled(source, target, seconds=0.4):
    """Let the real sampler process run for a while."""
    command = [sys.executable, str(RUNNER), "--sample-power", json.dumps(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while not (target.exists() and target.read_bytes().count(b"\n") > 3):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(seconds)
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == b""
    return run.read_power(target)


def test_the_sampler_reads_volts_times_amperes(tmp_path):
    rails = [("VDD_GPU_SOC", 1000, 2000), ("VDD_CPU_CV", 500, 1000), ("VIN_SYS_5V0", 5000, 100)]
    monitor(tmp_path / "root", 3, rails)
    found = sampled(run.find_power_source(machine(tmp_path), NO_GPU), tmp_path / "p.csv")
    assert found[:, 1] == pytest.approx(2.0 + 0.5 + 0.5)
    assert (np.diff(found[:, 0]) > 0).all()
    assert abs(found[-1, 0] - time.perf_counter_ns()) < 60e9  # the clock of the timed process


def test_the_sampler_reads_tegrastats_and_ends_it(tmp_path):
    tegrastats(tmp_path, ORIN_NANO)
    found = sampled(run.find_power_source(machine(tmp_path), NO_GPU), tmp_path / "p.csv")
    assert found[:, 1] == pytest.approx(4.055)
    lines = [run.Machine().text(p / "cmdline") for p in run.Machine().glob("/proc/[0-9]*")]
    assert not [line for line in lines if str(tmp_path / "bin/tegrastats") in line]


def test_mean_power_is_the_integral_of_trapezoids():
    # 2 W until 1 s, then rising to 6 W at 3 s, then 6 W.
    samples = np.array([[0, 2], [1e9, 2], [3e9, 6], [5e9, 6]])
    assert run.mean_watts(samples, 0, 1_000_000_000) == pytest.approx(2)
    assert run.mean_watts(samples, 1_000_000_000, 3_000_000_000) == pytest.approx(4)
    assert run.mean_watts(samples, 0, 5_000_000_000) == pytest.approx((2 + 8 + 12) / 5)
    assert run.mean_watts(samples, 2_000_000_000, 2_500_000_000) == pytest.approx(4.5)
    assert run.mean_watts(samples, 4_000_000_000, 6_000_000_000) == pytest.approx(6)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "p.csv").write_text("t_ns,watts\n1,2.5\n2,3.5\n3,")
    assert run.read_power(tmp_path / "p.csv").tolist() == [[1, 2.5], [2, 3.5]]
    (tmp_path / "p.csv").write_text("")
    assert run.read_power(tmp_path / "p.csv").shape == (0, 2)


def measured(tmp_path, *words, **fields):
    bundle = make_bundle(tmp_path / "bundle", make_test_set(tmp_path / "tests"), batches=(1, 3))
    spec = json.loads((bundle / "protocol.json").read_text())
    change_spec(
        bundle,
        protocol={**spec["protocol"], "energy_idle_s": 0.2, "energy_active_s": 0.4, **fields},
    )
    words = [str(bundle), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c"), *words]
    assert run.main(words, root=str(tmp_path / "root")) == 0
    return read_measurement(tmp_path / "out")


def test_energy_of_an_inference_end_to_end(tmp_path, capsys):
    monitor(tmp_path / "root", 3, [("VDD_IN", 5000, 400)])
    found = measured(tmp_path)
    single, sweep = found.rows
    assert sweep.energy is None
    energy = single.energy
    assert (energy.source, energy.rails, energy.interval_ms) == ("ina3221", ("VDD_IN",), 20.0)
    assert energy.idle_w == pytest.approx(2.0)
    assert energy.active_w == pytest.approx(2.0)
    assert energy.net_mj == pytest.approx(0, abs=1e-9)
    assert energy.gross_mj * energy.inferences == pytest.approx(2.0 * 400, rel=0.2)  # W x ms
    assert energy.samples >= 5
    assert energy.p50_ns > 0
    assert energy.power_file in found.files
    kept = run.read_power(tmp_path / "out" / energy.power_file)
    assert len(kept) > energy.samples
    names = [e["event"] for e in events_of(capsys.readouterr().out)]
    assert names.index("energy") > max(i for i, name in enumerate(names) if name == "row")
    assert names[-4:] == ["energy_progress", "energy", "reprobe", "end"]


def test_energy_that_rises_with_the_work_is_told_apart(tmp_path, monkeypatch):
    folder = monitor(tmp_path / "root", 3, [("VDD_IN", 5000, 200)])
    original = run.time_window

    def busy(backend, slots, seconds, count, first_slot=0):
        working = (tmp_path / "out/fp32-b1-power.csv").exists()
        (folder / "curr1_input").write_text("1000" if working else "200")
        return original(backend, slots, seconds, count, first_slot)

    monkeypatch.setattr(run, "time_window", busy)
    energy = measured(tmp_path, energy_active_s=1.0).rows[0].energy
    assert energy.idle_w == pytest.approx(1.0, rel=0.1)
    assert energy.active_w == pytest.approx(5.0, rel=0.1)
    share = energy.net_mj / energy.gross_mj
    assert share == pytest.approx((energy.active_w - energy.idle_w) / energy.active_w)


def test_no_source_is_no_error(tmp_path, capsys):
    found = measured(tmp_path)
    assert [row.energy for row in found.rows] == [None, None]
    event = named(events_of(capsys.readouterr().out), "energy")[0]
    assert (event["source"], event["reason"]) == (None, "power cannot be read on this device")


def test_energy_can_be_left_out(tmp_path, capsys):
    monitor(tmp_path / "root", 3, [("VDD_IN", 5000, 400)])
    found = measured(tmp_path, "--no-energy")
    assert found.rows[0].energy is None
    assert not named(events_of(capsys.readouterr().out), "energy")


def test_a_sampler_that_dies_costs_only_the_energy(tmp_path, monkeypatch):
    monitor(tmp_path / "root", 3, [("VDD_IN", 5000, 400)])
    broken = run.PowerSource("ina3221", ["VDD_IN"], 20.0, 17)
    monkeypatch.setattr(run, "find_power_source", lambda *_: broken)
    found = measured(tmp_path)
    assert found.rows[0].status == "ok"
    assert found.rows[0].energy is None
    assert not list((tmp_path / "out").glob("*power*"))
