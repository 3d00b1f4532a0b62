"""From a PyTorch classifier to an ONNX file that has been checked, not only written.

The graph takes ``images`` float32 ``(B, C, H, W)`` in 0..1 and gives ``logits`` float32 ``(B, K)``;
normalisation is inside, so nobody on a device has to know a dataset's mean and deviation. B is a
fixed number: a graph for each batch size.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from smskd.errors import ExportError
from smskd_export.frozen_net import Normalised, fold_norms, frozen_copy
from smskd_export.layer_norms import LAST_OPSET, NAME, spell_out_layer_norms
from smskd_export.manifest import GraphInfo
from smskd_export.opset import OLDEST_EXPORTED, changed_operators, lower_opset, operator_set

INPUT, OUTPUT = "images", "logits"
_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
_NOTES = ("metadata_props", "doc_string")
_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def export_onnx(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    half: bool = False,
    opset: int,
    batch: int = 1,
    path: Path,
) -> GraphInfo:
    """Write ``model`` as one self-contained ONNX file and check it.

    The same model gives the same bytes: notes that the exporter leaves in the graph (among them
    stack traces with the folders of this machine) are removed.

    Args:
        model: A classifier of normalised images, on any device and in any mode; left untouched.
        image_shape: ``(C, H, W)``.
        mean: Per channel, of images in 0..1.
        std: Per channel, of images in 0..1.
        half: Compute in float16; input and output stay float32.
        opset: Operator set, exactly.
        batch: B.
        path: File to write.

    Raises:
        ExportError: the model cannot be exported, or the graph fails a check.
    """
    proto = make_graph(model, image_shape, mean, std, half=half, opset=opset, batch=batch)
    return write_graph(proto, path, "fp16" if half else "fp32")


def make_graph(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    half: bool = False,
    opset: int,
    batch: int = 1,
) -> Any:
    """The checked graph (a ``ModelProto``) that :func:`export_onnx` writes."""
    _check_normalisation(image_shape[0], mean, std)
    example = torch.zeros(batch, *image_shape)
    net = frozen_copy(model)
    num_classes = _count_classes(net, example)
    _fold(net, example, mean, std)
    proto = _trace(Normalised(net, mean, std, half).eval(), example, opset)
    lower_opset(proto, opset)
    if operator_set(proto) <= LAST_OPSET:
        spell_out_layer_norms(proto)
    _check_opset(proto, opset)
    remove_notes(proto)
    check_graph(proto, opset, (batch, *image_shape), num_classes)
    if half:
        _check_half(proto)
    return proto


def write_graph(proto: Any, path: Path, precision: str) -> GraphInfo:
    """Write a graph that was checked, and describe the file.

    Args:
        proto: A ``ModelProto``.
        path: File to write.
        precision: Name of the precision it computes in.
    """
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(data)
    ports = [_dims(ports[0].type.tensor_type.shape) for ports in _ports(proto)]
    return GraphInfo(
        precision=precision,
        batch=ports[0][0],
        path=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        opset=operator_set(proto),
        ir_version=proto.ir_version,
        input_shape=ports[0],
        output_shape=ports[1],
        operators=dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
    )


def remove_notes(proto: Any) -> None:
    """Clear what says nothing to a runtime: notes for people, and the newest file format.

    Runtimes of an age with the operator set read only the format that it needs.
    """
    _clear_notes(proto)
    # The optional type hints of inner tensors are the exporter's; shape inference finds them.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)


def check_graph(proto: Any, opset: int, input_shape: Sequence[int], num_classes: int) -> None:
    """Check everything that every graph must keep, whatever its precision.

    Args:
        proto: A ``ModelProto``.
        opset: Operator set that it must have.
        input_shape: ``(B, C, H, W)``.
        num_classes: K.

    Raises:
        ExportError: it is not valid ONNX; has another operator set, foreign operators, an open
            shape, other inputs or outputs, or weights in another file; or speaks of this machine.
    """
    _check_opset(proto, opset)
    if any(w.data_location == onnx.TensorProto.EXTERNAL for w in proto.graph.initializer):
        raise ExportError("the graph keeps weights in another file")
    inferred = _valid(proto)
    wanted = tuple(input_shape), (input_shape[0], num_classes)
    for side, ports, name, shape in zip(
        ("input", "output"), _ports(proto), (INPUT, OUTPUT), wanted, strict=True
    ):
        _check_port(side, ports, name, shape)
    _check_static(inferred)
    _check_strings(proto)


def _fold(net: nn.Module, example: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Fold the batch norms of a frozen copy, proved on random images of the example's shape."""
    images = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
    fold_norms(net, (images - shift) / scale)


