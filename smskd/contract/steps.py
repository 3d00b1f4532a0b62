"""Checks of single steps: what the loss is, where its gradient goes, what it leaves alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from smskd.contract.assertions import differing, require, require_finite
from smskd.contract.cases import BATCH, PairCase
from smskd.contract.trial import EPOCHS, PHASES, Trial, refusal, trial
from smskd.frozen import Live
from smskd.methods.base import PairShapes, Signals, Terms, total
from smskd.methods.kd import KD
from smskd.methods.objective import Part, why_not
from smskd.seeding import rng_state
from smskd.taps import probe


@dataclass
class Observed:
    """What one step in each phase of a stage did.

    Attributes:
        terms: The terms of each epoch looked at.
        broken: What was wrong with them or with their gradients.
        moved: Whether the method's own terms have a gradient to the student.
        blamed: Who got a gradient that no optimiser step uses.
        written: What of the signals was changed in place.
        drawn: Whether random numbers were drawn.
    """

    terms: dict[int, Terms] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    moved: bool = False
    blamed: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    drawn: bool = False


@lru_cache(maxsize=8)
def observed(part: Part, case: PairCase) -> Observed:
    """Take the steps; equal checks share them."""
    tried, found = trial(part, case), Observed()
    seen: list[tuple[str, Tensor, int]] = []

    def look(signals: Signals) -> Signals:
        seen.extend((name, tensor, tensor._version) for name, tensor in _tensors(signals))
        return signals

    with tried.seen_by_objective(look):
        for epoch in PHASES:
            _observe(tried, epoch, found)
    found.written = {name for name, tensor, version in seen if tensor._version != version}
    for i, teacher in enumerate(tried.teachers):
        if any(p.grad is not None for p in teacher.parameters()):
            found.blamed.add(f"teacher {i}")
    return found


def _observe(tried: Trial, epoch: int, found: Observed) -> None:
    batch, before = tried.batch(), rng_state()
    task, distill = tried.terms(batch, epoch)
    found.drawn |= bool(differing(before, rng_state()))
    found.terms[epoch] = {**task, **distill}
    found.blamed |= _strays(tried, total(task, distill))
    if distill:
        tried.run.optimizer.zero_grad()
        total(distill).backward(retain_graph=True)
        gradients = [p.grad for p in tried.student.parameters() if p.grad is not None]
        found.moved |= any(bool(gradient.abs().max() > 0) for gradient in gradients)
    total(task, distill).backward()
    try:
        require_finite(task, distill, tried.parameters())
    except AssertionError as error:
        found.broken.append(f"in epoch {epoch} of {EPOCHS}, {error}")


def _strays(tried: Trial, loss: Tensor) -> set[str]:
    """Leaves of the graph that get a gradient and are not in the optimiser."""
    trained = {id(p) for group in tried.run.optimizer.param_groups for p in group["params"]}
    seen: set[object] = set()
    todo, strays = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(before for before, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in trained:
            strays.add(f"a tensor {tuple(leaf.shape)} that is not in the optimiser")
    return strays


def reference_of(tried: Trial) -> nn.Module:
    """The frozen student of the stage before."""
    assert tried.run.anchor is not None
    live = tried.run.anchor.network
    assert isinstance(live, Live)
    return live.origin


def _tensors(signals: Signals) -> list[tuple[str, Tensor]]:
    found = [("labels", signals.labels), ("index", signals.index)]
    if signals.networks:
        found.append(("images", signals.networks.images))
    names = ["student", *(f"teacher {i}" for i in range(len(signals.teachers)))]
    for who, outputs in zip(names, (signals.student, *signals.teachers), strict=True):
        features = [*outputs.maps, *outputs.preact, outputs.pooled, outputs.spatial]
        found.append((f"logits of {who}", outputs.logits))
        found.extend((f"a feature of {who}", x) for x in features if x is not None)
    return found


def says_why_it_cannot(part: Part, case: PairCase) -> None:
    """`check` accepts the pair or gives a reason, from sizes alone, and draws no random number."""
    shapes = _sizes(part, case)
    before = torch.get_rng_state()
    reasons = why_not([part], shapes)
    require(torch.equal(torch.get_rng_state(), before), "check draws random numbers")
    for name, reason in reasons.items():
        require("expected" in reason, f"{name}'s reason does not say what is expected: {reason}")
    refused = refusal(part, case)
    require(
        bool(refused) == bool(reasons),
        f"from sizes alone check says {reasons or 'nothing'}, but preparing it says {refused}",
    )


def _sizes(part: Part, case: PairCase) -> PairShapes:
    """What the planner knows of a pair."""
    student, teachers = case.networks()
    image, needs = case.data(1).images, part.needs
    return PairShapes(
        student=probe(student, case.student.taps, needs.student_roles, image),
        teachers=tuple(
            probe(teacher, layout.taps, needs.teacher_roles, image)
            for teacher, layout in zip(teachers, case.teachers, strict=True)
        ),
        num_train=BATCH,
        batch_size=BATCH,
        image=tuple(image.shape[1:]),
    )


def loss_is_finite(part: Part, case: PairCase) -> None:
    """Every step has terms; they and their gradients are finite, the terms float32."""
    found = observed(part, case)
    require(not found.broken, "; ".join(found.broken))
    for epoch, terms in found.terms.items():
        require(bool(terms), f"there are no terms in epoch {epoch} of {EPOCHS}")
        for name, term in terms.items():
            require(term.dtype == torch.float32, f"term {name!r} is {term.dtype}")


def gradients_go_to_what_is_trained(part: Part, case: PairCase) -> None:
    """Distillation has a gradient to the student, in some phase, and none to what is not trained.

    Nothing frozen gets one, and every tensor that gets one is in the optimiser.
    """
    found = observed(part, case)
    require(
        found.moved or part.method.kind == "none", "distillation has no gradient to the student"
    )
    require(not found.blamed, f"there is a gradient to {' and '.join(sorted(found.blamed))}")


def draws_are_declared(part: Part, case: PairCase) -> None:
    """A loss that draws random numbers says so in `draws_random`."""
    declared = any(component.draws_random for component in part.components)
    drawn = observed(part, case).drawn
    require(declared or not drawn, "the loss draws random numbers, but draws_random is False")


def signals_are_left_alone(part: Part, case: PairCase) -> None:
    """Nothing in the signals is written to, by the loss or its backward pass."""
    found = observed(part, case)
    require(not found.written, f"changed in place: {', '.join(sorted(found.written))}")


def goes_into_a_later_joint_stage(part: Part, case: PairCase) -> None:
    """It trains as a second stage, held by a reference, jointly with kd; frozen parts stay."""
    tried = trial([part, Part(KD(ce_weight=0.0))], case, later=True)
    watched = [*tried.teachers, reference_of(tried)]
    before = [copy.deepcopy(model.state_dict()) for model in watched]
    for epoch in PHASES:
        task, distill = tried.terms(tried.batch(), epoch)
        tried.run.objective.descend(task, distill, tried.run.optimizer)
        require("reference" in distill, "the reference is missing")
        require_finite(task, distill, tried.parameters())
    for model, state in zip(watched, before, strict=True):
        require(not any(m.training for m in model.modules()), "a frozen network is training")
        require(all(p.grad is None for p in model.parameters()), "a frozen network has a gradient")
        require(not differing(state, model.state_dict()), "a frozen network was changed")
