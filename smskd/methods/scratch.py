"""Scratch: plain training on the labels. Teachers and the plain student are trained with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smskd.methods.base import Method, Needs, Signals, Terms


@dataclass(frozen=True)
class Scratch(Method):
    """Cross-entropy only; no teacher is run."""

    name: ClassVar[str] = "scratch"
    kind: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(teacher=False)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Nothing to distil."""
        return {}
