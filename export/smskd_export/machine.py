"""What ran: the processor, the system, and the versions of everything that shapes a number."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from smskd._version import __version__

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Machine:
    """The machine that exported, and timed what was timed.

    Attributes:
        cpu: Name of the processor.
        arch: Instruction set, e.g. "x86_64".
        cores: Logical cores of the machine.
        usable_cores: Cores this process may run on.
        os: Name and release of the system.
        python: Version of Python.
        load_1min: Runnable processes, averaged over the last minute; None where unknown.
    """

    cpu: str
    arch: str
    cores: int
    usable_cores: int
    os: str
    python: str
    load_1min: float | None


def describe_machine() -> Machine:
    """Describe this machine as it is now."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Machine(
        cpu=_cpu_name(Path("/proc/cpuinfo")),
        arch=platform.machine(),
        cores=cores,
        usable_cores=usable,
        os=platform.platform(),
        python=platform.python_version(),
        load_1min=load,
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that make and run the graph, and of this project."""
    return {"smskd-bench": __version__, **{name: version(name) for name in _PACKAGES}}


def _cpu_name(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    # ARM kernels give no "model name"; a Jetson names its board under "Model" if at all.
    return names.get("model name") or names.get("Model") or platform.processor() or "unknown"
