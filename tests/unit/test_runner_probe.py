"""What the device runner reads of a device: trees of files as Jetsons and other boards have them.

The trees are written after public listings; no such board was at hand.
"""

import os
from pathlib import Path

import pytest
from fake_tensorrt import FakeCudart, make_tensorrt
from pydantic import TypeAdapter
from smskd_export.measurement import Probe
from smskd_export.runner import run

CONF = "# comment\n< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=15W >\n"
MEMORY = "MemTotal:        7802908 kB\nMemFree: 100 kB\nMemAvailable:    5120000 kB\n"
ARM = "processor : 0\nBogoMIPS : 62.50\nCPU implementer : 0x41\nCPU part : {}\nCPU revision : 1\n"
POLICY = "sys/devices/system/cpu/cpufreq/policy{}/scaling_{}_freq"

ORIN_JP5 = {
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64",
    "etc/nvpmodel.conf": CONF,
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
    "proc/device-tree/model": "Jetson AGX Orin Developer Kit\0",
    "proc/meminfo": MEMORY,
    "proc/loadavg": "0.75 0.50 0.20 1/500 1234",
    "proc/cpuinfo": ARM.format("0xd42"),
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 20.04.6 LTS"\n',
    "sys/class/devfreq/17000000.ga10b/min_freq": "1300500000",
    "sys/class/devfreq/17000000.ga10b/max_freq": "1300500000",
    "sys/class/devfreq/17000000.ga10b/cur_freq": "1300500000",
    "sys/class/devfreq/15340000.vic/min_freq": "115200000",
    "sys/class/devfreq/15340000.vic/max_freq": "729600000",
    POLICY.format(0, "min"): "2201600", POLICY.format(0, "max"): "2201600",
    POLICY.format(0, "cur"): "2201600",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm", "sys/class/thermal/thermal_zone0/temp": "48500",
    "sys/class/thermal/thermal_zone1/type": "CV0-therm", "sys/class/thermal/thermal_zone1/temp": "-256000",
    "sys/class/thermal/thermal_zone2/type": "PMIC-Die", "sys/class/thermal/thermal_zone2/temp": "100000",
    "sys/class/hwmon/hwmon1/name": "soctherm_oc", "sys/class/hwmon/hwmon1/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon1/oc3_event_cnt": "12",
}  # fmt: skip
ORIN_JP6 = {
    **{name: text for name, text in ORIN_JP5.items() if "ga10b" not in name},
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000",
}
THOR = {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/cpuinfo": ARM.format("0xd83"),
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-nvd-0/min_freq": "1692000000",
    "sys/class/devfreq/gpu-nvd-0/max_freq": "1692000000",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000",
    "sys/class/thermal/thermal_zone0/type": "tj-thermal", "sys/class/thermal/thermal_zone0/temp": "45218",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",  # no temp: the GPU has no power
}  # fmt: skip
PI = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": ARM.format("0xd0b"),
    POLICY.format(0, "min"): "1500000", POLICY.format(0, "max"): "2400000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal", "sys/class/thermal/thermal_zone0/temp": "55050",
}  # fmt: skip
PC = {
    "sys/class/dmi/id/sys_vendor": "LENOVO", "sys/class/dmi/id/product_name": "20XW",
    "proc/cpuinfo": "processor : 0\nvendor_id : GenuineIntel\nmodel name\t: Intel(R) Core(TM) i7\n",
    **{f"sys/devices/system/cpu/cpu{n}/thermal_throttle/core_throttle_count": str(n) for n in range(4)},
    **{f"sys/devices/system/cpu/cpu{n}/thermal_throttle/package_throttle_count": "9" for n in range(4)},
}  # fmt: skip


