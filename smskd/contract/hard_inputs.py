"""Checks of what breaks careless arithmetic: odd batches, odd numbers, odd pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from smskd.contract.assertions import require, require_finite
from smskd.contract.cases import BATCH, PairCase, of_classes, tapped
from smskd.contract.networks import ToyNet
from smskd.contract.trial import PHASES, Alter, Trial, trial
from smskd.data import ResidentBatches
from smskd.errors import SmskdError
from smskd.methods.base import PairShapes, total
from smskd.methods.objective import Part, why_not
from smskd.taps import FEATURES, Shapes

SIZES = {
    "a last batch of one sample": (BATCH + 1, BATCH),
    "batches of 1": (8, 1),
    "batches of 2": (8, 2),
    "batches of 64": (64, 64),
}
"""Samples, and samples a step."""


def batch_sizes(part: Part, case: PairCase) -> None:
    """Batches of any size train, loss and gradients finite, or `check` says why they cannot."""
    for what, (num, size) in SIZES.items():
        with _named(what):
            if tried := _unless_refused(part, case, num=num, batch_size=size):
                for epoch in PHASES:
                    *_, batch = tried.data.epoch(epoch)
                    task, distill = tried.terms(batch, epoch)
                    tried.run.objective.descend(task, distill, tried.run.optimizer)
                    require_finite(task, distill, tried.parameters())


def _unless_refused(part: Part, case: PairCase, **sizes: int) -> Trial | None:
    """The stage, or None if it is refused with a reason."""
    try:
        return trial(part, case, **sizes)  # type: ignore[arg-type]
    except SmskdError as error:
        require("expected" in str(error), f"the reason does not say what is expected: {error}")
        return None


class _named:
    """Puts in front of an assertion's sentence where it failed."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, AssertionError):
            raise AssertionError(f"{self.where}: {error}") from None


def _scaled(student: float, teachers: float) -> Alter:
    def alter(model: ToyNet, others: list[ToyNet], _data: ResidentBatches) -> None:
        model.fc.weight.data *= student
        for other in others:
            other.fc.weight.data *= teachers

    return alter


def _constant(model: ToyNet, others: list[ToyNet], _data: ResidentBatches) -> None:
    for one in (model, *others):
        one.fc.weight.data.zero_()
        one.fc.bias.data.fill_(2.0)


def _dead(which: Callable[[ToyNet, list[ToyNet]], list[ToyNet]]) -> Alter:
    def alter(model: ToyNet, others: list[ToyNet], _data: ResidentBatches) -> None:
        for one in which(model, others):
            norms = [m for m in one.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms[-2:]:
                norm.weight.data.zero_()
                norm.bias.data.fill_(-1.0)

    return alter


ODD_NETWORKS: dict[str, Alter] = {
    "a student of extreme logits": _scaled(1e4, 1.0),
    "a teacher of extreme logits": _scaled(1.0, 1e3),
    "extreme logits, the teacher's turned round": _scaled(1e4, -1e3),
    "constant logits": _constant,
    "a student whose last maps are all zero": _dead(lambda student, _: [student]),
    "networks whose last maps are all zero": _dead(lambda student, teachers: [student, *teachers]),
}


def _one_twice(images: Tensor) -> Tensor:
    return torch.cat([images[:1], images[:1], images[2:]])


def _all_the_same(images: Tensor) -> Tensor:
    return images[:1].expand_as(images).clone()


ODD_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a batch with one image twice": _one_twice,
    "a batch of equal images": _all_the_same,
    "black images": torch.zeros_like,
}


def odd_networks(part: Part, case: PairCase) -> None:
    """Extreme and constant logits and dead features give finite losses and gradients."""
    for what, alter in ODD_NETWORKS.items():
        tried = trial(part, case, alter=alter)
        for epoch in PHASES:
            task, distill = tried.terms(tried.batch(), epoch)
            total(task, distill).backward()
            with _named(what):
                require_finite(task, distill, tried.parameters())


def odd_images(part: Part, case: PairCase) -> None:
    """Equal and black images give finite losses and gradients."""
    tried = trial(part, case)
    tried.student.eval()  # so that equal images have equal features, to the bit
    for what, change in ODD_IMAGES.items():
        batch = tried.batch()
        batch = replace(batch, images=change(batch.images))
        for epoch in PHASES:
            task, distill = tried.terms(batch, epoch)
            total(task, distill).backward()
            with _named(what):
                require_finite(task, distill, tried.parameters())


def odd_pairs(part: Part, case: PairCase) -> None:
    """Pairs that few methods can work with are refused with a reason, or they work."""
    _refuses_without_features(part)
    classes = case.student.classes
    for odd in (
        tapped(case, last_only=True),
        tapped(case, tokens=True),
        of_classes(case, 1, 1),
        of_classes(case, 2, 2),
        of_classes(case, classes, classes + 2),
        replace(case, name=f"{case.name}, turned round", student=case.teachers[0],
                teachers=(case.student,)),
    ):  # fmt: skip
        with _named(odd.name):
            _refused_or_finite(part, odd)


def _refused_or_finite(part: Part, case: PairCase) -> None:
    if not (tried := _unless_refused(part, case)):
        return
    for epoch in PHASES:
        task, distill = tried.terms(tried.batch(), epoch)
        if not task and case.student.classes != case.teachers[0].classes:
            continue
        total(task, distill).backward()
        require_finite(task, distill, tried.parameters())


def _refuses_without_features(part: Part) -> None:
    """Features that are asked for and missing are a reason."""
    bare = Shapes(num_classes=5)
    reasons = why_not([part], PairShapes(bare, (bare,), num_train=BATCH, batch_size=BATCH))
    asked = (part.needs.student_roles | part.needs.teacher_roles) & FEATURES
    require(bool(reasons) or not asked, f"no reason though there are no {', '.join(asked)}")
    for reason in reasons.values():
        require("expected" in reason, f"the reason does not say what is expected: {reason}")
