"""``smskd-bench doctor``: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console

from smskd.datasets import DATASETS, load_dataset
from smskd.errors import MissingDataError, SmskdError
from smskd_bench.environment import machine
from smskd_bench.store import Store
from smskd_bench.tracking import login_state

Verdict = Literal["ok", "optional", "problem"]

REQUIRED = ("torch", "numpy", "safetensors", "pydantic", "PyYAML", "scikit-learn", "wandb",
            "onnx", "onnxscript", "onnxruntime")  # fmt: skip
OPTIONAL = {
    "torchvision": "pip install 'smskd-bench[vision]'",
    "ray": "pip install 'smskd-bench[ray]' (many machines)",
    "tensorrt": "pip install 'smskd-bench[tensorrt]' (needs an NVIDIA GPU)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` is a command or a sentence."""

    what: str
    verdict: Verdict
    detail: str
    mend: str = ""


def examine(store: Path, data_root: Path | None) -> Iterator[Finding]:
    """Look at packages, devices, data, tracking and the store; nothing is changed."""
    here = machine()
    yield Finding(
        "machine", "ok",
        f"{here['processor']}, {here['cores']} cores, {here['memory_gib']} GiB, "
        f"{here['system']}, Python {here['python']}",
    )  # fmt: skip
    yield from _packages()
    yield _devices()
    yield from _datasets(data_root)
    yield _tracking()
    yield _store(store)


def report(store: Path, data_root: Path | None, console: Console) -> int:
    """Print the findings; returns 0, or 3 if something needed is missing."""
    marks = {"ok": "ok     ", "optional": "-      ", "problem": "PROBLEM"}
    worst = 0
    for found in examine(store, data_root):
        line = f"{marks[found.verdict]} {found.what:<14} {found.detail}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        if found.mend:
            console.print(f"{'':23}-> {found.mend}", highlight=False, markup=False, soft_wrap=True)
        worst = 3 if found.verdict == "problem" else worst
    return worst


def _packages() -> Iterator[Finding]:
    for name in REQUIRED:
        version = _version(name)
        if version is None:
            yield Finding(name, "problem", "not installed", f"pip install {name}")
        else:
            yield Finding(name, "ok", version)
    for name, mend in OPTIONAL.items():
        version = _version(name)
        found = version or "not installed (optional)"
        yield Finding(name, "ok" if version else "optional", found, "" if version else mend)


def _devices() -> Finding:
    import torch

    threads = f"CPU with {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but sees none" if built else "torch is a CPU build"
        return Finding("devices", "ok", f"{threads}; no GPU: {why}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("devices", "ok", f"{', '.join(names)}; {threads}")


def _datasets(data_root: Path | None) -> Iterator[Finding]:
    for name in DATASETS:
        try:
            data = load_dataset(name, data_root)
        except MissingDataError as error:
            mend = f"smskd-bench fetch {name} --data-root DIR, or point SMSKD_DATA to the files"
            yield Finding(f"data {name}", "optional", error.message, mend)
        except SmskdError as error:
            yield Finding(f"data {name}", "problem", error.message, error.hint)
        else:
            count = f"{len(data.train.labels):,} training, {len(data.test.labels):,} test images"
            yield Finding(f"data {name}", "ok", count)


def _tracking() -> Finding:
    try:
        state = login_state()
    except SmskdError as error:
        return Finding("tracking", "problem", error.message, error.hint)
    return Finding("tracking", "ok", f"W&B {state.mode}: {state.reason}")


def _store(root: Path) -> Finding:
    try:
        store = Store.peek(root)
    except SmskdError as error:
        return Finding("store", "problem", error.message, error.hint)
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        mend = "choose another folder with --store DIR or SMSKD_STORE"
        return Finding("store", "problem", f"{root} cannot be written", mend)
    free = shutil.disk_usage(existing).free / 2**30
    done = sum(store.is_done(key) for key in store.stage_keys())
    return Finding("store", "ok", f"{root}: {done} finished stage runs, {free:.0f} GiB free")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
