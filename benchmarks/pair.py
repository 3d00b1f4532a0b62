"""A pair of networks to distil, built the same way for every contestant."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smskd.errors import ConfigError, UnknownNameError
from smskd.models import build_model, model_entry
from smskd.seeding import seeded

SEED = 0
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Pair:
    """Names of two networks of the zoo."""

    teacher: str
    student: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read ``teacher>student``.

        Raises:
            ConfigError: it is not of that form.
        """
        teacher, arrow, student = text.partition(">")
        if not (arrow and teacher and student):
            raise ConfigError(f"{text!r} is no pair", "write teacher>student, in quotes")
        return cls(teacher, student)

    def unknown(self) -> str | None:
        """Which network the zoo lacks, in words; None if it has both."""
        try:
            model_entry(self.teacher)
            model_entry(self.student)
        except UnknownNameError as error:
            return error.message
        return None

    def __str__(self) -> str:
        return f"{self.teacher}>{self.student}"


def known_pair(text: str) -> Pair:
    """Read ``teacher>student``, both in the zoo.

    Raises:
        ConfigError: it is not of that form, or the zoo lacks a network.
    """
    pair = Pair.parse(text)
    if unknown := pair.unknown():
        raise ConfigError(f"{text}: {unknown}", "`smskd-bench list models` names all")
    return pair


class Networks:
    """A teacher and a student as they are before training, to be copied by each contestant.

    The teacher is untrained; the time of a step does not depend on its weights. Its BatchNorm
    statistics are those of one batch, as without them the logits of a deep network are astronomic.

    Args:
        pair: Their names.
        num_classes: K.
        images: ``(M, C, H, W)`` normalised, to take the statistics from.
    """

    def __init__(self, pair: Pair, num_classes: int, images: Tensor) -> None:
        self.pair, self.num_classes = pair, num_classes
        self.in_channels = images.shape[1]
        self._images = images[:CALIBRATION_IMAGES]
        with seeded(SEED):
            self._teacher = build_model(pair.teacher, num_classes, self.in_channels)
        _calibrate(self._teacher, self._images)

    def student(self, seed: int = SEED) -> nn.Module:
        """A new one, in training mode; the same weights for the same seed."""
        with seeded(seed):
            return build_model(self.pair.student, self.num_classes, self.in_channels).train()

    def previous_student(self, seed: int) -> nn.Module:
        """A student as a frozen reference, in evaluation mode; statistics as the teacher's."""
        student = self.student(seed)
        _calibrate(student, self._images)
        return student.eval()

    def teacher(self) -> nn.Module:
        """A new copy, in evaluation mode."""
        return copy.deepcopy(self._teacher).eval()


def _calibrate(model: nn.Module, images: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
