"""``smskd-bench list``: everything that has a name, with one line on what it is."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from smskd_bench.report.columns import human

if TYPE_CHECKING:
    from smskd.methods.base import Component, Needs

WIDTH = 110
"""Characters of a line of settings."""


def lines(kind: str) -> Iterator[str]:
    """One line a name."""
    kinds = {"methods": _methods, "models": _models, "datasets": _datasets, "targets": _targets}
    return {**kinds, "published": _published}[kind]()


def _methods() -> Iterator[str]:
    from smskd.methods import METHODS, MODIFIERS

    yield f"{'name':<16} {'kind':<9} {'paper':<36} needs"
    for name, form in METHODS.items():
        yield f"{name:<16} {form.kind:<9} {form.paper or '-':<36} {_needs(form.needs)}"
        yield from _explained(form)
    for name, modifier in MODIFIERS.items():
        yield f"{name:<16} {'modifier':<9} {modifier.paper:<36} {_needs(modifier.needs)}"
        yield from _explained(modifier)


def _explained(form: type[Component]) -> Iterator[str]:
    """What it does, and its settings with their defaults."""
    settings = ", ".join(f"{f.name}={f.default}" for f in fields(form))  # type: ignore[arg-type]
    yield f"  {_first_line(form)}"
    yield from textwrap.wrap(settings, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _needs(needs: Needs) -> str:
    """What is asked of teacher and student beside their logits, in a few words."""
    teacher = " ".join(("logits", *sorted(needs.teacher_roles))) if needs.teacher else "none"
    student = " ".join(("logits", *sorted(needs.student_roles)))
    index = ", positions of samples" if needs.index else ""
    return f"teacher: {teacher}; student: {student}{index}"


def _models() -> Iterator[str]:
    import torch

    from smskd.models import MODELS, VIEWS

    torch.set_num_threads(1)  # costs are counted on one image, where threads only wait
    yield f"{'name':<16} {'parameters':>10} {'MACs':>8}  (100 classes, 3x32x32)"
    for name, entry in MODELS.items():
        parameters, macs = entry.size or _size(name)
        needs = f" (needs smskd-bench[{entry.extra}])" if entry.extra else ""
        yield f"{name:<16} {parameters:>10,} {human(macs):>8}  {entry.paper}{needs}"
    yield "and: torchvision:NAME, timm:NAME  any network of these packages, untrained"
    views = ", ".join(f"NAME@{view}" for view in VIEWS)
    yield f"     {views}  any of all these behind a limited view"


def _size(model: str) -> tuple[int, int]:
    from smskd_bench.cost import network_cost

    cost = network_cost(model, "cifar100")
    return cost.parameters, cost.macs


def _datasets() -> Iterator[str]:
    from smskd.datasets import DATASETS

    for name, entry in DATASETS.items():
        info = entry.info
        yield (
            f"{name:<10} {info.num_classes} classes, {info.num_train:,} training and "
            f"{info.num_test:,} test images, {info.channels}x{info.size}x{info.size}"
        )


def _targets() -> Iterator[str]:
    from smskd_export import list_targets, load_target

    for name in list_targets():
        yield f"{name:<10} {load_target(name).description}"


def _published() -> Iterator[str]:
    from smskd_bench.published import load_published

    yield f"{'pair':<24} {'method':<12} {'top-1':>5} {'std':>5}  {'source':<20} protocol"
    for n in load_published():
        std = "" if n.std is None else f"{n.std:.2f}"
        yield f"{n.pair:<24} {n.method:<12} {n.top1:>5.2f} {std:>5}  {n.source:<20} {n.protocol}"


def _first_line(form: type) -> str:
    module = inspect.getmodule(form)
    return (inspect.getdoc(module) or "").splitlines()[0]
