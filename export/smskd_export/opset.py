"""Write a graph for an older operator set where that changes no result.

PyTorch's exporter writes operator set 18 and newer; asked for 17 it may return 18, or a graph that
is neither, with a log line only. Between 17 and 18 a few operators got an input for what had been
an attribute, or an option that most graphs do not use; those are rewritten here. Everything else is
left as it is, for the check of the operator set to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import numpy_helper

OLDEST_EXPORTED = 18

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@dataclass(frozen=True)
class _Facts:
    """What is known of a graph: the values of its constants and the shapes of its tensors."""

    values: dict[str, list[int]]
    shapes: dict[str, tuple[int, ...]]


_Rewrite = Callable[[Any, _Facts], Callable[[], None] | None]
"""Looks at a node; gives what rewrites it, or None if it cannot be rewritten."""


def operator_set(proto: Any) -> int:
    """Operator set of the default domain; 0 if there is none."""
    domains: dict[str, int] = {entry.domain: entry.version for entry in proto.opset_import}
    return domains.get("", domains.get("ai.onnx", 0))


def changed_operators(proto: Any, asked: int, got: int) -> list[str]:
    """Operators of the graph whose definition differs between two operator sets."""

    def since(op: str, opset: int) -> int | None:
        try:
            version: int = onnx.defs.get_schema(op, max_inclusive_version=opset).since_version
        except onnx.defs.SchemaError:
            return None
        return version

    ops = sorted({node.op_type for node in proto.graph.node})
    return [op for op in ops if since(op, asked) != since(op, got)]


def lower_opset(proto: Any, opset: int) -> None:
    """Turn a graph of operator set 18 into one of 17, in place, if every operator allows it."""
    if (operator_set(proto), opset) != (18, 17):
        return
    changed, facts = set(changed_operators(proto, opset, 18)), _facts(proto)
    nodes = [node for node in proto.graph.node if node.op_type in changed]
    plans = [_REWRITES.get(node.op_type, _impossible)(node, facts) for node in nodes]
    doable = [plan for plan in plans if plan is not None]
    if len(doable) < len(plans):
        return
    for plan in doable:
        plan()
    _drop_unused(proto.graph)
    next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")).version = opset


def _impossible(node: Any, facts: _Facts) -> None:
    return None


def _reduction(node: Any, facts: _Facts) -> Callable[[], None] | None:
    """The axes are an input since 18."""
    axes = facts.values.get(node.input[1]) if _has_input(node, 1) else []
    if axes is None or (not axes and _attributes(node).get("noop_with_empty_axes")):
        return None

    def rewrite() -> None:
        _keep(node, 1, "keepdims")
        if axes:
            node.attribute.append(onnx.helper.make_attribute("axes", axes))

    return rewrite


def _pad(node: Any, facts: _Facts) -> Callable[[], None] | None:
    """The axes can be chosen since 18; without that nothing changed."""
    return None if _has_input(node, 3) else lambda: _keep(node, 3, "mode")


def _split(node: Any, facts: _Facts) -> Callable[[], None] | None:
    """A number of parts can be asked for since 18; before, all were equal where none was listed."""
    options, shape = _attributes(node), facts.shapes.get(node.input[0], ())
    axis, parts = options.get("axis", 0), options.get("num_outputs")
    if parts is not None and (not shape or shape[axis] % parts):
        return None
    return lambda: _keep(node, 2, "axis")


_REWRITES: dict[str, _Rewrite] = {
    **{f"Reduce{name}": _reduction for name in _REDUCTIONS},
    "Pad": _pad,
    "Split": _split,
}


def _facts(proto: Any) -> _Facts:
    graph = onnx.shape_inference.infer_shapes(proto).graph
    values = {t.name: numpy_helper.to_array(t).tolist() for t in graph.initializer if _small(t)}
    tensors = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.input)}
    shapes = {name: tuple(d.dim_value for d in dims) for name, dims in tensors.items()}
    return _Facts(values, shapes)


def _small(tensor: Any) -> bool:
    return tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1


def _has_input(node: Any, position: int) -> bool:
    return len(node.input) > position and bool(node.input[position])


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _keep(node: Any, inputs: int, attribute: str) -> None:
    """Keep the first inputs and one attribute of a node."""
    del node.input[inputs:]
    kept = [a for a in node.attribute if a.name == attribute]
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input}
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in used:
            del graph.initializer[position]
