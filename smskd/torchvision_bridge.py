"""Import torchvision beside a torch build that its compiled operators do not fit.

A torchvision wheel built for CUDA does not load its operators beside a CPU-only torch, and its
import then ends in "operator torchvision::nms does not exist". Models, transforms and data sets
need none of them: with the two operators declared (not defined), the import works.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import torch

from smskd.errors import ConfigError

_MISSING = "operator torchvision::nms does not exist"
_DECLARED: list[torch.library.Library] = []
"""Declarations last as long as their library object."""


def import_torchvision() -> ModuleType:
    """The torchvision package; only after that one import error are the operators declared.

    ``torchvision.ops.nms`` and the image codecs stay unusable beside such a torch.

    Raises:
        ConfigError: torchvision is not installed.
    """
    try:
        return import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ConfigError(
            "torchvision is needed here but not installed",
            "pip install 'torchvision>=0.26,<0.29'",
        ) from None
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    _forget_half_import()
    _declare_operators()
    return import_module("torchvision")


def _forget_half_import() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
