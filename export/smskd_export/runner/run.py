#!/usr/bin/env python3
"""Measure one bundle on the device that this file runs on.

    python3 run.py BUNDLE --out DIR [--test-set DIR] [--quick] ...

One file for Python 3.8 or newer with numpy, and TensorRT 8.5 to 11 or ONNX Runtime. It reads what
``protocol.json`` asks for, refuses a device that does not fit, and then for each graph: builds it,
compares it with PyTorch's logits, measures accuracy by the very object that is timed, rests, warms
up and times inferences in windows. Nothing is clipped; every nanosecond is kept.

It prints one JSON object a line and writes ``result.json`` last. Exit status: 0 every row is fine;
3 refused, nothing was measured; 4 stopped or crashed; 5 some row failed.

Sections: events, the device, requirements, bundle, CUDA, TensorRT, the two backends, gates, timing,
energy, the run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import ctypes.util
import fcntl
import gc
import hashlib
import importlib
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import numpy as np
except ImportError:
    if __name__ != "__main__":
        raise
    _remedy = "sudo apt install python3-numpy, or pip install numpy"
    _refused = {"event": "refused", "t": 0.0, "code": "runtime_missing", "offers": []}
    _refused.update(message="Python has no numpy on this device", remedy=_remedy)
    for _line in (_refused, {"event": "end", "t": 0.0, "status": "refused"}):
        print(json.dumps(_line), flush=True)
    sys.exit(3)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Json = dict[str, Any]

SCHEMA = 1
OK, REFUSED, STOPPED, ROW_FAILED = 0, 3, 4, 5
HUGE = 1e308
"""Stands for an infinite difference, which JSON cannot write."""
MIB = 1 << 20
PROGRESS_S = 0.5
SPARE_DISK_MB = 64
WAIVABLE = (
    "arch", "python", "runtime_version", "compute_capability", "board", "power_mode",
    "clocks_locked", "memory", "disk", "gpu_processes", "thermal",
)  # fmt: skip


class Refusal(NamedTuple):
    """One reason not to measure here."""

    code: str
    message: str
    remedy: str
    offers: Sequence[str] = ()


class RefusedError(Exception):
    """Nothing can be measured; every reason is listed."""

    def __init__(self, *refusals: Refusal) -> None:
        super().__init__("; ".join(refusal.message for refusal in refusals))
        self.refusals = refusals


class RowError(Exception):
    """One row ends here, the others go on."""

    def __init__(self, reason: str, status: str = "failed") -> None:
        super().__init__(reason)
        self.status = status


class StopError(Exception):
    """Measuring ends here, and what was finished is kept."""


# --- events ---------------------------------------------------------------------------------------


class Events:
    """One JSON object a line, on standard output and, once there is a folder, in a file."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._lines: list[str] = []
        self._file: Any = None
        self._lock = threading.RLock()

    def open(self, path: Path) -> None:
        """Write to ``path`` from now on, what was said before included."""
        self._file = path.open("w", encoding="utf-8")
        self._file.write("".join(self._lines))

    def say(self, event: str, **fields: Any) -> None:
        """Print and keep one event."""
        line = self.keep(event, **fields)
        with self._lock:
            sys.stdout.write(line)
            sys.stdout.flush()

    def keep(self, event: str, **fields: Any) -> str:
        """Keep one event without printing it yet."""
        known = {"event": event, "t": round(time.perf_counter() - self._start, 6)}
        line = json.dumps({**known, **fields}, allow_nan=False) + "\n"
        self._lines.append(line)
        if self._file:
            self._file.write(line)
            self._file.flush()
        return line

    def close(self) -> None:
        """Force the file to the disk; what is said later is only printed."""
        file, self._file = self._file, None
        if file:
            with file:
                file.flush()
                os.fsync(file.fileno())


# --- the device -----------------------------------------------------------------------------------

FAMILIES = {
    "x86_64": (62, 3), "amd64": (62, 3), "i386": (3,), "i686": (3, 62),
    "aarch64": (183, 40), "arm64": (183, 40), "armv7l": (40, 183), "armv8l": (40, 183),
}  # fmt: skip
"""Instruction set to the machine numbers of ELF files that run on it."""
ARM_CORES = {
    "0x004": "Carmel", "0xd03": "Cortex-A53", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2", "0xd83": "Neoverse-V3AE",
}  # fmt: skip
GPU_FILES = re.compile(r"/dev/(nvgpu/|nvhost-gpu|nvhost-ctrl-gpu|nvidia\d)")
DISPLAY = re.compile(r"^(Xorg|Xwayland|X$|gnome-|gdm|kwin|weston|nvidia-persiste|mutter)")
FIXED_ZONES = ("PMIC-Die",)
"""Sensors that always read the same."""


class Machine:
    """Reads what the system says of itself, below ``root`` so that tests can bring their own."""

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)

    def path(self, name: str) -> Path:
        """Where the system's file ``name`` lies."""
        return self._root / name.lstrip("/")

    def text(self, name: str | Path) -> str:
        """Content of a file, or nothing."""
        path = name if isinstance(name, Path) else self.path(name)
        try:
            return path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
        except OSError:
            return ""

    def number(self, name: str | Path) -> int | None:
        """Content of a file that holds one whole number, or None."""
        try:
            return int(self.text(name))
        except ValueError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """Files, sorted."""
        try:
            return sorted(self._root.glob(pattern.lstrip("/")))
        except OSError:
            return []


