"""From a PyTorch classifier to an ONNX file that has been checked, not only written.

The graph takes ``images`` float32 ``(B, C, H, W)`` in 0..1 and gives ``logits`` float32 ``(B, K)``;
normalisation is inside, so nobody on a device has to know a dataset's mean and deviation.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from smskd.errors import ExportError
from smskd_export.targets import Target

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
_FLOAT = onnx.TensorProto.FLOAT
_NOTES = ("metadata_props", "doc_string")


@dataclass(frozen=True)
class GraphInfo:
    """What was written.

    Attributes:
        sha256: Hash of the file.
        bytes: Size of the file.
        opset: Operator set of the default domain, the only domain in the graph.
        ir_version: Version of the ONNX file format.
        input_shape: ``(B, C, H, W)``; B is "batch" where it is free.
        output_shape: ``(B, K)``.
        operators: How many nodes of each operator, by name.
    """

    sha256: str
    bytes: int
    opset: int
    ir_version: int
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]
    operators: dict[str, int]


class Normalised(nn.Module):
    """A classifier that takes images in 0..1 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in 0..1 to logits ``(B, K)``."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def frozen_copy(model: nn.Module) -> nn.Module:
    """Deep copy of a model on the CPU, in float32 and evaluation mode."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def export_onnx(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    target: Target,
    path: Path,
) -> GraphInfo:
    """Write ``model`` as one self-contained ONNX file and check it.

    The same model gives the same bytes: notes that the exporter leaves in the graph (among them
    stack traces with the folders of this machine) are removed.

    Args:
        model: A classifier of normalised images, on any device and in any mode.
        image_shape: ``(C, H, W)``.
        mean: Per channel, of images in 0..1.
        std: Per channel, of images in 0..1.
        target: Says the operator set and whether the batch size is free.
        path: File to write.

    Raises:
        ExportError: the model cannot be exported, or the graph fails a check.
    """
    _check_normalisation(image_shape[0], mean, std)
    # A free batch dimension is traced with 2: torch.export takes 1 for a constant.
    batch = 2 if target.dynamic_batch else target.batches[0]
    example = torch.zeros(batch, *image_shape)
    wrapped = Normalised(frozen_copy(model), mean, std).eval()
    num_classes = _count_classes(wrapped, example)
    proto = _trace(wrapped, example, target)
    _check_opset(proto, target)
    _remove_notes(proto)
    # The exporter writes the newest file format; older runtimes read only what the opset needs.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    free: int | str = BATCH if target.dynamic_batch else batch
    _check_graph(proto, (free, *image_shape), (free, num_classes))
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return GraphInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        opset=target.opset,
        ir_version=proto.ir_version,
        input_shape=(free, *image_shape),
        output_shape=(free, num_classes),
        operators=dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
    )


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


def _trace(model: nn.Module, example: Tensor, target: Target) -> Any:
    """ModelProto of the model, as torch's exporter makes it."""
    dynamic = ({0: torch.export.Dim(BATCH)},) if target.dynamic_batch else None
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=target.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=dynamic,
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


def _check_opset(proto: Any, target: Target) -> None:
    """Refuse another operator set than asked: the exporter changes it with a log line only."""
    domains = {entry.domain: entry.version for entry in proto.opset_import}
    foreign = sorted(d for d in domains if d not in ("", "ai.onnx"))
    if foreign:
        raise ExportError(f"the graph uses operators outside ONNX: {', '.join(foreign)}")
    got = domains.get("", domains.get("ai.onnx", 0))
    if got == target.opset:
        return
    changed = _changed_operators(proto, target.opset, got)
    raise ExportError(
        f"the exporter wrote opset {got}, but target {target.name!r} reads opset {target.opset}; "
        f"these operators changed in between: {', '.join(changed) or 'none'}",
        "for ReduceMean (x.mean((2, 3)), adaptive_avg_pool2d): use F.avg_pool2d(x, x.shape[2])"
        if "ReduceMean" in changed
        else "rewrite the model without them, or choose a target with a newer opset",
    )


def _changed_operators(proto: Any, asked: int, got: int) -> list[str]:
    """Operators of the graph whose definition differs between two operator sets."""

    def since(op: str, opset: int) -> int | None:
        try:
            version: int = onnx.defs.get_schema(op, max_inclusive_version=opset).since_version
        except onnx.defs.SchemaError:
            return None
        return version

    ops = sorted({node.op_type for node in proto.graph.node})
    return [op for op in ops if since(op, asked) != since(op, got)]


def _remove_notes(message: Any) -> None:
    """Clear notes for people in a protobuf message and all messages inside it."""
    for field, value in message.ListFields():
        if field.name in _NOTES:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                _remove_notes(item)


def _check_graph(
    proto: Any, want_in: tuple[int | str, ...], want_out: tuple[int | str, ...]
) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {_first_line(error)}") from error
    weights = proto.graph.initializer
    if any(w.data_location == onnx.TensorProto.EXTERNAL for w in weights):
        raise ExportError("the graph keeps weights in another file")
    _check_port("input", proto.graph.input, INPUT, want_in)
    _check_port("output", proto.graph.output, OUTPUT, want_out)


def _check_port(side: str, values: Any, name: str, shape: tuple[int | str, ...]) -> None:
    """Refuse a graph whose only input (or output) is not float32 ``name`` of ``shape``."""
    got = [(v.name, v.type.tensor_type.elem_type, *_dims(v.type.tensor_type.shape)) for v in values]
    if got != [(name, _FLOAT, *shape)]:
        raise ExportError(
            f"the graph's {side} is {got}, expected {[(name, _FLOAT, *shape)]} (name, type, shape)",
            "a batch size that became a constant comes from .view() or .reshape() with a number",
        )


def _dims(shape: Any) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in shape.dim)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
