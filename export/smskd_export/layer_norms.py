"""LayerNormalization spelt out in operators that every TensorRT knows.

The operator came with operator set 17, which TensorRT 8.5 reads without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.helper import get_attribute_value, make_node

NAME = "LayerNormalization"
LAST_OPSET = 17
"""Up to this operator set layer norms are spelt out."""


def spell_out_layer_norms(proto: Any) -> None:
    """Replace every LayerNormalization of a graph of operator set 17, in place.

    The mean and the variance are computed in float32, scale and shift in the type of the features,
    as the operator's definition says.
    """
    if not any(node.op_type == NAME for node in proto.graph.node):
        return
    known = onnx.shape_inference.infer_shapes(proto).graph
    types = {v.name: v.type.tensor_type for v in (*known.value_info, *known.input)}
    nodes: list[Any] = []
    for node in proto.graph.node:
        if node.op_type == NAME and node.input[0] in types and not any(node.output[1:]):
            nodes += _spelt_out(proto.graph, node, types[node.input[0]])
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _spelt_out(graph: Any, node: Any, kind: Any) -> Iterator[Any]:
    options = {a.name: get_attribute_value(a) for a in node.attribute}
    rank, out, features = len(kind.shape.dim), node.output[0], node.input[0]
    axes = list(range(options.get("axis", -1) % rank, rank))
    half = kind.elem_type == onnx.TensorProto.FLOAT16
    eps = f"{out}_epsilon"
    value = np.array(options.get("epsilon", 1e-5), dtype=np.float32)
    graph.initializer.append(numpy_helper.from_array(value, eps))

    def name(step: str) -> str:
        return f"{out}_{step}"

    def step(op: str, inputs: list[str], made: str, **attributes: Any) -> Any:
        return make_node(op, inputs, [made], name=f"{made}_{op}", **attributes)

    if half:
        yield step("Cast", [features], name("wide"), to=onnx.TensorProto.FLOAT)
        features = name("wide")
    yield step("ReduceMean", [features], name("mean"), axes=axes, keepdims=1)
    yield step("Sub", [features, name("mean")], name("centred"))
    yield step("Mul", [name("centred")] * 2, name("squares"))
    yield step("ReduceMean", [name("squares")], name("variance"), axes=axes, keepdims=1)
    yield step("Add", [name("variance"), eps], name("safe"))
    yield step("Sqrt", [name("safe")], name("deviation"))
    last = "Div", [name("centred"), name("deviation")]
    if half:
        yield step(*last, name("normal"))
        last = "Cast", [name("normal")]
    attributes = {"to": onnx.TensorProto.FLOAT16} if half else {}
    for position, op in ((1, "Mul"), (2, "Add")):
        if len(node.input) > position and node.input[position]:
            yield step(*last, name(f"before_{op}"), **attributes)
            last, attributes = (op, [name(f"before_{op}"), node.input[position]]), {}
    yield step(*last, out, **attributes)
