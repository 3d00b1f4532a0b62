"""What a number depends on besides its specification: code, packages, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "smskd-bench", "torch", "torchvision", "timm", "numpy", "safetensors", "pydantic", "wandb",
    "onnx", "onnxruntime",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter; None for one that is missing."""
    return {name: _version(name) for name in PACKAGES}


@lru_cache(maxsize=1)
def code_revision() -> dict[str, Any]:
    """Git revision of the checkout this code runs from, and whether it was changed since.

    Both are None when the package runs from an installed wheel.
    """
    here = Path(__file__).resolve()
    root = here.parents[2]
    # A copy inside somebody else's repository would otherwise take on that one's revision.
    ours = (root / ".git").exists() and _git(here.parent, "ls-files", "--error-unmatch", here.name)
    revision = _git(root, "rev-parse", "HEAD")
    if not ours or revision is None:
        return {"revision": None, "dirty": None}
    status = _git(root, "status", "--porcelain", "--", "smskd", "bench", "export")
    return {"revision": revision, "dirty": bool(status)}


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; no host or user name."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """The processor's marketing name where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Human name of a torch device string."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
