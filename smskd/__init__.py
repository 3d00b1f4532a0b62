"""smskd: knowledge distillation in successive stages, as a library.

Use it on your own networks and data::

    from smskd import Stage, Taps, distill
    from smskd.methods import METHODS

The names below are the whole public surface; ``docs/library.md`` walks through them. They are
loaded when first used, so that what needs no tensors (errors, data facts) does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from smskd._version import __version__

if TYPE_CHECKING:
    from smskd.data import Batch, Batches, LoaderBatches, Normalisation, ResidentBatches
    from smskd.errors import SmskdError
    from smskd.evaluate import Agreement, Evaluation, FixedSet
    from smskd.methods.base import Method, Modifier, Needs, PairShapes, Signals, Terms
    from smskd.methods.objective import Part
    from smskd.settings import Optimizer, Reference, Schedule, Weighting
    from smskd.stages import Stage, StageReport, distill
    from smskd.taps import Outputs, Shapes, Taps
    from smskd.views import Augmentation

_HOME = {
    "smskd.data": ("Batch", "Batches", "LoaderBatches", "Normalisation", "ResidentBatches"),
    "smskd.errors": ("SmskdError",),
    "smskd.evaluate": ("Agreement", "Evaluation", "FixedSet"),
    "smskd.methods.base": ("Method", "Modifier", "Needs", "PairShapes", "Signals", "Terms"),
    "smskd.methods.objective": ("Part",),
    "smskd.settings": ("Optimizer", "Reference", "Schedule", "Weighting"),
    "smskd.stages": ("Stage", "StageReport", "distill"),
    "smskd.taps": ("Outputs", "Shapes", "Taps"),
    "smskd.views": ("Augmentation",),
}

__all__ = [
    "Agreement",
    "Augmentation",
    "Batch",
    "Batches",
    "Evaluation",
    "FixedSet",
    "LoaderBatches",
    "Method",
    "Modifier",
    "Needs",
    "Normalisation",
    "Optimizer",
    "Outputs",
    "PairShapes",
    "Part",
    "Reference",
    "ResidentBatches",
    "Schedule",
    "Shapes",
    "Signals",
    "SmskdError",
    "Stage",
    "StageReport",
    "Taps",
    "Terms",
    "Weighting",
    "__version__",
    "distill",
]


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'smskd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
