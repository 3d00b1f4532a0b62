"""Does a real TensorRT read and build this graph? Asked on the exporting machine, GPU or not.

TensorRT itself builds only where a GPU is. TensorRT for RTX shares the parser and most of the
builder and builds ahead of time without a GPU, for GPUs of its own list: it proves that a graph is
one that TensorRT understands, not how fast it is, and not that a Jetson will build the same engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from smskd.errors import ExportError
from smskd_export.runner.run import BuildError, BuildSettings, build_engine, make_logger
from smskd_export.targets import Precision, Target

FULL, RTX = "tensorrt", "tensorrt_rtx_bindings"
INSTALL = "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"


@dataclass(frozen=True)
class TensorRtCheck:
    """What a TensorRT on this machine said of one graph.

    Attributes:
        module: Which one was asked; empty if there is none here.
        version: Its version.
        parsed: Whether it reads the graph; None if it was not asked.
        built: Whether it builds the graph; None if it was not asked.
        seconds: Of reading and building.
        engine_bytes: Size of the engine; 0 without one.
        message: In words; the reason, if it was not asked or not built.
    """

    module: str
    version: str
    parsed: bool | None
    built: bool | None
    seconds: float
    engine_bytes: int
    message: str


def find_tensorrt() -> tuple[str, Any]:
    """Name and module of a TensorRT that can build on this machine; ("", None) without one."""
    for name in (FULL, RTX):
        try:
            module = import_module(name)
            module.Builder(make_logger(module)).create_builder_config()
        except Exception:  # without libraries or GPU it fails in every way there is
            continue
        return name, module
    return "", None


def check_with_tensorrt(path: Path, precision: Precision, target: Target) -> TensorRtCheck:
    """Let a TensorRT on this machine read and build a graph, by the code that devices run.

    Args:
        path: The ONNX file.
        precision: What it computes in.
        target: What it was made for.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        onnx = path.read_bytes()
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}") from error
    name, module = find_tensorrt()
    if module is None:
        return TensorRtCheck(
            "", "", None, None, 0.0, 0, f"not checked: no TensorRT here; {INSTALL}"
        )
    settings = BuildSettings(
        graph=precision.graph,
        weak_fp16=precision.weak_fp16,
        tf32=target.tf32,
        workspace_mb=target.workspace_mb,
        opset=target.opset,
    )
    return _asked(name, module, onnx, settings)


def _asked(name: str, module: Any, onnx: bytes, settings: BuildSettings) -> TensorRtCheck:
    version, start = str(module.__version__), time.perf_counter()
    try:
        engine, branches, _ = build_engine(module, onnx, settings)
    except BuildError as error:
        seconds = time.perf_counter() - start
        return TensorRtCheck(name, version, error.parsed, False, seconds, 0, str(error))
    seconds = time.perf_counter() - start
    message = f"read and built ({', '.join(branches)})"
    return TensorRtCheck(name, version, True, True, seconds, len(engine), message)