def machine(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return run.Machine(str(root))


def look(root, files, runtime=None):
    runtime = runtime or run.Runtime("onnxruntime", None, "1.2.3", None)
    found = run.probe(machine(root, files), runtime, Path(root))
    TypeAdapter(Probe).validate_python(found)
    return found


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    """No program of this machine answers in place of the tree's."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def add_tool(tmp_path, name, text):
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_orin_with_jetpack_5(tmp_path):
    found = look(tmp_path / "root", ORIN_JP5)
    assert found["board"] == "Jetson AGX Orin Developer Kit"
    assert found["l4t"] == "35.4.1"
    assert found["cpu"] == "ARM Cortex-A78AE"
    assert found["os"] == "Ubuntu 20.04.6 LTS"
    assert (found["power_mode"], found["power_modes"]) == ("15W", ["0=MAXN", "1=15W"])
    assert found["clocks_locked"] is True  # the video engine may do what it likes
    assert found["clocks_khz"] == {"cpu-policy0": 2201600, "17000000.ga10b": 1300500}
    assert found["temperatures_c"] == {"CPU-therm": 48.5}
    assert found["throttle_counts"] == {"oc1_event_cnt": 0, "oc3_event_cnt": 12}
    assert (found["memory_total_mb"], found["memory_free_mb"]) == (7620, 5000)
    assert found["load_1min"] == 0.75


def test_orin_with_jetpack_6(tmp_path):
    found = look(tmp_path / "root", ORIN_JP6)
    assert found["l4t"] == "36.4.3"
    assert "Orin Nano" in found["board"]
    assert found["clocks_locked"] is False
    assert found["clocks_khz"]["17000000.gpu"] == 612000


def test_processor_that_may_change_its_clock_is_not_locked(tmp_path):
    found = look(
        tmp_path / "root", {**ORIN_JP5, POLICY.format(4, "min"): "1", POLICY.format(4, "max"): "2"}
    )
    assert found["clocks_locked"] is False


def test_thor(tmp_path):
    found = look(tmp_path / "root", THOR)
    assert found["l4t"] == "38.2.0"
    assert found["cpu"] == "ARM Neoverse-V3AE"
    assert found["clocks_locked"] is True
    assert found["temperatures_c"] == {"tj-thermal": 45.218}
    assert found["power_mode"] == ""


def test_raspberry_pi(tmp_path):
    add_tool(tmp_path, "vcgencmd", '[ "$1" = get_throttled ] && echo throttled=0x50005')
    found = look(tmp_path / "root", PI)
    assert found["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert found["cpu"] == "ARM Cortex-A76"
    assert found["clocks_locked"] is False
    assert found["throttle_counts"] == {
        "firmware_under_voltage": 1, "firmware_frequency_capped": 0, "firmware_throttled": 1,
        "firmware_hot": 0,
    }  # fmt: skip


def test_computer(tmp_path):
    found = look(tmp_path / "root", PC)
    assert found["board"] == "LENOVO 20XW"
    assert found["cpu"] == "Intel(R) Core(TM) i7"
    assert found["throttle_counts"] == {"cpu_core": 6, "cpu_package": 9}
    assert found["clocks_locked"] is None


def test_nothing_to_read_is_no_error(tmp_path):
    (tmp_path / "root").mkdir()
    found = look(tmp_path / "root", {})
    assert (found["board"], found["l4t"], found["power_mode"]) == ("", "", "")
    assert (found["memory_free_mb"], found["load_1min"], found["clocks_locked"]) == (
        None,
        None,
        None,
    )
    assert found["temperatures_c"] == found["clocks_khz"] == found["throttle_counts"] == {}


def test_two_sensors_of_one_name_are_both_kept(tmp_path):
    zone = "sys/class/thermal/thermal_zone{}/{}"
    files = {zone.format(n, "type"): "acpitz" for n in (0, 1)}
    files.update({zone.format(n, "temp"): str(20_000 + 1000 * n) for n in (0, 1)})
    found = run.temperatures(machine(tmp_path / "root", files))
    assert found == {"acpitz": 20.0, "acpitz-thermal_zone1": 21.0}
    assert run.hottest(found) == ("acpitz-thermal_zone1", 21.0)
    assert run.hottest({}) is None


def test_desktop_gpu(tmp_path):
    add_tool(
        tmp_path, "nvidia-smi",
        'case "$1" in *clocks*) echo "1410, 1593";; *temperature*) echo 37;; '
        '*compute-apps*) echo "4711, /usr/bin/train";; esac',
    )  # fmt: skip
    library = FakeCudart(cuda=12)
    runtime = run.Runtime(
        "tensorrt", make_tensorrt("10.13", library), "10.13.3.9", run.Cuda(library)
    )
    found = look(tmp_path / "root", PC, runtime)
    assert found["clocks_khz"] == {"gpu0-sm": 1410000, "gpu0-memory": 1593000}
    assert found["temperatures_c"] == {"gpu0": 37.0}
    assert found["gpu_processes"] == ["4711 /usr/bin/train"]
    assert (found["cuda"], found["gpu"], found["compute_capability"]) == ("12.6", "Fake GPU", "8.7")
    assert found["gpu_memory_free_mb"] == 8192


def test_a_process_seen_from_outside_a_container_is_this_one(tmp_path):
    add_tool(tmp_path, "nvidia-smi", 'echo "4711, other"; echo "4712, python"')
    here = machine(tmp_path / "root", {"proc/4711/comm": "other"})
    both = ["4711 other", "4712 python"]
    assert run.gpu_processes(here) == both
    assert run.gpu_processes(here, []) == ["4711 other"]
    assert run.gpu_processes(here, both) == both  # it was there before this process used the GPU
    add_tool(tmp_path, "nvidia-smi", f'echo "{os.getpid()}, python"; echo "4712, python"')
    assert run.gpu_processes(here, []) == ["4712 python"]


def test_a_tool_that_fails_or_hangs_says_nothing(tmp_path, monkeypatch):
    add_tool(tmp_path, "broken", "echo lies; exit 1")
    assert run.tool("broken") == ""
    assert run.tool("absent") == ""
    add_tool(tmp_path, "works", "echo fine")
    assert run.tool("works") == "fine"


def elf(machine_number):
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + machine_number.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("arch", "number", "cpuinfo", "expected"),
    [
        ("aarch64", 183, ARM.format("0xd42"), False), ("aarch64", 62, ARM.format("0xd42"), True),
        ("aarch64", 40, "", False), ("x86_64", 62, PC["proc/cpuinfo"], False),
        ("x86_64", 183, "", True), ("aarch64", None, PC["proc/cpuinfo"], True),
        ("aarch64", None, "", False), ("x86_64", None, PC["proc/cpuinfo"], False),
        ("s390x", 62, "", False),
    ],
)  # fmt: skip
def test_an_imitated_processor_is_noticed(tmp_path, arch, number, cpuinfo, expected):
    here = machine(tmp_path / "root", {"proc/cpuinfo": cpuinfo})
    if number is not None:
        path = here.path("/proc/thread-self/exe")
        path.parent.mkdir(parents=True)
        path.write_bytes(elf(number))
    assert run.emulated(here, arch) is expected


def test_this_machine_is_no_imitation_unless_somebody_says_so(monkeypatch):
    assert run.emulated(run.Machine()) is False
    monkeypatch.setenv("SMSKD_EMULATED", "1")
    assert run.emulated(run.Machine()) is True


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert run.disk_free_mb(tmp_path / "a/b/c") > 0
