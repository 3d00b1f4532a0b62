"""Pairs of small networks with data, to try methods on.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from smskd.contract.networks import Layout, ToyNet
from smskd.data import ResidentBatches
from smskd.seeding import derive, seeded

BATCH = 16
"""Samples a step, unless a check is about their number."""

SIDE = 8
"""Height and width of the images."""


@dataclass(frozen=True)
class PairCase:
    """A student and its teachers, as layouts.

    Attributes:
        name: In messages.
        student: Of the student.
        teachers: One or more.
        device: Where everything runs.
    """

    name: str
    student: Layout
    teachers: tuple[Layout, ...]
    device: str = "cpu"

    def networks(self) -> tuple[ToyNet, list[ToyNet]]:
        """A new student, and teachers that have learned the task."""
        with seeded(derive(0, "student")):
            student = ToyNet(self.student)
        teachers = [copy.deepcopy(_taught(layout, i)) for i, layout in enumerate(self.teachers)]
        return student.to(self.device), [teacher.to(self.device) for teacher in teachers]

    def data(self, num: int, batch_size: int = BATCH) -> ResidentBatches:
        """Training images of the student's classes; ``num`` of them."""
        images, labels = labelled_images(num, self.student.classes)
        return ResidentBatches(images.to(self.device), labels.to(self.device), batch_size)


CASES = {
    case.name: case
    for case in (
        PairCase(
            "other sizes",
            Layout((4, 4, 8, 8), (1, 1, 2, 2)),
            (Layout((6, 6, 12, 16), (1, 2, 2, 1), traceable=False),),
        ),
        PairCase(
            "same sizes",
            Layout((4, 4, 8, 8), (1, 1, 2, 2)),
            (Layout((4, 4, 8, 8), (1, 1, 2, 2)),),
        ),
        PairCase(
            "five maps",
            Layout((4, 4, 6, 8, 8), (1, 2, 2, 1, 1), head=10),
            (Layout((6, 6, 8, 12), (1, 1, 2, 2)),),
        ),
        PairCase(
            "two teachers",
            Layout((4, 4, 8, 8), (1, 1, 2, 2)),
            (Layout((6, 6, 12, 12), (1, 1, 2, 2)), Layout((4, 6, 6, 8, 8), (1, 1, 2, 2, 1))),
        ),
    )
}
"""Pairs that cover what differs between networks in practice, the one that differs most first."""


def labelled_images(num: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images ``(N, 3, 8, 8)`` whose class shows in their colour, and labels ``(N,)``."""
    labels = torch.arange(num) % classes
    colours = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return colours[labels] + 0.7 * noise, labels


@lru_cache(maxsize=64)
def _taught(layout: Layout, seed: int) -> ToyNet:
    with seeded(derive(seed, "teacher")):
        model = ToyNet(layout)
    images, labels = labelled_images(64, layout.classes, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def of_classes(case: PairCase, student: int, teacher: int) -> PairCase:
    """The same pair with other numbers of classes."""
    teachers = tuple(replace(layout, classes=teacher) for layout in case.teachers)
    return replace(
        case, name=f"{case.name}, classes {student} and {teacher}",
        student=replace(case.student, classes=student), teachers=teachers,
    )  # fmt: skip


def tapped(case: PairCase, **changes: object) -> PairCase:
    """The same pair with other taps on both sides; ``changes`` are fields of ``Layout``."""

    def change(layout: Layout) -> Layout:
        return replace(layout, **changes)  # type: ignore[arg-type]

    return replace(
        case, name=f"{case.name}, {changes}",
        student=change(case.student), teachers=tuple(map(change, case.teachers)),
    )  # fmt: skip
