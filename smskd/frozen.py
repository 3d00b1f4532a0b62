"""What a network that does not change says about a batch: run live, or read from a table.

Teachers and the reference are frozen for a whole stage. The loop asks each of them through
:class:`Frozen` and does not know which of the two answers. Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from smskd.data import Batch
from smskd.taps import Outputs, TappedModel


class Frozen(Protocol):
    """A frozen network as the loop sees it."""

    @property
    def source(self) -> str:
        """Where the outputs come from: "live", or which kind of table; results record it."""

    def __call__(self, batch: Batch) -> Outputs:
        """Outputs for the batch, called under ``no_grad`` and the stage's precision."""

    def close(self) -> None:
        """Let go of whatever it holds."""


@dataclass
class Live:
    """Runs the network on the batch's images.

    Attributes:
        network: What is run.
        origin: The model it was made from; two with the same origin say the same.
        source: See :class:`Frozen`.
    """

    network: TappedModel
    origin: nn.Module
    source: str = "live"

    def __call__(self, batch: Batch) -> Outputs:
        """Run it."""
        return self.network(batch.images)

    def close(self) -> None:
        """Take the hooks off."""
        self.network.close()
