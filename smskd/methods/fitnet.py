"""FitNet: regress one of the teacher's feature maps (the hint) from the student's.

Paper: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets",
arXiv 1412.6550.
Loss: ``ce_weight * CE + weight * mean((r(F_s) - F_t)^2)``, mean over batch, channels and positions;
F_s, F_t are map number ``hint_layer`` of both networks, r is a convolution, batch norm and ReLU
that is trained with the student and dropped after the stage.

Deviations from the paper: one phase, in which hint and labels are learned together, where the paper
first trains the lower half on the hint alone; and the batch norm in r. Both follow RepDistiller and
mdistiller, whose CIFAR-100 tables the field compares with. They choose r's geometry by the height
alone; here height and width must both fit.
Defaults: RepDistiller (``--distill hint``: CE 1, weight 100, hint layer 2), same in mdistiller.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from smskd.errors import IncompatibleError
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class FitNet(Method):
    """Hyper-parameters of FitNet.

    Attributes:
        weight: Weight of the hint term.
        hint_layer: Which map is the hint, counted from 0, the stem's map.
    """

    name: ClassVar[str] = "fitnet"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Romero 2015, arXiv 1412.6550"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 100.0
    hint_layer: int = 2

    def check(self, shapes: PairShapes) -> str | None:
        """The hint must exist in both networks, at sizes that one convolution can connect."""
        for who, maps in (("student", shapes.student.maps), ("teacher", shapes.teacher.maps)):
            if not 0 <= self.hint_layer < len(maps):
                return (
                    f"hint_layer {self.hint_layer} asked for, but the {who} has {len(maps)} "
                    f"feature maps (expected 0 <= hint_layer < {len(maps)})"
                )
        shape_s, shape_t = self._hint_shapes(shapes)
        if len(shape_s) != 3 or len(shape_t) != 3:
            return f"expected (C, H, W) maps, got student {shape_s} and teacher {shape_t}"
        if not _connectable(shape_s, shape_t):
            return (
                f"map {self.hint_layer} is {_size(shape_s)} in the student and {_size(shape_t)} in "
                "the teacher; expected the student's to be exactly half as large, or at least as "
                "large, in both directions"
            )
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The regressor r: student map ``(B, C_s, H_s, W_s)`` to ``(B, C_t, H_t, W_t)``.

        Raises:
            IncompatibleError: :meth:`check` gives a reason.
        """
        if (reason := self.check(shapes)) is not None:
            raise IncompatibleError(f"{self.name} cannot work with this pair: {reason}")
        shape_s, shape_t = self._hint_shapes(shapes)
        conv, norm = hint_convolution(shape_s, shape_t), nn.BatchNorm2d(shape_t[0])
        return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=nn.ReLU()))

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Mean squared error between the regressed and the teacher's map."""
        regressed = modules(signals.student.maps[self.hint_layer])
        hint = F.mse_loss(regressed, signals.teacher.maps[self.hint_layer])
        return {"hint": self.weight * hint}

    def _hint_shapes(self, shapes: PairShapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return shapes.student.maps[self.hint_layer], shapes.teacher.maps[self.hint_layer]


def hint_convolution(shape_s: tuple[int, ...], shape_t: tuple[int, ...]) -> nn.Module:
    """The convolution that maps ``(C_s, H_s, W_s)`` to ``(C_t, H_t, W_t)``.

    Geometry of RepDistiller's ConvReg: 3x3 with stride 2 halves, a transposed 4x4 with stride 2
    doubles, otherwise an unpadded kernel of 1 + H_s - H_t takes off what is too much.
    """
    (c_s, h_s, w_s), (c_t, h_t, w_t) = shape_s, shape_t
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        return nn.Conv2d(c_s, c_t, kernel_size=3, stride=2, padding=1)
    if (2 * h_s, 2 * w_s) == (h_t, w_t):
        return nn.ConvTranspose2d(c_s, c_t, kernel_size=4, stride=2, padding=1)
    return nn.Conv2d(c_s, c_t, kernel_size=(1 + h_s - h_t, 1 + w_s - w_t))


def _connectable(shape_s: tuple[int, ...], shape_t: tuple[int, ...]) -> bool:
    (_, h_s, w_s), (_, h_t, w_t) = shape_s, shape_t
    return (2 * h_s, 2 * w_s) == (h_t, w_t) or (h_s >= h_t and w_s >= w_t)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
