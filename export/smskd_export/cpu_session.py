"""Run a graph on the CPU through ONNX Runtime, for checks; the runner on the device times it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from smskd.errors import ExportError

Floats = NDArray[np.float32]

_ERRORS_ONLY = 3


class CpuSession:
    """An ONNX Runtime session with exactly ``threads`` threads, operators one after the other.

    Attributes:
        batch: The batch size of the graph.
    """

    def __init__(self, path: Path, threads: int = 1, as_written: bool = False) -> None:
        """Load ``path``.

        Args:
            path: The ONNX file.
            threads: Of the runtime.
            as_written: Compute quantised layers as the graph says, by rounding and multiplying in
                floating point, and not by this processor's integer kernels: without VNNI those let
                8-bit products overflow, which says nothing about another device.

        Raises:
            ExportError: ONNX Runtime cannot load the graph.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        if as_written:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base class of their own
            raise ExportError(f"ONNX Runtime cannot load {path.name}: {error}") from error
        port = self._session.get_inputs()[0]
        self._input = port.name
        self.batch: int = port.shape[0]

    def run(self, images: Floats) -> Floats:
        """Map images ``(B, C, H, W)`` in 0..1 to logits ``(B, K)``; several threads may call it."""
        logits: Floats = self._session.run(None, {self._input: images})[0]
        return logits