def tool(*command: str) -> str:
    """What a program of the system prints; nothing if it is not there or fails."""
    found = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if not found:
        return ""
    try:
        done = subprocess.run(
            [found, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def utc() -> str:
    """Now, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def probe(
    machine: Machine, runtime: Runtime, folder: Path, known: Sequence[str] | None = None
) -> Json:
    """Look at the device. What cannot be read is None or empty.

    Args:
        machine: The system.
        runtime: What will execute the graphs.
        folder: Where the bundle lies.
        known: Processes on the GPU that were there before this one used it; None: it did not yet.
    """
    board = machine.text("/proc/device-tree/model") or _desktop(machine)
    modes = power_modes(machine)
    found = {
        "utc": utc(),
        "arch": platform.machine(),
        "board": board,
        "cpu": cpu_name(machine),
        "cores": len(os.sched_getaffinity(0)),
        "os": _os_name(machine),
        "kernel": platform.release(),
        "l4t": l4t(machine),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "runtime": runtime.kind,
        "runtime_version": runtime.version,
        "memory_total_mb": _meminfo(machine, "MemTotal"),
        "memory_free_mb": _meminfo(machine, "MemAvailable"),
        "disk_free_mb": disk_free_mb(folder),
        "power_mode": power_mode(machine, modes),
        "power_modes": modes,
        "clocks_locked": clocks_locked(machine),
        "clocks_khz": clocks(machine),
        "temperatures_c": temperatures(machine),
        "throttle_counts": throttle_counts(machine),
        "load_1min": _load(machine),
        "emulated": emulated(machine),
    }
    found.update(_gpu(machine, runtime, known))
    return found


def _gpu(machine: Machine, runtime: Runtime, known: Sequence[str] | None) -> Json:
    """What concerns the GPU; it is asked only where it is going to be used."""
    found: Json = {
        "cuda": "", "gpu": "", "compute_capability": "", "gpu_memory_free_mb": None,
        "gpu_processes": [],
    }  # fmt: skip
    if runtime.cuda is None:
        return found
    # Before the first use of CUDA: in a container this process would look like somebody else's.
    found["gpu_processes"] = gpu_processes(machine, known)
    cuda = runtime.cuda
    try:
        found.update(
            cuda=cuda.version(),
            gpu=cuda.name(),
            compute_capability=cuda.compute_capability(),
            gpu_memory_free_mb=cuda.free_bytes() // MIB,
        )
    except CudaError as error:
        raise RefusedError(
            Refusal("runtime_missing", f"CUDA does not work here: {error}", "check with nvidia-smi")
        ) from error
    return found


def _desktop(machine: Machine) -> str:
    names = (machine.text(f"/sys/class/dmi/id/{n}") for n in ("sys_vendor", "product_name"))
    return " ".join(name for name in names if name)


def cpu_name(machine: Machine) -> str:
    """Name of the processor, of the kind of its first core."""
    info = machine.text("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    part = re.search(r"^CPU part\s*:\s*(\S+)$", info, re.M)
    if part:
        return "ARM " + ARM_CORES.get(part.group(1), f"part {part.group(1)}")
    return named.group(1).strip() if named else platform.processor()


def _os_name(machine: Machine) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', machine.text("/etc/os-release"), re.M)
    return found.group(1) if found else platform.system()


def l4t(machine: Machine) -> str:
    """Release of Linux for Tegra, as "36.4.3"; empty elsewhere."""
    text = machine.text("/etc/nv_tegra_release")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else ""


def _meminfo(machine: Machine, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", machine.text("/proc/meminfo"), re.M)
    return int(found.group(1)) // 1024 if found else None


def disk_free_mb(folder: Path) -> int | None:
    """Space for us where ``folder`` lies or will lie."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(str(folder)).free // MIB
    except OSError:
        return None


def _load(machine: Machine) -> float | None:
    try:
        return float(machine.text("/proc/loadavg").split()[0])
    except (ValueError, IndexError):
        return None


def power_modes(machine: Machine) -> list[str]:
    """Modes of nvpmodel on offer, as "0=15W"."""
    text = machine.text("/etc/nvpmodel.conf")
    found = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text)
    return [f"{number}={name}" for number, name in found]


def power_mode(machine: Machine, modes: Sequence[str]) -> str:
    """Name of the nvpmodel mode; empty where there is none."""
    found = re.search(r"NV Power Mode\s*:\s*(\S+)", tool("nvpmodel", "-q"))
    if found:
        return found.group(1)
    kept = re.search(r"pmode:(\d+)", machine.text("/var/lib/nvpmodel/status"))
    names = dict(mode.split("=", 1) for mode in modes)
    return names.get(str(int(kept.group(1))), "") if kept else ""


def _gpu_devfreq(machine: Machine) -> list[Path]:
    is_gpu = re.compile(r"gpu|gv11b|ga10b|gp10b|gm20b")
    return [p for p in machine.glob("/sys/class/devfreq/*") if is_gpu.search(p.name)]


def clocks_locked(machine: Machine) -> bool | None:
    """Whether GPU and processor may not change their clocks; None where that is not known."""
    pairs = [(p / "min_freq", p / "max_freq") for p in _gpu_devfreq(machine)]
    policies = machine.glob("/sys/devices/system/cpu/cpufreq/policy*")
    pairs += [(p / "scaling_min_freq", p / "scaling_max_freq") for p in policies]
    ends = [(machine.number(low), machine.number(high)) for low, high in pairs]
    known = [low == high for low, high in ends if low is not None and high is not None]
    return all(known) if known else None


def clocks(machine: Machine) -> dict[str, int]:
    """Current frequencies in kHz by name."""
    found = {}
    for policy in machine.glob("/sys/devices/system/cpu/cpufreq/policy*"):
        khz = machine.number(policy / "scaling_cur_freq")
        if khz is not None:
            found[f"cpu-{policy.name}"] = khz
    for gpu in _gpu_devfreq(machine):
        hertz = machine.number(gpu / "cur_freq")
        if hertz is not None:
            found[gpu.name] = hertz // 1000
    emc = machine.number("/sys/kernel/debug/bpmp/debug/clk/emc/rate")
    if emc is not None:
        found["emc"] = emc // 1000
    asked = tool("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits")
    for number, line in enumerate(asked.splitlines()):
        values = re.fullmatch(r"\s*(\d+),\s*(\d+)\s*", line)
        if values:
            found[f"gpu{number}-sm"] = int(values.group(1)) * 1000
            found[f"gpu{number}-memory"] = int(values.group(2)) * 1000
    return found


def temperatures(machine: Machine) -> dict[str, float]:
    """Degrees Celsius by sensor."""
    found = {}
    for zone in machine.glob("/sys/class/thermal/thermal_zone*"):
        name = machine.text(zone / "type") or zone.name
        value = machine.number(zone / "temp")
        # A sensor of a part without power reads -256 degrees or gives an error.
        if value is not None and value > -100_000 and name not in FIXED_ZONES:
            found[name if name not in found else f"{name}-{zone.name}"] = value / 1000
    asked = tool("nvidia-smi", "--query-gpu=temperature.gpu", "--format=csv,noheader,nounits")
    for number, line in enumerate(asked.splitlines()):
        if line.strip().isdigit():
            found[f"gpu{number}"] = float(line)
    return found


def throttle_counts(machine: Machine) -> dict[str, int]:
    """How often the device slowed down so far, by counter."""
    found: dict[str, int] = {}
    for name, join in (("core", sum), ("package", max)):
        files = machine.glob(f"/sys/devices/system/cpu/cpu*/thermal_throttle/{name}_throttle_count")
        values = [value for value in map(machine.number, files) if value is not None]
        if values:
            found[f"cpu_{name}"] = join(values)
    for path in machine.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        value = machine.number(path)
        if value is not None:
            found[path.name] = found.get(path.name, 0) + value
    firmware = re.search(r"throttled=0x([0-9a-f]+)", tool("vcgencmd", "get_throttled"))
    if firmware:  # bits that stay set from the first time on
        bits = int(firmware.group(1), 16)
        names = {16: "under_voltage", 17: "frequency_capped", 18: "throttled", 19: "hot"}
        found.update({f"firmware_{name}": bits >> bit & 1 for bit, name in names.items()})
    return found


def gpu_processes(machine: Machine, known: Sequence[str] | None = None) -> list[str]:
    """Others on the GPU, as "pid name".

    Args:
        machine: The system.
        known: What this gave before this process used the GPU. One more since then, of a number
            that is none here, is this process, seen from outside a container.
    """
    if l4t(machine):
        return _users_of_gpu_files(machine)
    command = ("nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader")
    rows = re.findall(r"^\s*(\d+)\s*,\s*(.+?)\s*$", tool(*command), re.M)
    others = [f"{pid} {name}" for pid, name in rows if int(pid) != os.getpid()]
    if known is not None and len(others) == len(rows):
        strange = [o for o in others if not machine.path(f"/proc/{o.split()[0]}").exists()]
        mine = [other for other in strange if other not in known][:1]
        others = [other for other in others if other not in mine]
    return others


def _users_of_gpu_files(machine: Machine) -> list[str]:
    """By the open files of every process that we may look into."""
    found = []
    for process in machine.glob("/proc/[0-9]*"):
        name = machine.text(process / "comm")
        if int(process.name) == os.getpid() or DISPLAY.match(name):
            continue
        try:
            links = [os.readlink(str(link)) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(GPU_FILES.match(link) for link in links):
            found.append(f"{process.name} {name}")
    return found


def emulated(machine: Machine, arch: str = "") -> bool:
    """Whether the processor is imitated: the program that runs is made for another one.

    An emulator of user programs shows its guest a false ``/proc/self/exe``; the entry of the
    thread still names the emulator.
    """
    if os.environ.get("SMSKD_EMULATED"):
        return True
    family = FAMILIES.get(arch or platform.machine())
    try:
        with machine.path("/proc/thread-self/exe").open("rb") as file:
            head = file.read(20)
    except OSError:
        head = b""
    if family is None:
        return False
    if head[:4] == b"\x7fELF" and len(head) == 20:
        return int.from_bytes(head[18:20], "little") not in family
    return 183 in family and "vendor_id" in machine.text("/proc/cpuinfo")


# --- requirements ---------------------------------------------------------------------------------


def version_tuple(text: str) -> tuple[int, ...]:
    """Numbers of a version, without what follows a plus sign."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0]))


def version_fits(version: str, oldest: str, newest: str) -> bool:
    """Whether oldest <= version <= newest, the latter only as far as it is written."""
    found, low, high = (version_tuple(text) for text in (version, oldest, newest))
    return found >= low and (not high or found[: len(high)] <= high)


def unmet(requires: Json, found: Json, hot_c: float = 0.0) -> list[Refusal]:
    """Requirements that the probed device does not meet.

    Args:
        requires: The target's requirements.
        found: The probe.
        hot_c: Temperature at which measuring would stop; 0: any will do.
    """
    checks = (_unmet_software, _unmet_hardware, _unmet_power, _unmet_room)
    refusals = [refusal for check in checks for refusal in check(requires, found)]
    if found["gpu_processes"]:
        refusals.append(
            Refusal(
                "gpu_processes",
                f"others are on the GPU: {', '.join(found['gpu_processes'])}",
                "stop them (kill PID), then measure again",
                found["gpu_processes"],
            )
        )
    heat = hottest(found["temperatures_c"])
    if hot_c and heat and heat[1] >= hot_c:
        refusals.append(
            Refusal(
                "thermal",
                f"sensor {heat[0]} is at {heat[1]:.1f} C; measuring stops at {hot_c:g} C",
                "let the device cool, check its fan",
            )
        )
    return refusals


def _unmet_software(requires: Json, found: Json) -> Iterator[Refusal]:
    arch = [name.lower().replace("amd64", "x86_64") for name in requires["arch"]]
    here = found["arch"].lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if arch and here not in arch:
        yield Refusal(
            "arch",
            f"this machine is {found['arch']}; the target is made for {', '.join(arch)}",
            "measure on such a device (--device user@host), or export for another target",
            [found["arch"]],
        )
    if not version_fits(found["python"], requires["python"], ""):
        yield Refusal(
            "python",
            f"Python is {found['python']}; the target wants {requires['python']} or newer",
            "name a newer interpreter with --python",
            [found["python"]],
        )
    oldest, newest = requires["runtime_min"], requires["runtime_max"]
    if found["runtime_version"] and not version_fits(found["runtime_version"], oldest, newest):
        wanted = f"{oldest} or newer" if not newest else f"{oldest or 'any'} to {newest}"
        yield Refusal(
            "runtime_version",
            f"{found['runtime']} is {found['runtime_version']}; the target wants {wanted}",
            "export for a target that fits this version, or install another one",
            [found["runtime_version"]],
        )


def _unmet_hardware(requires: Json, found: Json) -> Iterator[Refusal]:
    wanted = requires["compute_capability"]
    if wanted and found["compute_capability"] not in wanted:
        yield Refusal(
            "compute_capability",
            f"the GPU has compute capability {found['compute_capability'] or 'unknown'}; "
            f"the target is made for {', '.join(wanted)}",
            "export for a target that fits this GPU",
            [f"{found['gpu']} {found['compute_capability']}".strip()],
        )
    if requires["board"].lower() not in found["board"].lower():
        yield Refusal(
            "board",
            f"this is {found['board'] or 'an unknown board'!r}; the target is made for "
            f"{requires['board']!r}",
            "export for a target that fits this board",
            [found["board"]],
        )


def _unmet_power(requires: Json, found: Json) -> Iterator[Refusal]:
    wanted, modes = requires["power_mode"], found["power_modes"]
    if wanted and wanted.upper() != found["power_mode"].upper():
        numbers = [m.split("=")[0] for m in modes if m.split("=")[1].upper() == wanted.upper()]
        yield Refusal(
            "power_mode",
            f"the power mode is {found['power_mode'] or 'unknown'!r}; the target wants {wanted!r}",
            f"sudo nvpmodel -m {numbers[0]}" if numbers else "this board has no such mode",
            modes,
        )
    if requires["clocks_locked"] and not found["clocks_locked"]:
        state = "cannot be read" if found["clocks_locked"] is None else "are not locked"
        yield Refusal("clocks_locked", f"the clocks {state}", "sudo jetson_clocks")


def _unmet_room(requires: Json, found: Json) -> Iterator[Refusal]:
    wanted = requires["free_memory_mb"]
    for name, where in (("memory_free_mb", "memory"), ("gpu_memory_free_mb", "memory of the GPU")):
        if found[name] is not None and found[name] < wanted:
            yield Refusal(
                "memory",
                f"{found[name]} MB of {where} are free; the target wants {wanted} MB",
                "stop other programs, or boot without a desktop",
                [f"{found[name]} MB"],
            )


def unmet_disk(folders: Sequence[Path], wanted_mb: int) -> list[Refusal]:
    """Folders with too little space, of those that are written to."""
    free = [(disk_free_mb(folder), folder) for folder in folders]
    return [
        Refusal(
            "disk",
            f"{room} MB of disk are free for {folder}; {wanted_mb} MB are needed",
            "remove files there; engines from before lie in ~/.cache/smskd-bench/engines",
            [f"{room} MB"],
        )
        for room, folder in free
        if room is not None and room < wanted_mb
    ][:1]


def hottest(found: dict[str, float]) -> tuple[str, float] | None:
    """Name and degrees of the hottest sensor."""
    return max(found.items(), key=lambda item: item[1]) if found else None


# --- bundle ---------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Hash of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while True:
            piece = file.read(MIB)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)


def damaged(message: str) -> RefusedError:
    """The refusal of a bundle that is not what it says."""
    return RefusedError(Refusal("bundle", message, "send the bundle again, or export it again"))


class Bundle:
    """What is to be measured, and how.

    Attributes:
        folder: Where it lies.
        id: Hash of its manifest.
        spec: Content of ``protocol.json``.
    """

    def __init__(self, folder: Path, expected_id: str = "") -> None:
        """Read manifest and protocol.

        Raises:
            RefusedError: they are not there, damaged, or of another bundle.
        """
        self.folder = folder
        try:
            manifest = (folder / "bundle.json").read_bytes()
            text = (folder / "protocol.json").read_bytes()
            self._files: dict[str, str] = dict(json.loads(manifest.decode())["files"])
            self.spec: Json = json.loads(text.decode())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(f"{folder} holds no readable bundle: {error!r}") from error
        self.id = hashlib.sha256(manifest).hexdigest()
        if expected_id and self.id != expected_id:
            raise RefusedError(
                Refusal("bundle_id", f"the bundle here is {self.id}, not {expected_id}", "send it")
            )
        if hashlib.sha256(text).hexdigest() != self._files.get("protocol.json"):
            raise damaged("protocol.json is not the file that the manifest lists")
        if self.spec.get("schema") != SCHEMA:
            raise damaged(f"protocol.json has schema {self.spec.get('schema')}, not {SCHEMA}")

    def verify(self) -> int:
        """Check every file; returns how many there are.

        Raises:
            RefusedError: a file is missing, changed, a link, or unknown.
        """
        there = set()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise damaged(f"{name} is no plain file")
            if path.is_file():
                there.add(name)
        unknown = there - set(self._files) - {"bundle.json"}
        if unknown:
            raise damaged(f"{sorted(unknown)[0]} does not belong to the bundle")
        for name, digest in sorted(self._files.items()):
            if name not in there:
                raise damaged(f"{name} is missing")
            if file_sha256(self.folder / name) != digest:
                raise damaged(f"{name} is not the file that the manifest lists")
        return len(self._files)

    def graph(self, precision: str, batch: int) -> Json:
        """Entry of one graph."""
        for entry in self.spec["graphs"]:
            if (entry["precision"], entry["batch"]) == (precision, batch):
                return dict(entry)
        raise damaged(f"there is no graph for {precision} at batch {batch}")

    def array(self, name: str, dtype: Any, shape: Sequence[int | None]) -> NDArray[Any]:
        """One of its arrays; None in ``shape`` fits anything.

        Raises:
            RefusedError: it is something else.
        """
        try:
            found: NDArray[Any] = np.load(str(self.folder / name), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(f"{name} cannot be read: {error}") from error
        fits = found.ndim == len(shape) and all(
            size in (None, found.shape[axis]) for axis, size in enumerate(shape)
        )
        if not fits or found.dtype != dtype or not len(found):
            raise damaged(f"{name} holds {found.dtype} {found.shape}")
        return found


class TestSet(NamedTuple):
    """Images ``(N, C, H, W)`` uint8 and their classes ``(N,)``."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def load_test_set(folder: Path, spec: Json) -> TestSet:
    """Open and check the test set that belongs to the bundle.

    Raises:
        RefusedError: it is another one, or does not fit the student.
    """
    remedy = "give the folder that was exported with this bundle, with images.npy and labels.npy"
    try:
        images = np.load(str(folder / "images.npy"), mmap_mode="r", allow_pickle=False)
        labels = np.load(str(folder / "labels.npy"), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RefusedError(Refusal("test_set", f"cannot read {folder}: {error}", remedy)) from error
    shape, classes = tuple(spec["image_shape"]), spec["num_classes"]
    problem = ""
    if images.shape[1:] != shape or images.dtype != np.uint8 or not len(images):
        problem = f"images are {images.dtype} {images.shape}; the student reads {shape} as uint8"
    elif labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        problem = f"{len(images)} images have labels {labels.dtype} {labels.shape}"
    elif labels.min() < 0 or labels.max() >= classes:
        problem = (
            f"labels go from {labels.min()} to {labels.max()}; the student knows {classes} classes"
        )
    elif hash_test_set(folder) != spec["test_set"]["sha256"]:
        problem = "it is another test set than the bundle's, or damaged"
    if problem:
        raise RefusedError(Refusal("test_set", f"test set {folder}: {problem}", remedy))
    return TestSet(images, labels.astype(np.int64))


def hash_test_set(folder: Path) -> str:
    """Name of a test set by its content."""
    digest = hashlib.sha256()
    for name in ("images.npy", "labels.npy"):
        digest.update(name.encode() + file_sha256(folder / name).encode())
    return digest.hexdigest()


# --- CUDA -----------------------------------------------------------------------------------------


TO_DEVICE, TO_HOST, SPIN = 1, 2, 1


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


class Cuda:
    """The CUDA runtime through ctypes, under its own names.

    Addresses, streams, events and graphs are plain integers.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.cudaGetErrorString.restype = ctypes.c_char_p
        library.cudaMemcpyAsync.argtypes = [pointer, pointer, ctypes.c_size_t, number, pointer]
        library.cudaEventElapsedTime.argtypes = [ctypes.POINTER(ctypes.c_float), pointer, pointer]
        library.cudaGraphInstantiateWithFlags.argtypes = [pointer, pointer, ctypes.c_ulonglong]
        library.cudaStreamBeginCapture.argtypes = [pointer, number]
        for name in ("EventRecord", "GraphLaunch", "StreamEndCapture"):
            getattr(library, f"cuda{name}").argtypes = [pointer, pointer]
        one = "StreamSynchronize StreamDestroy EventDestroy Free FreeHost GraphDestroy"
        for name in [*one.split(), "GraphExecDestroy"]:
            getattr(library, f"cuda{name}").argtypes = [pointer]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            CudaError: it failed.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.cudaGetErrorString(code)
            raise CudaError(f"{name}: {text.decode() if text else code}")

    def make(self, name: str, *arguments: Any, kind: Any = ctypes.c_void_p) -> int:
        """Call a function whose first argument takes what it makes; returns that."""
        value = kind()
        self.call(name, ctypes.byref(value), *arguments)
        return int(value.value or 0)

    def version(self) -> str:
        """Of the CUDA runtime, as "12.6"."""
        number = self.make("cudaRuntimeGetVersion", kind=ctypes.c_int)
        return f"{number // 1000}.{number % 1000 // 10}"

    def name(self) -> str:
        """Of the GPU."""
        record = ctypes.create_string_buffer(1 << 14)  # longer than any version's; begins with it
        newer = hasattr(self._library, "cudaGetDeviceProperties_v2")
        self.call("cudaGetDeviceProperties" + ("_v2" if newer else ""), record, 0)
        return record.raw[:256].split(b"\0")[0].decode("utf-8", "replace")

    def compute_capability(self) -> str:
        """As "8.7"."""
        numbers = [self.make("cudaDeviceGetAttribute", n, 0, kind=ctypes.c_int) for n in (75, 76)]
        return ".".join(map(str, numbers))

    def bus_id(self) -> str:
        """Where the GPU sits."""
        text = ctypes.create_string_buffer(64)
        self.call("cudaDeviceGetPCIBusId", text, 64, 0)
        return text.value.decode()

    def free_bytes(self) -> int:
        """Memory of the GPU that is free."""
        total = ctypes.c_size_t()
        return self.make("cudaMemGetInfo", ctypes.byref(total), kind=ctypes.c_size_t)

    def elapsed_ns(self, first: int, second: int) -> int:
        """Between two events; the runtime gives milliseconds as float32, good to half a us."""
        value = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(value), first, second)
        return round(value.value * 1e6)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` puts into ``stream`` as an executable graph."""
        relaxed, graph, executable = 2, ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", stream, relaxed)
        try:
            work()
        finally:
            self.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self.call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        self.call("cudaGraphDestroy", graph)
        return int(executable.value or 0)


def load_cuda() -> Cuda:
    """Find the CUDA runtime: by name, in its usual folders, or beside Python packages.

    Raises:
        RefusedError: it is nowhere.
    """
    names = ["libcudart.so", *(f"libcudart.so.{v}" for v in ("13", "12", "11.0"))]
    names += [ctypes.util.find_library("cudart") or ""]
    folders = [
        *Path("/usr/local").glob("cuda*/lib64"),
        *Path("/usr/local").glob("cuda*/targets/*/lib"),
    ]
    folders += [f for entry in sys.path if entry for f in Path(entry).glob("nvidia/*/lib")]
    names += [str(path) for folder in folders for path in sorted(folder.glob("libcudart.so*"))]
    for name in filter(None, names):
        with contextlib.suppress(OSError, AttributeError):
            return Cuda(ctypes.CDLL(name))
    raise RefusedError(
        Refusal(
            "runtime_missing",
            "the CUDA runtime (libcudart) is not on this device",
            "sudo apt install cuda-cudart-12-6 (the number of your JetPack), or set "
            "LD_LIBRARY_PATH to the folder that holds libcudart.so",
        )
    )


class Runtime(NamedTuple):
    """What executes graphs: its name, module, version, and CUDA where it needs that."""

    kind: str
    module: Any
    version: str
    cuda: Any


def load_runtime(kind: str, trt: Any = None, cuda: Any = None) -> Runtime:
    """Import what the target asks for.

    Raises:
        RefusedError: it is not there, or does not work.
    """
    module = trt if kind == "tensorrt" and trt is not None else None
    try:
        module = module or importlib.import_module(kind)
    except Exception as error:  # a broken installation fails in every way
        remedy = {
            "onnxruntime": "python3 -m pip install onnxruntime",
            "tensorrt": "sudo apt install python3-libnvinfer; a virtual environment sees it only "
            "if it was made with --system-site-packages",
        }.get(kind, "update the runner")
        raise RefusedError(
            Refusal("runtime_missing", f"{kind} cannot be imported: {error}", remedy)
        ) from error
    if kind == "tensorrt":
        cuda = cuda if cuda is not None else load_cuda()
        with contextlib.suppress(CudaError):  # the default, spin or sleep, differs between devices
            cuda.call("cudaSetDeviceFlags", SPIN)
    return Runtime(kind, module, str(module.__version__), cuda if kind == "tensorrt" else None)


# --- TensorRT -------------------------------------------------------------------------------------


class BuildError(Exception):
    """TensorRT cannot read a graph, or cannot build what it ``parsed``."""

    def __init__(self, message: str, parsed: bool = True) -> None:
        super().__init__(message)
        self.parsed = parsed


class BuildSettings(NamedTuple):
    """How to build an engine.

    Attributes:
        graph: Kind of the graph, e.g. ``fp16``.
        weak_fp16: Whether fp16 may be used freely where types do not come from the graph.
        tf32: Whether fp32 products may be rounded to TF32.
        workspace_mb: Memory that may be tried with.
        opset: Operator set of the graph, for messages.
        timing_cache: File that keeps the times of tactics; empty: none.
    """

    graph: str
    weak_fp16: bool = False
    tf32: bool = False
    workspace_mb: int = 256
    opset: int = 0
    timing_cache: str = ""


def make_logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors in its list ``messages``."""
    heard = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class _Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(str(message).split())[:500]
            if severity in heard and line not in self.messages:
                self.messages.append(line)

    return _Logger()


def build_engine(
    trt: Any, onnx: bytes, settings: BuildSettings, logger: Any = None
) -> tuple[bytes, list[str], list[str]]:
    """Build an engine: the same steps from TensorRT 8.5 to 11, by what the module offers.

    Args:
        trt: A module like ``tensorrt``.
        onnx: The graph.
        settings: What is wanted.
        logger: From :func:`make_logger`; None: a new one.

    Returns:
        The engine, the branches that were taken, and TensorRT's warnings.

    Raises:
        BuildError: TensorRT cannot read or build it.
    """
    logger = logger if logger is not None else make_logger(trt)
    branches: list[str] = []
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, settings, branches))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        problem = _parse_errors(parser, settings.opset, str(trt.__version__))
        raise BuildError(problem, parsed=False)
    config = builder.create_builder_config()
    _configure(trt, config, settings, branches)
    cache = _open_timing_cache(config, settings.timing_cache, branches)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = "; ".join(logger.messages[-3:]) or "it does not say why"
        raise BuildError(f"TensorRT {trt.__version__} cannot build the graph: {last}")
    if cache is not None:
        write_whole(Path(settings.timing_cache), bytes(cache.serialize()))
    return bytes(plan), branches, logger.messages[:20]


def _typed(trt: Any, settings: BuildSettings) -> bool:
    """Whether types come from the graph and not from flags of the builder."""
    can = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return can and settings.graph != "fp32"


def _network_flags(trt: Any, settings: BuildSettings, branches: list[str]) -> int:
    flags, kinds = 0, trt.NetworkDefinitionCreationFlag
    if hasattr(kinds, "EXPLICIT_BATCH"):  # needed before 10, ignored in 10, gone in 11
        flags |= 1 << int(kinds.EXPLICIT_BATCH)
        branches.append("explicit_batch")
    if _typed(trt, settings):
        flags |= 1 << int(kinds.STRONGLY_TYPED)
        branches.append("strongly_typed")
    return flags


def _configure(trt: Any, config: Any, settings: BuildSettings, branches: list[str]) -> None:
    flags = trt.BuilderFlag
    if not _typed(trt, settings) and settings.graph != "fp32":
        wanted = ["FP16"] if settings.graph == "fp16" or settings.weak_fp16 else []
        for name in wanted + ["INT8"] * settings.graph.startswith("int8"):
            config.set_flag(getattr(flags, name))
            branches.append(f"flag_{name.lower()}")
    if hasattr(flags, "TF32"):
        (config.set_flag if settings.tf32 else config.clear_flag)(flags.TF32)
        branches.append("tf32_on" if settings.tf32 else "tf32_off")
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb * MIB)
        branches.append("memory_pool_limit")
    else:
        config.max_workspace_size = settings.workspace_mb * MIB
        branches.append("max_workspace_size")


def _open_timing_cache(config: Any, path: str, branches: list[str]) -> Any:
    if not path or not hasattr(config, "create_timing_cache"):
        return None
    kept = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(kept)
    if not cache and kept:
        kept, cache = b"", config.create_timing_cache(b"")
    if not cache or not config.set_timing_cache(cache, False):
        return None
    branches.append("timing_cache_read" if kept else "timing_cache_new")
    return cache


def _parse_errors(parser: Any, opset: int, version: str) -> str:
    listed = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name = f"node {error.node()}"
        if hasattr(error, "node_operator"):
            name += f" {error.node_name()!r} ({error.node_operator()})"
        listed.append(f"{name}: {' '.join(str(error.desc()).split())}")
    reasons = "; ".join(listed[:5]) or "it does not say why"
    return f"TensorRT {version} cannot read the graph (opset {opset}): {reasons}"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


# --- backends -------------------------------------------------------------------------------------


def peak_rss() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rolling(images: Floats, batch: int) -> Floats:
    """Images so often that every start below ``len(images)`` has a whole batch after it."""
    wanted = np.arange(len(images) + batch - 1) % len(images)
    return np.ascontiguousarray(images[wanted])


class OnnxRuntimeBackend:
    """ONNX Runtime on the processor, with exactly so many threads."""

    scope = (
        "host: one session.run call, host array in, host array out; no decoding, no scaling; "
        "threads spin while they wait"
    )

    def __init__(self, runtime: Runtime, threads: int) -> None:
        self._ort, self._threads = runtime.module, threads

    def build(self, path: Path, batch: int, sha256: str, shape: Sequence[int]) -> Json:
        """Load a graph of ``batch`` images; what it cost, as a record."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        start = time.perf_counter_ns()
        self._session = self._ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        loaded = time.perf_counter_ns()
        self._input = self._session.get_inputs()[0].name
        self.run(np.zeros((batch, *shape), np.float32))
        self._batch = batch
        return {
            "build_s": 0.0, "cached": False, "load_ns": loaded - start,
            "first_ns": time.perf_counter_ns() - loaded, "engine_sha256": sha256,
            "engine_bytes": path.stat().st_size, "device_memory_bytes": None,
            "peak_rss_bytes": peak_rss(), "branches": [], "warnings": [],
        }  # fmt: skip

    def run(self, images: Floats) -> Floats:
        """Logits ``(B, K)`` of images ``(B, C, H, W)``."""
        logits: Floats = self._session.run(None, {self._input: images})[0]
        return logits

    def set_inputs(self, images: Floats) -> None:
        """Take the images that timed inferences cycle through."""
        pool = rolling(images, self._batch)
        self._feeds = [{self._input: pool[i : i + self._batch]} for i in range(len(images))]

    def time_one(self, slot: int) -> tuple[int, int | None, int | None]:
        """Time the inference of the batch that begins at image ``slot``."""
        run, feed, now = self._session.run, self._feeds[slot], time.perf_counter_ns
        start = now()
        run(None, feed)
        return now() - start, None, None

    def close(self) -> None:
        """Let go of the session."""
        del self._session


class TensorRTBackend:
    """TensorRT through tensor addresses: one input, one output, static shapes."""

    scope = (
        "host: copy to the GPU from pinned memory, execute, copy back, wait spinning, called from "
        "Python; gpu: events around execute alone; enqueue: the call of execute"
    )

    def __init__(self, runtime: Runtime, settings: BuildSettings, cache: Path, key: Json) -> None:
        self._trt, self._cuda = runtime.module, runtime.cuda
        self._settings, self._cache, self._key = settings, cache, key
        self._graph = self._stream = 0
        self._device: list[int] = []
        self._pinned: list[int] = []
        self._events: list[int] = []

    def build(self, path: Path, batch: int, sha256: str, shape: Sequence[int]) -> Json:
        """Build the engine or take it from the cache; what it cost, as a record."""
        self._logger = make_logger(self._trt)
        plan, facts = self._cached(sha256) or self._built(path, sha256)
        start = time.perf_counter_ns()
        try:
            self._open(plan)
        except BuildError:
            if not facts["cached"]:
                raise
            plan, facts = self._built(path, sha256)  # kept by another driver, say
            start = time.perf_counter_ns()
            self._open(plan)
        self._allocate((batch, *shape))
        loaded = time.perf_counter_ns()
        self.run(np.zeros((batch, *shape), np.float32))
        engine, names = self._engine, ("device_memory_size_v2", "device_memory_size")
        memory = next((getattr(engine, name) for name in names if hasattr(engine, name)), None)
        return {
            "build_s": 0.0 if facts["cached"] else facts["build_s"],
            "cached": facts["cached"],
            "load_ns": loaded - start,
            "first_ns": time.perf_counter_ns() - loaded,
            "engine_sha256": facts["sha256"],
            "engine_bytes": len(plan),
            "device_memory_bytes": None if memory is None else int(memory),
            "peak_rss_bytes": peak_rss(),
            "branches": facts["branches"],
            "warnings": self._logger.messages[:20] or facts["warnings"],
        }

    def _folder(self, sha256: str) -> Path:
        request = [sha256, self._key, self._settings._replace(timing_cache="")]
        text = json.dumps(request, sort_keys=True)
        return self._cache / "engines" / hashlib.sha256(text.encode()).hexdigest()

    def _cached(self, sha256: str) -> tuple[bytes, Json] | None:
        folder = self._folder(sha256)
        try:
            facts: Json = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
            plan = (folder / "engine").read_bytes()
        except (OSError, ValueError):
            return None
        if facts.get("sha256") != hashlib.sha256(plan).hexdigest():
            return None
        return plan, dict(facts, cached=True)

    def _built(self, path: Path, sha256: str) -> tuple[bytes, Json]:
        start = time.perf_counter()
        onnx = path.read_bytes()
        plan, branches, warnings = build_engine(self._trt, onnx, self._settings, self._logger)
        facts = {
            "onnx_sha256": sha256, "sha256": hashlib.sha256(plan).hexdigest(),
            "build_s": time.perf_counter() - start, "branches": branches, "warnings": warnings,
            "built_for": self._key,
        }  # fmt: skip
        folder = self._folder(sha256)
        write_whole(folder / "engine", plan)
        write_whole(folder / "engine.json", json.dumps(facts, indent=1).encode())
        return plan, dict(facts, cached=False)

    def _open(self, plan: bytes) -> None:
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError("the engine cannot be loaded: " + "; ".join(self._logger.messages))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BuildError("the engine gets no memory: " + "; ".join(self._logger.messages))

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Find input and output, and give both memory on either side."""
        engine, modes = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == modes.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == modes.OUTPUT]
        shapes = [tuple(engine.get_tensor_shape(name)) for name in inputs + outputs]
        types = {engine.get_tensor_dtype(name) for name in names}
        if len(names) != 2 or shapes[0] != shape or types != {self._trt.DataType.FLOAT}:
            raise BuildError(f"the engine has tensors {names} of shapes {shapes}, not {shape}")
        self._sizes = [4 * int(np.prod(s)) for s in shapes]
        make = self._cuda.make
        self._device = [make("cudaMalloc", ctypes.c_size_t(size)) for size in self._sizes]
        self._pinned = [make("cudaMallocHost", ctypes.c_size_t(size)) for size in self._sizes]
        self._input, self._output = (
            _floats_at(self._pinned[i], shapes[i]) for i in range(len(shapes))
        )
        for name, address in ((inputs[0], self._device[0]), (outputs[0], self._device[1])):
            if not self._context.set_tensor_address(name, address):
                raise BuildError(f"the engine does not take memory for {name}")
        self._stream = make("cudaStreamCreate")
        self._events = [make("cudaEventCreate"), make("cudaEventCreate")]

    def _start(self) -> None:
        """Start the work, one way or the other."""
        if self._graph:
            self._cuda.call("cudaGraphLaunch", self._graph, self._stream)
        elif not self._context.execute_async_v3(self._stream):
            raise RowError("TensorRT did not start: " + "; ".join(self._logger.messages[-3:]))

    def capture(self) -> None:
        """From now on replay the work as a CUDA graph."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self._graph = self._cuda.capture(self._stream, self._start)

    def run(self, images: Floats) -> Floats:
        """Logits ``(B, K)`` of images ``(B, C, H, W)``."""
        self._input[...] = images
        call, (source, target), stream = self._cuda.call, self._device, self._stream
        call("cudaMemcpyAsync", source, self._pinned[0], self._sizes[0], TO_DEVICE, stream)
        self._start()
        call("cudaMemcpyAsync", self._pinned[1], target, self._sizes[1], TO_HOST, stream)
        call("cudaStreamSynchronize", stream)
        return self._output.copy()

    def set_inputs(self, images: Floats) -> None:
        """Take the images that timed inferences cycle through, into pinned memory."""
        pool = rolling(images, len(self._input))
        address = self._cuda.make("cudaMallocHost", ctypes.c_size_t(pool.nbytes))
        self._pinned.append(address)
        _floats_at(address, pool.shape)[...] = pool
        self._slots = [address + i * pool[0].nbytes for i in range(len(images))]

    def time_one(self, slot: int) -> tuple[int, int | None, int | None]:
        """Time the inference of the batch that begins at image ``slot``."""
        call, stream, (first, last) = self._cuda.call, self._stream, self._events
        (source, target), now = self._device, time.perf_counter_ns
        start = now()
        call("cudaMemcpyAsync", source, self._slots[slot], self._sizes[0], TO_DEVICE, stream)
        call("cudaEventRecord", first, stream)
        before = now()
        self._start()
        started = now()
        call("cudaEventRecord", last, stream)
        call("cudaMemcpyAsync", self._pinned[1], target, self._sizes[1], TO_HOST, stream)
        call("cudaStreamSynchronize", stream)
        return now() - start, self._cuda.elapsed_ns(first, last), started - before

    def close(self) -> None:
        """Give everything back."""
        for name, handles in (
            ("cudaGraphExecDestroy", [self._graph]),
            ("cudaEventDestroy", self._events),
            ("cudaFree", self._device),
            ("cudaFreeHost", self._pinned),
            ("cudaStreamDestroy", [self._stream]),
        ):
            for handle in filter(None, handles):
                self._cuda.call(name, handle)
        self._context = self._engine = self._runtime = None
        self._graph = self._stream = 0
        self._events, self._device, self._pinned = [], [], []


def _floats_at(address: int, shape: Sequence[int]) -> Floats:
    """The array ``shape`` that lies at an address."""
    count = int(np.prod(shape))
    memory = (ctypes.c_float * count).from_address(address)
    found: Floats = np.ctypeslib.as_array(memory).reshape(shape)
    return found


# --- gates ----------------------------------------------------------------------------------------


def in_batches(images: NDArray[Any], batch: int) -> Iterator[tuple[int, Floats]]:
    """How many images count, and a batch ``(B, C, H, W)`` in 0..1; the last one is filled up."""
    scale = np.float32(255 if images.dtype == np.uint8 else 1)
    for start in range(0, len(images), batch):
        part = np.asarray(images[start : start + batch], np.float32) / scale
        count = len(part)
        if count < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - count, axis=0)])
        yield count, np.ascontiguousarray(part)


