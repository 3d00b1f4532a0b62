"""Checks of what must not change the loss: order, width of numbers, features not asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import SkipTest

import torch

from smskd.contract.assertions import require, require_close, require_finite
from smskd.contract.cases import BATCH, PairCase
from smskd.contract.networks import ToyNet
from smskd.contract.trial import PHASES, trial
from smskd.data import Batch, ResidentBatches
from smskd.methods.base import Signals, Terms, total
from smskd.methods.objective import Part
from smskd.precision import why_not
from smskd.taps import CLASSIFIER, FEATURES, MAPS, PREACT, Outputs

NO_CLASS_IN_PLACE = (3, 0, 4, 1, 2)


def _skip_if_random(part: Part) -> None:
    if any(component.draws_random for component in part.components):
        raise SkipTest("the loss draws random numbers, which fall on other samples then")


def order_of_samples(part: Part, case: PairCase) -> None:
    """A batch in another order has the same loss."""
    _skip_if_random(part)
    one, other = trial(part, case, wide=True), trial(part, case, wide=True)
    batch = one.batch()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1)).to(case.device)
    shuffled = Batch(batch.images[order], batch.labels[order], batch.index[order])
    for a, b in zip(one.phases(batch), other.phases(shuffled), strict=True):
        require_close(a, b, "with the samples in another order", rtol=1e-6, atol=1e-9)


def order_of_classes(part: Part, case: PairCase) -> None:
    """For methods on logits: with the classes in another order the loss is the same."""
    if part.method.kind not in ("none", "response"):
        raise SkipTest("only the losses on logits know classes")
    _skip_if_random(part)
    order = torch.tensor(NO_CLASS_IN_PLACE, device=case.device)

    def permute(student: ToyNet, teachers: list[ToyNet], data: ResidentBatches) -> None:
        for model in (student, *teachers):
            model.fc.weight.data, model.fc.bias.data = model.fc.weight[order], model.fc.bias[order]
        data.labels = order.argsort()[data.labels]

    one, other = trial(part, case, wide=True), trial(part, case, alter=permute, wide=True)
    for a, b in zip(one.phases(), other.phases(), strict=True):
        require_close(a, b, "with the classes in another order", rtol=1e-6, atol=1e-9)


def float64_agrees(part: Part, case: PairCase) -> None:
    """In float64 the loss is nearly the same, and float64."""
    _skip_if_random(part)
    narrow, wide = trial(part, case), trial(part, case, wide=True)
    wide.run.objective.load_state_dict(narrow.run.objective.state_dict())
    for a, b in zip(narrow.phases(), wide.phases(), strict=True):
        for name, term in b.items():
            require(term.dtype == torch.float64, f"term {name!r} of float64 signals: {term.dtype}")
        require_close(a, b, "float32 and float64", rtol=1e-3, atol=1e-5)


def survives_rounding(part: Part, case: PairCase) -> None:
    """Signals rounded to bfloat16 give a finite loss near the exact one."""
    exact, coarse = trial(part, case), trial(part, case)

    def rounded(signals: Signals) -> Signals:
        teachers = tuple(bfloat16(teacher) for teacher in signals.teachers)
        return replace(signals, student=bfloat16(signals.student), teachers=teachers)

    with coarse.seen_by_objective(rounded):
        phases = coarse.phases()
    for whole, terms in zip(exact.phases(), phases, strict=True):
        a, b = total(whole), total(terms)
        b.backward()
        require_finite(terms, {}, coarse.parameters())
        require(b.dtype == torch.float32, f"the loss of rounded float32 signals is {b.dtype}")
        near = abs(a.item() - b.item()) <= 0.05 + 0.1 * abs(a.item())
        require(near, f"rounded to bfloat16 the loss is {b.item():.5g} and not {a.item():.5g}")


def bfloat16(outputs: Outputs) -> Outputs:
    """The outputs as a network in bf16 gives them, widened again."""
    return outputs.map(lambda x: x.bfloat16().to(x.dtype))


def bf16(part: Part, case: PairCase) -> None:
    """With the networks in bf16 the loss is finite and float32; skipped without such hardware."""
    if reason := why_not("bf16", torch.device(case.device)):
        raise SkipTest(reason)
    tried = trial(part, case, precision="bf16")
    for epoch in PHASES:
        task, distill = tried.terms(tried.batch(), epoch)
        total(task, distill).backward()
        require_finite(task, distill, tried.parameters())
        for name, term in {**task, **distill}.items():
            require(term.dtype == torch.float32, f"term {name!r} is {term.dtype}")


def needs_suffice(part: Part, case: PairCase) -> None:
    """Positions of samples change nothing unless they are asked for.

    Features that are not asked for are never there, in any check.
    """
    if part.needs.index:
        return
    one, other = trial(part, case), trial(part, case)
    batch = one.batch()
    unknown = replace(batch, index=torch.full_like(batch.index, -1))
    for a, b in zip(one.phases(batch), other.phases(unknown), strict=True):
        require_close(a, b, "without the positions of samples", rtol=0.0, atol=0.0)


def needs_are_read(part: Part, case: PairCase) -> None:
    """Everything that is asked for is read, from each network it is asked of."""
    asked = [("student", role) for role in sorted(part.needs.student_roles & FEATURES)]
    asked += [("teachers", role) for role in sorted(part.needs.teacher_roles & FEATURES)]
    # A teacher's classifier may be read once, when the method builds its modules.
    modules = (part.needs.student_roles | part.needs.teacher_roles - {CLASSIFIER}) - FEATURES
    asked += [("stage", "networks")] if modules else []
    asked += [("stage", "teachers")] if part.needs.teacher else []
    asked += [("stage", "index")] if part.needs.index else []
    whole = trial(part, case).phases() if asked else []
    for side, what in asked:
        less = _without(part, case, side, what)
        read = less is None or any(
            not torch.equal(total(a), total(b)) for a, b in zip(whole, less, strict=True)
        )
        require(read, f"{what!r} of the {side} is asked for and not read")


def _without(part: Part, case: PairCase, side: str, what: str) -> list[Terms] | None:
    """The terms without one thing that is asked for; None if there are none then."""
    nothing: Any = () if what in (MAPS, PREACT, "teachers") else None

    def look(signals: Signals) -> Signals:
        if what == "index":
            return replace(signals, index=torch.zeros_like(signals.index))
        if side == "stage":
            return replace(signals, **{what: nothing})
        if side == "student":
            return replace(signals, student=replace(signals.student, **{what: nothing}))
        teachers = tuple(replace(teacher, **{what: nothing}) for teacher in signals.teachers)
        return replace(signals, teachers=teachers)

    tried = trial(part, case)
    try:
        with tried.seen_by_objective(look):
            return tried.phases()
    except Exception:  # whatever a method does with a signal that is not there
        return None
