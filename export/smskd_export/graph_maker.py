"""All graphs of one student for one target; what they have in common is made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from smskd.errors import ExportError
from smskd_export.calibration import CalibrationImages, choose_images
from smskd_export.modelopt_quantiser import quantise_with_modelopt
from smskd_export.onnx_graph import check_graph, make_graph
from smskd_export.quantise import Ranges, quantise
from smskd_export.targets import Precision, Target


@dataclass(frozen=True)
class Student:
    """What is exported.

    Attributes:
        model: A classifier of normalised images; it is left untouched.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        mean: Per channel, of images in 0..1.
        std: As mean.
        train_images: uint8 ``(N, C, H, W)``; int8 scales come from some of them.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    train_images: NDArray[np.uint8]


class GraphMaker:
    """Makes graphs by precision and batch size.

    Tracing takes seconds, so a graph in floating point is traced once for all precisions that are
    derived from it; and scales are found once, so that a student has the same at every batch size.

    Args:
        student: What is exported.
        target: For what.
    """

    def __init__(self, student: Student, target: Target) -> None:
        self._student, self._target = student, target
        self._traced: dict[tuple[bool, int], Any] = {}
        self._ranges: dict[bool, Ranges] = {}

    @cached_property
    def calibration_images(self) -> CalibrationImages:
        """The training images that int8 scales come from."""
        return choose_images(self._student.train_images, self._target.calibration)

    def make(self, precision: Precision, batch: int) -> Any:
        """A checked graph (``ModelProto``).

        Raises:
            ConfigError: the quantiser is not installed.
            ExportError: the model cannot be exported or quantised, or the graph fails a check.
        """
        if not precision.quantised:
            return self._float(precision.graph == "fp16", batch)
        proto = self._quantised(precision, batch)
        student = self._student
        shape = (batch, *student.image_shape)
        check_graph(proto, self._target.opset, shape, student.num_classes)
        return proto

    def _float(self, half: bool, batch: int) -> Any:
        if (half, batch) not in self._traced:
            student = self._student
            proto = make_graph(
                student.model,
                student.image_shape,
                student.mean,
                student.std,
                half=half,
                opset=self._target.opset,
                batch=batch,
            )
            self._check_classes(proto)
            self._traced[half, batch] = proto
        return self._traced[half, batch]

    def _quantised(self, precision: Precision, batch: int) -> Any:
        half, calibration = precision.residue == "fp16", self._target.calibration
        if calibration.quantiser == "modelopt":
            images = self.calibration_images.pixels
            plain = self._float(False, batch)
            return quantise_with_modelopt(plain, precision, calibration, images)
        if half not in self._ranges:
            first = self._float(half, self._target.batches[0])
            self._ranges[half] = Ranges(first, self.calibration_images.pixels, calibration)
        return quantise(
            self._float(half, batch),
            self._ranges[half],
            signed=precision.graph == "int8_signed",
            reduce_range=calibration.reduce_range,
        )

    def _check_classes(self, proto: Any) -> None:
        found = proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        if found != self._student.num_classes:
            raise ExportError(
                f"the model gives {found} logits, "
                f"the dataset has {self._student.num_classes} classes"
            )
