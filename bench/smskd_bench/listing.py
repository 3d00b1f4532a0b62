"""``smskd-bench list``: everything that has a name, with one line on what it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields

from smskd_bench.report.tables import human


def lines(kind: str) -> Iterator[str]:
    """One line a name."""
    return {"methods": _methods, "models": _models, "datasets": _datasets, "targets": _targets}[
        kind
    ]()


def _methods() -> Iterator[str]:
    from smskd.methods import METHODS, MODIFIERS

    for name, form in METHODS.items():
        settings = ", ".join(f"{f.name}={f.default}" for f in fields(form))
        yield f"{name:<12} {form.kind:<9} {settings}"
        yield f"{'':<12} {_first_line(form)}"
    for name, modifier in MODIFIERS.items():
        yield f"{name} (modifier)"
        yield f"{'':<12} {_first_line(modifier)}"


def _models() -> Iterator[str]:
    import torch

    from smskd.models import MODELS
    from smskd_bench.cost import network_cost

    torch.set_num_threads(1)  # costs are counted on one image, where threads only wait
    yield f"{'name':<16} {'parameters':>10} {'MACs':>8}  (100 classes, 3x32x32)"
    for name, entry in MODELS.items():
        cost = network_cost(name, "cifar100")
        yield f"{name:<16} {cost.parameters:>10,} {human(cost.macs):>8}  {entry.paper}"


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


def _first_line(form: type) -> str:
    module = inspect.getmodule(form)
    return (inspect.getdoc(module) or "").splitlines()[0]