def check_parity(backend: Any, inputs: Floats, torch_logits: Floats, batch: int) -> Json:
    """Compare logits with PyTorch's ``(n, K)``; a record."""
    parts = [backend.run(part)[:count] for count, part in in_batches(inputs, batch)]
    logits = np.concatenate(parts).astype(np.float64)
    if logits.shape != torch_logits.shape:
        raise RowError(f"the graph gives {logits.shape} logits, PyTorch {torch_logits.shape}")
    wanted = torch_logits.astype(np.float64)
    if not np.isfinite(logits).all():
        return {
            "n": len(logits), "max_abs_diff": HUGE, "mean_abs_diff": HUGE, "min_cosine": -1.0,
            "agreement": 0.0,
        }  # fmt: skip
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (logits * wanted).sum(axis=1) / np.maximum(norms, 1e-30)
    return {
        "n": len(logits),
        "max_abs_diff": float(np.abs(logits - wanted).max()),
        "mean_abs_diff": float(np.abs(logits - wanted).mean()),
        "min_cosine": float(cosines.min()),
        "agreement": 100.0 * float((logits.argmax(1) == wanted.argmax(1)).mean()),
    }


def parity_gate(found: Json, precision: Json) -> None:
    """Fail the row whose logits are not PyTorch's.

    Raises:
        RowError: they are not.
    """
    limit = precision["max_abs_diff"]
    if found["max_abs_diff"] >= HUGE:
        raise RowError("logits on the device are not finite", "gate_failed")
    if limit is not None and found["max_abs_diff"] > limit:
        worst = found["max_abs_diff"]
        raise RowError(
            f"a logit differs from PyTorch's by {worst:.3g} (limit {limit:g})", "gate_failed"
        )
    if found["agreement"] < precision["min_agreement"]:
        raise RowError(
            f"{found['agreement']:.2f} % of the classes agree with PyTorch's "
            f"(limit {precision['min_agreement']:g} %)",
            "gate_failed",
        )


