"""Explicit quantisation: QuantizeLinear and DequantizeLinear where int8 begins and ends.

Two variants, because the runtimes want different ones:

``int8_signed`` for TensorRT: everything symmetric with zero points of zero, weights with a scale
for each output channel, biases left alone, and outputs left for the next layer to quantise. Of the
two inputs of a residual sum the one that a convolution gives stays as it is, so that TensorRT can
add inside the convolution.

``int8_unsigned`` for ONNX Runtime on CPUs: activations in uint8 with a zero point, everything from
input to output of a block in int8, so that it finds its integer kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType

from smskd.errors import ExportError
from smskd_export.calibration import observe, quiet
from smskd_export.onnx_graph import remove_notes
from smskd_export.targets import Calibration

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SIGNED = (*_LAYERS, "Add", "GlobalAveragePool", "AveragePool")
_UNSIGNED = (*_SIGNED, "MaxPool", "Relu", "Clip")
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_INT8, _UINT8, _INT32 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32


class Ranges:
    """What the activations of one student were seen to be, for its graphs of every batch size.

    Args:
        proto: One of the graphs.
        images: Calibration images, uint8 ``(n, C, H, W)``.
        calibration: Says the method.

    Raises:
        ExportError: the graph does not run.
    """

    def __init__(self, proto: Any, images: NDArray[np.uint8], calibration: Calibration) -> None:
        self.data = observe(_with_shapes(proto), images, calibration, _UNSIGNED)


def quantise(proto: Any, ranges: Ranges, *, signed: bool, reduce_range: bool = False) -> Any:
    """Quantise a graph; what is left in floating point stays in the graph's own type.

    Args:
        proto: A checked ``ModelProto``; it is left as it is.
        ranges: Of the same student.
        signed: The variant for TensorRT; else that for ONNX Runtime.
        reduce_range: Use 7 bits of the weights.

    Returns:
        The quantised graph, checked by :func:`check_quantised`.

    Raises:
        ExportError: it cannot be quantised, or breaks a rule of its variant.
    """
    operators = _SIGNED if signed else _UNSIGNED
    shaped = _with_shapes(proto)
    try:
        with quiet():
            quantizer = QDQQuantizer(
                shaped,
                per_channel=True,
                reduce_range=reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8 if signed else QuantType.QUInt8,
                tensors_range=ranges.data,
                nodes_to_quantize=[],
                nodes_to_exclude=_excluded(shaped),
                op_types_to_quantize=list(operators),
                extra_options=_options(signed, operators),
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    except Exception as error:  # it raises whatever it meets
        raise ExportError(f"the graph cannot be quantised: {error}") from error
    done = quantizer.model.model
    if signed:
        _free_one_summand(done.graph)
    _tidy(done)
    check_quantised(done, signed=signed)
    return done


def check_quantised(proto: Any, *, signed: bool, every_layer: bool = True) -> None:
    """Check what the runtime of a variant relies on.

    Args:
        proto: A quantised ``ModelProto``.
        signed: Which variant.
        every_layer: Whether every layer with weights must be quantised.

    Raises:
        ExportError: it breaks a rule; the message names the node.
    """
    graph = _Constants(proto.graph)
    pairs = [node for node in proto.graph.node if node.op_type in (_Q, _DQ)]
    if not pairs:
        raise ExportError("the graph has no layer that can be quantised")
    for node in pairs:
        _check_scale(node, graph)
        _check_zero(node, graph, signed)
    for node in proto.graph.node:
        if node.op_type in _LAYERS and (every_layer or _weight(node, graph) is not None):
            _check_layer(node, graph, signed)


def scales_sha256(proto: Any) -> str:
    """Hash of all scales and zero points, in the order of the nodes."""
    graph, digest = _Constants(proto.graph), hashlib.sha256()
    for node in proto.graph.node:
        if node.op_type in (_Q, _DQ):
            for name in node.input[1:]:
                digest.update(name.encode() + graph.value(name).tobytes())
    return digest.hexdigest()


def _options(signed: bool, operators: Sequence[str]) -> dict[str, Any]:
    if not signed:
        return {"WeightSymmetric": True}
    return {
        "WeightSymmetric": True,
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "OpTypesToExcludeOutputQuantization": list(operators),
    }


def _with_shapes(proto: Any) -> Any:
    """A copy of the graph with the type and shape of every tensor: the quantiser needs them."""
    return onnx.shape_inference.infer_shapes(proto)


def _excluded(proto: Any) -> list[str]:
    """Nodes that stay in floating point.

    Sums, but for those a convolution takes part in: the residual stream of a transformer is such a
    sum, and loses its accuracy in 8 bits. And products of two features, as in attention.
    """
    made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
    return [
        node.name
        for node in proto.graph.node
        if (node.op_type == "Add" and "Conv" not in [made_by.get(name) for name in node.input])
        or (node.op_type == "MatMul" and node.input[1] in made_by)
    ]


def _free_one_summand(graph: Any) -> None:
    """Leave the output of a convolution as it is where it goes into a sum."""
    made_by = {name: node for node in graph.node for name in node.output}

    def unquantised(name: str) -> str | None:
        """The output of a convolution that ``name`` is the quantised form of."""
        node = made_by.get(name)
        for op in (_DQ, _Q):
            if node is None or node.op_type != op:
                return None
            name = node.input[0]
            node = made_by.get(name)
        return name if node is not None and node.op_type == "Conv" else None

    for node in graph.node:
        if node.op_type == "Add":
            for position, name in enumerate(node.input):
                plain = unquantised(name)
                if plain is not None:
                    node.input[position] = plain
                    break


def _tidy(proto: Any) -> None:
    """Remove what nothing uses, and the quantiser's notes."""
    graph = proto.graph
    outputs = {port.name for port in graph.output}
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        dead = [node for node in graph.node if not used.intersection(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # some of it speaks of tensors that are gone
    remove_notes(proto)


@dataclass(frozen=True)
class _Weight:
    """The quantised weights of a layer.

    Attributes:
        node: The DequantizeLinear that gives them.
        channels: How many output channels they have.
        axis: Along which.
    """

    node: Any
    channels: int
    axis: int


class _Constants:
    """The constants of a graph and the nodes that make its tensors."""

    def __init__(self, graph: Any) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.made_by = {name: node for node in graph.node for name in node.output}

    def has(self, name: str) -> bool:
        """Whether the tensor is a constant."""
        return name in self._tensors

    def kind(self, name: str) -> int:
        """Type of a constant; 0 if it is none."""
        return self._tensors[name].data_type if self.has(name) else 0

    def value(self, name: str) -> NDArray[Any]:
        """A constant."""
        array: NDArray[Any] = numpy_helper.to_array(self._tensors[name])
        return array

    def dequantised(self, name: str) -> Any | None:
        """The DequantizeLinear that makes a tensor, or None."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type == _DQ else None

    def source(self, node: Any) -> str:
        """The constant that a DequantizeLinear gives, before it was quantised."""
        before = self.made_by.get(node.input[0])
        if before is not None and before.op_type == _Q:
            node = before
        name: str = node.input[0]
        return name


def _check_scale(node: Any, graph: _Constants) -> None:
    if not graph.has(node.input[1]):
        raise ExportError(f"the scale of {node.name} is not a constant")
    scale = graph.value(node.input[1]).astype(np.float64)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ExportError(
            f"a scale of {node.name} is {scale.min():g}",
            "float16 scales can be too small for it: choose residue fp32",
        )


def _check_zero(node: Any, graph: _Constants, signed: bool) -> None:
    """Check the zero point: int8 and zero if signed; int32 is for biases, uint8 for activations."""
    kind = graph.kind(node.input[2]) if len(node.input) > 2 else 0
    if kind not in ((_INT8,) if signed else (_INT8, _UINT8, _INT32)):
        raise ExportError(f"the zero point of {node.name} is missing or of another type")
    if kind != _UINT8 and graph.value(node.input[2]).any():
        raise ExportError(f"the zero point of {node.name} is not zero")


def _check_layer(node: Any, graph: _Constants, signed: bool) -> None:
    """Check that a layer takes quantised features and weights, and how its bias is kept."""
    weight = _weight(node, graph)
    if weight is None:
        if node.op_type == "MatMul" and not graph.has(node.input[1]):
            return  # a product of two features, as in attention, stays in floating point
        raise ExportError(f"the weights of {node.op_type} {node.name} are not quantised")
    features = graph.dequantised(node.input[0])
    if features is None or graph.value(features.input[1]).size != 1:
        raise ExportError(f"what goes into {node.op_type} {node.name} is not quantised as one")
    scales = graph.value(weight.node.input[1])
    (axis, *_) = [a.i for a in weight.node.attribute if a.name == "axis"] or [1]
    right_axis = axis % graph.value(graph.source(weight.node)).ndim == weight.axis
    per_channel = right_axis and scales.shape == (weight.channels,)
    if not per_channel and scales.size != 1:
        raise ExportError(f"{node.op_type} {node.name} has {scales.shape} scales for its weights")
    if node.op_type == "Conv" and not per_channel:
        raise ExportError(f"Conv {node.name} has one scale for all its channels")
    if signed and len(node.input) > 2 and not graph.has(node.input[2]):
        raise ExportError(f"the bias of {node.op_type} {node.name} is quantised")


def _weight(node: Any, graph: _Constants) -> _Weight | None:
    made = graph.dequantised(node.input[1])
    if made is None or not graph.has(graph.source(made)):
        return None
    shape = graph.value(graph.source(made)).shape
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    first = node.op_type == "Conv" or turned
    axis = 0 if first else 1 if node.op_type != "MatMul" else len(shape) - 1
    return _Weight(made, shape[axis], axis)