def _check_normalisation(channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if not len(mean) == len(std) == channels:
        raise ExportError(
            f"images have {channels} channels, but mean has {len(mean)} values and std {len(std)}"
        )
    if min(std) <= 0:
        raise ExportError(f"std must be above 0 in every channel, not {list(std)}")


def _count_classes(model: nn.Module, images: Tensor) -> int:
    """Run the model once and return K."""
    try:
        with torch.no_grad():
            logits = model(images)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ExportError(
            f"the model does not run on images of shape {tuple(images.shape)}: {_first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ExportError(
            f"the model must return logits of shape ({len(images)}, K), not {got}",
            "wrap it in a module whose forward returns only the logits",
        )
    return logits.shape[1]


def _trace(model: nn.Module, example: Tensor, opset: int) -> Any:
    """ModelProto of the model, as torch's exporter makes it."""
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=max(opset, OLDEST_EXPORTED),
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"PyTorch cannot export this model: {_first_line(error.__cause__ or error)}",
            "the model must not branch on the values of its input, and may use ONNX operators only",
        ) from error
    assert program is not None  # only the legacy exporter returns None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines (a page for one small model) off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_opset(proto: Any, opset: int) -> None:
    """Refuse another operator set than asked: the exporter changes it with a log line only."""
    foreign = sorted(
        {entry.domain for entry in proto.opset_import}.union(n.domain for n in proto.graph.node)
        - {"", "ai.onnx"}
    )
    if foreign:
        raise ExportError(f"the graph uses operators outside ONNX: {', '.join(foreign)}")
    got = operator_set(proto)
    if got != opset:
        changed = changed_operators(proto, opset, got)
        raise ExportError(
            f"the exporter wrote opset {got}, but the target reads opset {opset}; "
            f"these operators changed in between: {', '.join(changed) or 'none'}",
            "rewrite the model without them, or choose a target with a newer opset",
        )
    if opset <= LAST_OPSET and any(node.op_type == NAME for node in proto.graph.node):
        raise ExportError(
            f"the graph uses {NAME}, which TensorRT 8.5 (opset {LAST_OPSET}) does not know, "
            "in a way that cannot be spelt out",
            "choose a target with a newer opset",
        )


def _clear_notes(message: Any) -> None:
    """Clear notes for people in a protobuf message and all messages inside it."""
    for field, value in message.ListFields():
        if field.name in _NOTES:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for item in _each(value):
                _clear_notes(item)


def _valid(proto: Any) -> Any:
    """The graph with the shape of every tensor, if it is valid ONNX."""
    try:
        onnx.checker.check_model(proto, full_check=True)
        return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {_first_line(error)}") from error


def _check_port(side: str, values: Any, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a graph whose only input (or output) is not float32 ``name`` of ``shape``."""
    got = [(v.name, v.type.tensor_type.elem_type, *_dims(v.type.tensor_type.shape)) for v in values]
    if got != [(name, _FLOAT, *shape)]:
        raise ExportError(
            f"the graph's {side} is {got}, expected {[(name, _FLOAT, *shape)]} (name, type, shape)"
        )


def _check_static(proto: Any) -> None:
    """Refuse a tensor whose shape is not all numbers."""
    values = (*proto.graph.value_info, *proto.graph.output)
    fixed = {v.name for v in values if _is_fixed(v.type.tensor_type)}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in fixed:
                raise ExportError(
                    f"the graph has an open shape: {name!r} of {node.op_type}",
                    "no shape may depend on the values of a tensor",
                )


def _is_fixed(kind: Any) -> bool:
    dims = kind.shape.dim
    return kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)


def _check_strings(proto: Any) -> None:
    """Refuse notes, and names that hold a folder of this machine."""
    folders = {str(Path.home()), str(Path.cwd()), sys.prefix, str(Path(torch.__file__).parents[1])}
    folders = {folder for folder in folders if len(folder) > 1}
    for field, text in _strings(proto):
        if field in _NOTES:
            raise ExportError(f"the graph holds notes in {field}: {text[:80]!r}")
        if found := next((folder for folder in folders if folder in text), None):
            raise ExportError(f"the graph names a folder of this machine ({found}) in {field}")


def _strings(message: Any) -> Iterator[tuple[str, str]]:
    """Every text in a protobuf message and in all messages inside it, with the field's name."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in _each(value):
                if field.name in _NOTES:
                    yield field.name, str(item)
                yield from _strings(item)
        elif field.type == field.TYPE_STRING or field.name in ("s", "strings"):
            for item in _each(value):
                yield field.name, item if isinstance(item, str) else item.decode("latin-1")


def _each(value: Any) -> Any:
    """The items of a repeated field, or the one item of a plain field."""
    return [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value


def _check_half(proto: Any) -> None:
    """Refuse a half model whose layers compute in float32 after all."""
    kinds = {w.name: w.data_type for w in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in _WEIGHTED:
            wide = [name for name in node.input if kinds.get(name, _HALF) == _FLOAT]
            if wide:
                raise ExportError(
                    f"the half model computes {node.op_type} {node.name!r} in float32",
                    "the model must not turn its features into float32",
                )


def _ports(proto: Any) -> tuple[Any, Any]:
    return proto.graph.input, proto.graph.output


def _dims(shape: Any) -> tuple[int, ...]:
    return tuple(d.dim_param or d.dim_value for d in shape.dim)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