def predict(
    backend: Any, images: NDArray[np.uint8], batch: int, progress: Callable[[int], None]
) -> Floats:
    """Logits ``(N, K)`` of the whole test set, by the very object that is timed."""
    parts, done, last = [], 0, time.monotonic()
    for count, part in in_batches(images, batch):
        parts.append(backend.run(part)[:count])
        done += count
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            progress(done)
    return np.concatenate(parts)


def accuracy_record(
    logits: Floats, labels: NDArray[np.int64], torch_classes: NDArray[np.int32], name: str
) -> Json:
    """Accuracy of logits ``(N, K)``; a record."""
    classes, top5 = logits.argmax(1), None
    if logits.shape[1] > 5:
        best = np.argpartition(-logits, 5, axis=1)[:, :5]
        top5 = 100.0 * float((best == labels[:, None]).any(axis=1).mean())
    return {
        "n": len(labels),
        "top1": 100.0 * float((classes == labels).mean()),
        "top5": top5,
        "agreement": 100.0 * float((classes == torch_classes).mean()),
        "classes_file": name,
    }


# --- timing ---------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Nanoseconds of consecutive inferences, in order; without a GPU two lists stay empty.

    ``span`` holds the moments before the first and after the last inference.
    """

    host: list[int]
    gpu: list[int]
    enqueue: list[int]
    span: list[int]


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Python's garbage collector does not run while times are taken."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_window(backend: Any, slots: int, seconds: float, count: int, first_slot: int = 0) -> Times:
    """Time inferences until both minimums are met; every one is kept."""
    times, slot, clock = Times([], [], [], []), first_slot, time.perf_counter_ns
    with collector_off():
        times.span.append(clock())
        end = times.span[0] + round(seconds * 1e9)
        while True:
            host, gpu, enqueue = backend.time_one(slot)
            times.host.append(host)
            if gpu is not None:
                times.gpu.append(gpu)
                times.enqueue.append(enqueue)
            slot = (slot + 1) % slots
            if len(times.host) >= count and clock() >= end:
                times.span.append(clock())
                return times


def timer_overhead() -> int:
    """Median time between two readings of the clock with nothing between, in nanoseconds."""
    now = time.perf_counter_ns
    return int(np.median([-(now() - now()) for _ in range(2001)]))


# --- energy ---------------------------------------------------------------------------------------

INPUT_RAILS = (
    ("VDD_IN",),
    ("VIN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)
"""What together feeds a whole module: Orin Nano and NX, Thor, Nano, AGX Orin, Thor again."""
SAMPLE_MS, TEGRASTATS_MS = 20.0, 100.0


class PowerSource(NamedTuple):
    """Where power can be read: a kind, the names of what is summed, and what the sampler needs."""

    kind: str
    rails: Sequence[str]
    interval_ms: float
    details: Any


def find_power_source(machine: Machine, runtime: Runtime) -> PowerSource | None:
    """The best source of this device, or None."""
    found = _ina_source(machine) or _tegrastats_source(machine)
    if found is None and runtime.cuda is not None and not l4t(machine):
        found = _nvml_source(runtime.cuda)
    if found is None and runtime.cuda is None:
        found = _rapl_source(machine)
    return found


def _ina_source(machine: Machine) -> PowerSource | None:
    rails, interval = {}, SAMPLE_MS
    for monitor in machine.glob("/sys/class/hwmon/hwmon*"):
        if not machine.text(monitor / "name").startswith("ina"):
            continue
        for label in sorted(monitor.glob("in*_label")):
            number = label.name[2:].split("_")[0]
            pair = [monitor / f"in{number}_input", monitor / f"curr{number}_input"]
            if all(machine.number(path) is not None for path in pair):
                rails[machine.text(label)] = [str(path) for path in pair]
                interval = max(interval, float(machine.number(monitor / "update_interval") or 0))
    for names in INPUT_RAILS:
        if all(name in rails for name in names):
            return PowerSource("ina3221", names, interval, [rails[name] for name in names])
    return None


def parse_tegrastats(line: str) -> dict[str, int]:
    """Milliwatts now (not the mean since the start) by rail, of one line of tegrastats."""
    return {name: int(now) for name, now in re.findall(r"(\w+) (\d+)mW(?:/\d+mW)?", line)}


def _tegrastats_source(machine: Machine) -> PowerSource | None:
    program = shutil.which("tegrastats")
    if not program or not l4t(machine):
        return None
    command = [program, "--interval", str(int(TEGRASTATS_MS))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 5.0)[0]
        line = process.stdout.readline().decode("utf-8", "replace") if ready else ""
        process.kill()
    rails = parse_tegrastats(line)
    for names in INPUT_RAILS:
        if all(name in rails for name in names):
            return PowerSource("tegrastats", names, TEGRASTATS_MS, command)
    return None


class Nvml:
    """Power of one NVIDIA GPU through its management library.

    Raises:
        OSError: there is no such library, or it does not know the GPU.
    """

    def __init__(self, bus_id: str) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self._handle))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise OSError(f"{name} failed with {code}")

    def watts(self) -> float:
        """Power now."""
        value = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self._handle, ctypes.byref(value))
        return value.value / 1000


def _nvml_source(cuda: Any) -> PowerSource | None:
    try:
        bus_id = cuda.bus_id()
        Nvml(bus_id).watts()
    except (OSError, AttributeError, CudaError):
        return None
    return PowerSource("nvml", ["GPU board"], SAMPLE_MS, bus_id)


def _rapl_source(machine: Machine) -> PowerSource | None:
    names, details = [], []
    for zone in machine.glob("/sys/class/powercap/intel-rapl:*"):
        name = machine.text(zone / "name")
        largest = machine.number(zone / "max_energy_range_uj")
        if not re.match(r"package|dram", name) or largest is None:
            continue
        if machine.number(zone / "energy_uj") is None:
            return None  # only root may read it
        names.append(name)
        details.append([str(zone / "energy_uj"), largest])
    return PowerSource("rapl", names, SAMPLE_MS, details) if names else None


def counter_step(before: int, after: int, largest: int) -> int:
    """How far a counter went that starts again at zero after ``largest``."""
    return after - before if after >= before else after - before + largest + 1


def sample_power(source: PowerSource, target: Path, stop: Callable[[float], bool]) -> None:
    """Write time and watts, a line each, until ``stop(seconds to wait)`` says so."""
    with contextlib.suppress(OSError):  # not on the core that is measured
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if source.kind == "rapl":
        readings = _rapl_readings(source, stop)
    elif source.kind == "tegrastats":
        readings = _tegrastats_readings(source, stop)
    elif source.kind == "nvml":
        readings = _polled(Nvml(source.details).watts, source, stop)
    else:
        readings = _polled(lambda: _ina_watts(source.details), source, stop)
    with target.open("w", encoding="utf-8") as file:
        file.write("t_ns,watts\n")
        for moment, watts in readings:
            file.write(f"{moment},{watts:.6f}\n")
            file.flush()


def _polled(
    watts: Callable[[], float], source: PowerSource, stop: Callable[[float], bool]
) -> Iterator[tuple[int, float]]:
    """Power that is there to be asked for, at the middle of the asking."""
    while not stop(source.interval_ms / 1000):
        before = time.perf_counter_ns()
        value = watts()
        yield (before + time.perf_counter_ns()) // 2, value


def _ina_watts(pairs: Sequence[tuple[str, str]]) -> float:
    """Millivolts times milliamperes, of all rails."""
    machine = Machine()
    numbers = [[machine.number(Path(path)) or 0 for path in pair] for pair in pairs]
    return sum(millivolts * milliamperes for millivolts, milliamperes in numbers) / 1e6


def _tegrastats_readings(
    source: PowerSource, stop: Callable[[float], bool]
) -> Iterator[tuple[int, float]]:
    with subprocess.Popen(source.details, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            while not stop(0.0):
                if not select.select([process.stdout], [], [], 0.1)[0]:
                    continue
                rails = parse_tegrastats(process.stdout.readline().decode("utf-8", "replace"))
                if all(name in rails for name in source.rails):
                    yield time.perf_counter_ns(), sum(rails[n] for n in source.rails) / 1000
        finally:
            process.kill()


def _rapl_readings(
    source: PowerSource, stop: Callable[[float], bool]
) -> Iterator[tuple[int, float]]:
    """Power between two readings of the counters, at the time between them."""
    machine, before = Machine(), 0
    last: list[int] = []
    while True:
        now = time.perf_counter_ns()
        values = [machine.number(Path(path)) or 0 for path, _ in source.details]
        if last:
            steps = [
                counter_step(last[i], value, source.details[i][1]) for i, value in enumerate(values)
            ]
            yield (before + now) // 2, sum(steps) * 1000 / (now - before)
        before, last = now, values
        if stop(source.interval_ms / 1000):
            return


def until_stdin_ends(seconds: float) -> bool:
    """Wait; True as soon as the parent is gone or wants an end."""
    return bool(select.select([0], [], [], seconds)[0]) and not os.read(0, 1 << 12)


def mean_watts(samples: NDArray[np.float64], start_ns: int, end_ns: int) -> float:
    """Mean power between two moments: trapezoids, the ends interpolated.

    Args:
        samples: Times in ns and watts ``(n, 2)``, in order of time.
        start_ns: First moment; before the first sample power was what that says.
        end_ns: Last moment; after the last sample likewise.
    """
    moments, watts = samples[:, 0], samples[:, 1]
    inside = (moments > start_ns) & (moments < end_ns)
    x = np.concatenate(([start_ns], moments[inside], [end_ns])).astype(np.float64)
    y = np.interp(x, moments, watts)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (end_ns - start_ns))


def read_power(path: Path) -> NDArray[np.float64]:
    """Samples ``(n, 2)`` of a power file; a line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    found = [re.fullmatch(r"(\d+),(-?[\d.]+)", line) for line in lines]
    pairs = [(float(m.group(1)), float(m.group(2))) for m in found if m]
    return np.array(pairs, np.float64).reshape(-1, 2)


