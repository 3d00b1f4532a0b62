"""The optional path through NVIDIA Model Optimizer (extra ``modelopt``), for signed graphs.

Model Optimizer brings its own ONNX Runtime, so give it an environment of its own. It needs opset 19
and so cannot serve JetPack 5 and 6.0. It leaves products of a matrix with one vector, such as the
last layer at batch size 1, in floating point.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from smskd.errors import ConfigError, ExportError
from smskd_export.calibration import quiet
from smskd_export.onnx_graph import remove_notes
from smskd_export.quantise import check_quantised
from smskd_export.targets import Calibration, Precision

_METHODS = {"minmax": "max", "entropy": "entropy"}


def quantise_with_modelopt(
    proto: Any, precision: Precision, calibration: Calibration, images: NDArray[np.uint8]
) -> Any:
    """The quantised form of a graph in float32.

    Args:
        proto: A checked ``ModelProto``; it is left as it is.
        precision: Must be a signed one.
        calibration: Says the method: minmax or entropy.
        images: Training images, uint8 ``(n, C, H, W)``.

    Raises:
        ConfigError: Model Optimizer is missing, or has no such method or variant.
        ExportError: it fails.
    """
    if precision.graph != "int8_signed" or calibration.method not in _METHODS:
        raise ConfigError(
            f"Model Optimizer makes no {precision.graph} graph by {calibration.method}",
            "use int8_signed with minmax or entropy, or quantiser: onnxruntime",
        )
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise ConfigError(
            f"quantiser modelopt needs NVIDIA Model Optimizer: {error}",
            "in an environment of its own: pip install 'smskd-bench[modelopt]'",
        ) from None
    with tempfile.TemporaryDirectory(prefix="smskd-modelopt-") as folder:
        plain, done = Path(folder) / "graph.onnx", Path(folder) / "quantised.onnx"
        onnx.save(proto, plain)
        try:
            with quiet():
                quantize(
                    onnx_path=str(plain),
                    output_path=str(done),
                    quantize_mode="int8",
                    calibration_data={proto.graph.input[0].name: images.astype(np.float32) / 255},
                    calibration_method=_METHODS[calibration.method],
                    calibration_eps=["cpu"],
                    high_precision_dtype=precision.residue,
                )
            quantised = onnx.load(done)
        except Exception as error:  # its errors have no class of their own
            raise ExportError(f"Model Optimizer cannot quantise the graph: {error}") from error
    remove_notes(quantised)
    check_quantised(quantised, signed=True, every_layer=False)
    return quantised