# --- the run --------------------------------------------------------------------------------------


class Run:
    """One run: what it was asked for, what it holds, and how it ends."""

    def __init__(
        self, arguments: argparse.Namespace, machine: Machine, trt: Any, cuda: Any
    ) -> None:
        self.args, self.machine = arguments, machine
        self.cache = Path(arguments.cache).expanduser()
        self.events = Events()
        self._given = trt, cuda
        self._lock: int | None = None
        self._sampler: subprocess.Popen[bytes] | None = None
        self._made: Path | None = None
        self._finished = False
        self._hashes: dict[str, str] = {}
        self.allowed: list[str] = []
        self.aborted = ""

    # how it ends

    def clean(self) -> None:
        """Leave nothing behind: no process, no lock, no unfinished results."""
        with contextlib.suppress(OSError):
            self.events.close()
        if self._sampler is not None:
            self._sampler.kill()
        if self._made is not None and not self._finished:
            for _ in range(3):  # the main thread may still be writing
                shutil.rmtree(str(self._made), ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def die(self, reason: str) -> None:
        """End the process at once, from any thread, unless it is ending anyway."""
        if self._finished:
            return
        self.clean()
        line = self.events.keep("end", status="aborted", reason=reason)
        with contextlib.suppress(OSError):  # the pipe may be full, with nobody reading
            if select.select([], [1], [], 0.2)[1]:
                os.write(1, line.encode())
        os._exit(STOPPED)

    def refuse(self, refusals: Sequence[Refusal]) -> int:
        """Say why nothing is measured."""
        for refusal in refusals:
            self.events.say("refused", **refusal._asdict())
        self.events.say("end", status="refused")
        self.clean()
        return REFUSED

    def go(self) -> int:
        """Do everything; the exit status."""
        self.events.say("start", runner=file_sha256(Path(__file__))[:12], pid=os.getpid())
        try:
            return self._probe_only() if self.args.probe else self._measure()
        except RefusedError as error:
            return self.refuse(error.refusals)
        except Exception as error:
            self.clean()
            if isinstance(error, BrokenPipeError):  # nobody listens; what is left goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return STOPPED
            if not isinstance(error, OSError):
                traceback.print_exc()
            self.events.say("end", status="aborted", reason=f"{type(error).__name__}: {error}")
            return STOPPED

    # before measuring

    def _probe_only(self) -> int:
        self.bundle = Bundle(Path(self.args.bundle), self.args.expect_id)
        refusals = self._look()
        if refusals:
            return self.refuse(refusals)
        self.events.say("end", status="ok")
        return OK

    def _look(self) -> list[Refusal]:
        """Probe the device; what keeps it from measuring and was not waived."""
        kind, missing = self.bundle.spec["target"]["runtime"], []
        try:
            self.runtime = load_runtime(kind, *self._given)
            self.before = probe(self.machine, self.runtime, self.bundle.folder)
        except RefusedError as error:
            missing = list(error.refusals)
            self.runtime = Runtime(kind, None, "", None)
            self.before = probe(self.machine, self.runtime, self.bundle.folder)
        self.events.say("probe", probe=self.before)
        requires = self.bundle.spec["requires"]
        found = unmet(requires, self.before, self._protocol()["abort_above_c"])
        places = [self.bundle.folder, self.cache, *([Path(self.args.out)] if self.args.out else [])]
        found += unmet_disk(places, max(requires["free_disk_mb"], self._disk_needed_mb()))
        if missing:  # without it nothing is known of the GPU
            found = [refusal for refusal in found if refusal.code != "compute_capability"]
        waived = {code for code in self.args.allow if code in WAIVABLE}
        self.allowed = sorted({refusal.code for refusal in found} & waived)
        return missing + [refusal for refusal in found if refusal.code not in waived]

    def _disk_needed_mb(self) -> int:
        """For engines, samples and classes."""
        graphs = [self.bundle.folder / entry["path"] for entry in self.bundle.spec["graphs"]]
        size: int = sum(path.stat().st_size for path in graphs if path.is_file())
        return SPARE_DISK_MB + size // MIB

    def _protocol(self) -> Json:
        return dict(self.bundle.spec["quick" if self.args.quick else "protocol"])

    def _take_lock(self) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(str(self.cache / "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 200).decode("utf-8", "replace").strip()
            raise RefusedError(
                Refusal(
                    "busy",
                    f"another measurement runs on this device ({holder or 'just started'})",
                    "wait for it to end, or kill that process",
                    [holder],
                )
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"pid {os.getpid()} since {utc()}\n".encode())

    def _prepare(self) -> None:
        """Everything that can refuse, before anything is measured."""
        self._take_lock()
        self.bundle = Bundle(Path(self.args.bundle), self.args.expect_id)
        refusals = self._look()
        if refusals:
            raise RefusedError(*refusals)
        files = self.bundle.verify()
        spec = self.bundle.spec
        self.protocol = self._protocol()
        self._choose(spec)
        shape, classes = spec["image_shape"], spec["num_classes"]
        self.inputs = self.bundle.array("parity/inputs.npy", np.float32, [None, *shape])
        n = len(self.inputs)
        self.logits = self.bundle.array("parity/logits.npy", np.float32, [n, classes])
        self.tests = None
        if self.args.test_set:
            self.tests = load_test_set(Path(self.args.test_set), spec)
            n = len(self.tests.labels)
            self.torch_classes = self.bundle.array("parity/classes.npy", np.int32, [n])
        self._make_out()
        self.events.say("verify", files=files, bundle_id=self.bundle.id, images=n)

    def _choose(self, spec: Json) -> None:
        """Precisions, threads and cores, checked."""
        known = [precision["name"] for precision in spec["precisions"]]
        unknown = [name for name in self.args.precision if name not in known]
        if unknown:
            message = f"the bundle has no precision {unknown[0]!r}"
            raise RefusedError(Refusal("precision", message, "name one of the bundle's", known))
        self.threads = self.args.threads or spec["target"]["threads"]
        self.affinity = self.args.affinity or list(spec["target"]["affinity"])
        here = sorted(os.sched_getaffinity(0))
        if set(self.affinity) - set(here):
            message = f"cores {self.affinity} are not all there"
            raise RefusedError(Refusal("affinity", message, "name others", [str(c) for c in here]))

    def _make_out(self) -> None:
        out = Path(self.args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RefusedError(Refusal("out", f"{out} is not empty", "name a new folder"))
        out.mkdir(parents=True, exist_ok=True)
        self.out = self._made = out
        self.events.open(out / "events.jsonl")

    # measuring

    def _measure(self) -> int:
        self._prepare()
        started, rows = utc(), []
        if self.affinity:
            os.sched_setaffinity(0, self.affinity)
        try:
            for row in self._rows():
                rows.append(row)
            if self.protocol["energy_active_s"] and not self.args.no_energy:
                self._energy_pass(rows)
        except StopError as error:
            self.aborted = str(error)
        known = self.before["gpu_processes"]
        after = probe(self.machine, self.runtime, self.bundle.folder, known)
        self.events.say("reprobe", probe=after)
        return self._finish(started, after, rows)

    def _finish(self, started: str, after: Json, rows: list[Json]) -> int:
        """Write the record, which makes the results valid, and say how it went."""
        failed = [row["status"] for row in rows if row["status"] != "ok"]
        status = "aborted" if self.aborted else "gate_failed" if failed else "ok"
        line = self.events.keep("end", status=status, reason=self.aborted, rows=len(rows))
        self.events.close()
        self._hashes["events.jsonl"] = file_sha256(self.out / "events.jsonl")
        record = {
            "schema": SCHEMA, "bundle_id": self.bundle.id,
            "runner_sha256": file_sha256(Path(__file__)), "protocol": self.protocol["name"],
            "threads": self.threads, "affinity": self.affinity, "started_utc": started,
            "ended_utc": utc(), "allowed": self.allowed, "before": self.before, "after": after,
            "rows": rows, "files": self._hashes, "aborted": self.aborted,
        }  # fmt: skip
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(self.out / "result.json", text.encode())
        self._finished = True
        sys.stdout.write(line)
        sys.stdout.flush()
        self.clean()
        return STOPPED if self.aborted else ROW_FAILED if failed else OK

    def _wanted(self) -> Iterator[tuple[Json, int, str]]:
        """Every graph to measure: its precision, batch and scenario."""
        for precision in self.bundle.spec["precisions"]:
            if self.args.precision and precision["name"] not in self.args.precision:
                continue
            for number, batch in enumerate(self.bundle.spec["batches"]):
                yield precision, batch, "sweep" if number else "single_stream"

    def _rows(self) -> Iterator[Json]:
        for precision, batch, scenario in self._wanted():
            row = self._new_row(precision, batch, scenario)
            backend = self._backend(precision)
            try:
                yield self._guarded(row, backend, precision)
                graph = self.protocol["cuda_graph"] and self.runtime.kind == "tensorrt"
                if row["status"] == "ok" and graph and scenario == "single_stream":
                    again = self._new_row(precision, batch, scenario, cuda_graph=True)
                    again["build"] = row["build"]
                    yield self._guarded(again, backend, precision)
            finally:
                with contextlib.suppress(Exception):
                    backend.close()

    def _new_row(
        self, precision: Json, batch: int, scenario: str, cuda_graph: bool = False
    ) -> Json:
        name = f"{precision['name']}-b{batch}" + ("-graph" if cuda_graph else "")
        return {
            "id": name, "precision": precision["name"], "batch": batch, "scenario": scenario,
            "cuda_graph": cuda_graph, "status": "ok", "reason": "",
            "graph_sha256": self.bundle.graph(precision["name"], batch)["sha256"], "build": None,
            "parity": None, "accuracy": None, "samples": None, "energy": None,
        }  # fmt: skip

    def _guarded(self, row: Json, backend: Any, precision: Json) -> Json:
        """Do one row; what goes wrong with it alone is written into it."""
        try:
            self._measure_row(row, backend, precision)
        except RowError as error:
            row.update(status=error.status, reason=str(error))
        except (StopError, OSError):
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no base class
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            row.update(status="failed", reason=reason[:1000])
        self.events.say("row", row=row)
        return row

    def _backend(self, precision: Json) -> Any:
        if self.runtime.kind == "onnxruntime":
            return OnnxRuntimeBackend(self.runtime, self.threads)
        target, gpu = self.bundle.spec["target"], self.before["gpu"]
        name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{self.runtime.version}-{gpu}")
        settings = BuildSettings(
            graph=precision["graph"],
            weak_fp16=precision["weak_fp16"],
            tf32=target["tf32"],
            workspace_mb=target["workspace_mb"],
            opset=target["opset"],
            timing_cache=str(self.cache / "timing" / f"{name}.cache"),
        )
        key = {
            "tensorrt": self.runtime.version,
            "gpu": gpu,
            "cc": self.before["compute_capability"],
        }
        return TensorRTBackend(self.runtime, settings, self.cache, key)

    def _build(self, row: Json, backend: Any) -> None:
        entry = self.bundle.graph(row["precision"], row["batch"])
        path = self.bundle.folder / entry["path"]
        shape = self.bundle.spec["image_shape"]
        self.events.say("build", id=row["id"], precision=row["precision"], batch=row["batch"])
        try:
            row["build"] = backend.build(path, row["batch"], entry["sha256"], shape)
        except BuildError as error:
            raise RowError(str(error)) from error

    def _measure_row(self, row: Json, backend: Any, precision: Json) -> None:
        """Build, gates, then time; fills the row."""
        if row["build"] is None:
            self._build(row, backend)
        if row["cuda_graph"]:
            backend.capture()
        self._gates(row, backend, precision)
        self._settle(row)
        row["samples"] = self._time(row, backend)

    def _gates(self, row: Json, backend: Any, precision: Json) -> None:
        n = min(self.protocol["parity_images"], len(self.inputs))
        row["parity"] = check_parity(backend, self.inputs[:n], self.logits[:n], row["batch"])
        self.events.say("parity", id=row["id"], **row["parity"])
        parity_gate(row["parity"], precision)
        if self.tests is None or row["scenario"] == "sweep":
            return
        total = len(self.tests.labels)

        def progress(done: int) -> None:
            self.events.say("accuracy_progress", id=row["id"], done=done, of=total)

        logits = predict(backend, self.tests.images, row["batch"], progress)
        name = f"{row['id']}-classes.npy"
        self._save(name, logits.argmax(1).astype(np.int32))
        found = accuracy_record(logits, self.tests.labels, self.torch_classes, name)
        row["accuracy"] = found
        self.events.say("accuracy", id=row["id"], **found)
        lost = self.bundle.spec["torch_top1"] - found["top1"]
        if not np.isfinite(logits).all():
            raise RowError("logits of the test set are not finite", "gate_failed")
        if lost > precision["max_drop"]:
            raise RowError(
                f"top-1 on the device is {found['top1']:.2f} %, {lost:.2f} points below PyTorch's "
                f"(limit {precision['max_drop']:g})",
                "gate_failed",
            )

    def _settle(self, row: Json) -> None:
        """Rest, and wait until no sensor is too hot."""
        rest, limit = self.protocol["settle_s"], self.protocol["start_below_c"]
        start = time.monotonic()
        time.sleep(rest)
        heat = hottest(temperatures(self.machine))
        while limit and heat and heat[1] > limit and time.monotonic() - start < 5 * rest:
            time.sleep(min(1.0, rest))
            heat = hottest(temperatures(self.machine))
        waited = time.monotonic() - start
        known = {"sensor": heat[0], "hottest_c": heat[1]} if heat else {}
        self.events.say("settle", id=row["id"], s=round(waited, 3), **known)
        if limit and heat and heat[1] > limit and rest and not self._waived("thermal"):
            raise RowError(
                f"sensor {heat[0]} is still at {heat[1]:.1f} C after {waited:.0f} s of rest "
                f"(limit {limit:g} C); cool the device, or pass --allow thermal"
            )

    def _waived(self, code: str) -> bool:
        """Whether this may be ignored; the record says that it was."""
        if code in self.args.allow:
            self.allowed = sorted({*self.allowed, code})
        return code in self.args.allow

    def _not_too_hot(self) -> None:
        limit, heat = self.protocol["abort_above_c"], hottest(temperatures(self.machine))
        if limit and heat and heat[1] > limit and not self._waived("thermal"):
            raise StopError(f"sensor {heat[0]} is at {heat[1]:.1f} C, above {limit:g} C")

    def _time(self, row: Json, backend: Any) -> Json:
        """Warm up, then time all windows; a record of where the samples lie."""
        protocol, sweep = self.protocol, row["scenario"] == "sweep"
        slots = min(protocol["distinct_inputs"], len(self.inputs))
        backend.set_inputs(self.inputs[:slots])
        start = time.monotonic()
        warm = time_window(backend, slots, protocol["warmup_s"], max(1, protocol["warmup_runs"]))
        warmed = time.monotonic() - start
        self.events.say("warmup", id=row["id"], runs=len(warm.host), s=round(warmed, 3))
        seconds = protocol["sweep_duration_s"] if sweep else protocol["min_duration_s"]
        windows: list[Times] = []
        for number in range(1 if sweep else protocol["windows"]):
            self._not_too_hot()
            if number:
                time.sleep(protocol["cooldown_s"])
            first = sum(len(window.host) for window in windows) % slots
            windows.append(time_window(backend, slots, seconds, protocol["min_samples"], first))
            self._say_window(row, windows, 1 if sweep else protocol["windows"])
        files = {}
        for kind in ("host", "gpu", "enqueue"):
            samples = [value for window in windows for value in getattr(window, kind)]
            name = f"{row['id']}-{kind}_ns.npy" if samples else None
            files[f"{kind}_file"] = name
            if name:
                self._save(name, np.array(samples, np.int64))
        return {
            **files,
            "window_sizes": [len(window.host) for window in windows],
            "timer_overhead_ns": timer_overhead(),
            "warmup_runs": len(warm.host),
            "warmup_s": warmed,
            "scope": backend.scope,
        }

    def _say_window(self, row: Json, windows: list[Times], total: int) -> None:
        times = windows[-1].host
        self.events.say(
            "window", id=row["id"], precision=row["precision"], batch=row["batch"],
            cuda_graph=row["cuda_graph"], number=len(windows), of=total, n=len(times),
            p50_ms=float(np.median(times)) / 1e6,
        )  # fmt: skip

    def _save(self, name: str, array: NDArray[Any]) -> None:
        np.save(str(self.out / name), array, allow_pickle=False)
        self._hashes[name] = file_sha256(self.out / name)

    # energy

    def _energy_pass(self, rows: list[Json]) -> None:
        """Once more with power sampled, which costs time and so is not part of the timing."""
        source = find_power_source(self.machine, self.runtime)
        if source is None:
            self.events.say("energy", source=None, reason="power cannot be read on this device")
            return
        chosen = {precision["name"]: precision for precision in self.bundle.spec["precisions"]}
        for row in rows:
            if row["status"] != "ok" or row["scenario"] == "sweep":
                continue
            self._not_too_hot()
            backend = self._backend(chosen[row["precision"]])
            try:
                entry = self.bundle.graph(row["precision"], row["batch"])
                path, shape = self.bundle.folder / entry["path"], self.bundle.spec["image_shape"]
                backend.build(path, row["batch"], entry["sha256"], shape)
                if row["cuda_graph"]:
                    backend.capture()
                row["energy"] = self._energy(row, backend, source)
            finally:
                backend.close()
            self.events.say("energy", id=row["id"], **(row["energy"] or {"source": None}))

    def _energy(self, row: Json, backend: Any, source: PowerSource) -> Json | None:
        """Idle, then busy, with a process beside that samples power; a record."""
        protocol, name = self.protocol, f"{row['id']}-power.csv"
        slots = min(protocol["distinct_inputs"], len(self.inputs))
        backend.set_inputs(self.inputs[:slots])
        time_window(backend, slots, protocol["warmup_s"], max(1, protocol["warmup_runs"]))
        with self._sampling(source, self.out / name):
            self._say_energy(row, "idle")
            idle = [time.perf_counter_ns()]
            time.sleep(protocol["energy_idle_s"])
            idle.append(time.perf_counter_ns())
            self._say_energy(row, "active")
            times, _, _, (start, end) = time_window(backend, slots, protocol["energy_active_s"], 1)
            time.sleep(3 * source.interval_ms / 1000)  # a sample after the last inference
        samples = read_power(self.out / name)
        resting = samples[samples[:, 0] <= idle[1]]
        count = int(((samples[:, 0] >= start) & (samples[:, 0] <= end)).sum())
        if count < 2 or not len(resting):
            (self.out / name).unlink()
            return None
        self._hashes[name] = file_sha256(self.out / name)
        idle_w, active_w = mean_watts(resting, *idle), mean_watts(samples, start, end)
        each_ms = (end - start) / 1e6 / len(times)
        return {
            "source": source.kind, "rails": list(source.rails), "interval_ms": source.interval_ms,
            "samples": count, "idle_w": idle_w, "active_w": active_w, "inferences": len(times),
            "gross_mj": active_w * each_ms, "net_mj": (active_w - idle_w) * each_ms,
            "p50_ns": int(np.median(times)), "power_file": name,
        }  # fmt: skip

    def _say_energy(self, row: Json, part: str) -> None:
        seconds = self.protocol[f"energy_{part}_s"]
        self.events.say("energy_progress", id=row["id"], part=part, s=seconds)

    @contextlib.contextmanager
    def _sampling(self, source: PowerSource, path: Path) -> Iterator[None]:
        """Run this file as a second process that samples power."""
        command = [sys.executable, str(Path(__file__).resolve()), "--sample-power"]
        self._sampler = subprocess.Popen(
            [*command, json.dumps(source), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 10
            while not (path.exists() and path.read_bytes().count(b"\n") > 1):
                if self._sampler.poll() is not None or time.monotonic() > until:
                    break
                time.sleep(0.02)
            yield
        finally:
            sampler, self._sampler = self._sampler, None
            assert sampler.stdin is not None
            sampler.stdin.close()
            try:
                sampler.wait(timeout=5)
            except subprocess.TimeoutExpired:
                sampler.kill()
                sampler.wait()


def watch(run: Run, with_stdin: bool) -> None:
    """End the run at once on a signal, or when standard input ends: also during long calls."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda *_: None)

    def wait() -> None:
        watched = [reader, 0] if with_stdin else [reader]
        while True:
            ready = select.select(watched, [], [])[0]
            if reader in ready:
                run.die(f"stopped by {signal.Signals(os.read(reader, 1)[0]).name}")
                continue
            with contextlib.suppress(OSError):
                if os.read(0, 1 << 12):
                    continue
            run.die("standard input ended: the link is lost")

    threading.Thread(target=wait, daemon=True).start()


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Measure a bundle on this device.")
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("--out", help="folder for the results; must be empty or absent")
    parser.add_argument("--test-set", help="folder with images.npy and labels.npy")
    parser.add_argument("--cache", default="~/.cache/smskd-bench", help="engines, and the lock")
    parser.add_argument("--quick", action="store_true", help="shortened; good for no claim")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the runtime")
    parser.add_argument(
        "--affinity", type=lambda text: [int(core) for core in text.split(",")], default=[],
        help="cores to run on, as 0,1",
    )  # fmt: skip
    parser.add_argument("--precision", action="append", default=[], help="only this one; repeat")
    parser.add_argument("--allow", action="append", default=[], help="waive a requirement by code")
    parser.add_argument("--no-energy", action="store_true", help="leave the energy pass out")
    parser.add_argument("--probe", action="store_true", help="only look at the device")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop when stdin ends")
    parser.add_argument("--expect-id", default="", help="refuse any other bundle")
    arguments = parser.parse_args(list(argv))
    if not arguments.probe and not arguments.out:
        parser.error("--out is needed")
    return arguments


def main(
    argv: Sequence[str], *, root: str = "/", trt: Any = None, cuda: Any = None, alone: bool = False
) -> int:
    """Run the command line.

    Args:
        argv: Arguments.
        root: Where the system's files are looked for.
        trt: A module to use for ``tensorrt``.
        cuda: What to use for :class:`Cuda`.
        alone: Whether this process does nothing else, so that signals may end it at once.
    """
    if list(argv[:1]) == ["--sample-power"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of standard input stops it
        sample_power(PowerSource(*json.loads(argv[1])), Path(argv[2]), until_stdin_ends)
        return OK
    arguments = parse_arguments(argv)
    run = Run(arguments, Machine(root), trt, cuda)
    if alone:
        watch(run, arguments.stop_with_stdin)
    return run.go()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], alone=True))
