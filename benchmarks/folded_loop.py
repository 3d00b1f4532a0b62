"""Our training step for several seeds at once, as the harness folds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from benchmarks.ours import METER_STEPS, OurLoop
from smskd.data import ResidentBatches
from smskd.folded import Folded
from smskd.meter import Meter


class FoldedLoop:
    """Loops that differ in their seed, trained as one network.

    Args:
        loops: At least two with the same teacher; their own networks are no longer trained.
    """

    def __init__(self, loops: Sequence[OurLoop]) -> None:
        self.loops = loops
        self._group = Folded([loop.run for loop in loops])
        self._group.begin(loops[0].run.training.optimizer.lr)
        self._steps, self._meters = 0, self._new_meters()

    def train(self, steps: int) -> int:
        """So many steps of all seeds; returns the number of images of all."""
        images = 0
        for _ in range(steps):
            batches = [next(loop.source) for loop in self.loops]
            self._group.step(batches, 1, self._meters)
            images += sum(len(batch.labels) for batch in batches)
            self._end_of_step()
        return images

    def close(self) -> None:
        """Take the hooks off."""
        self._group.close()
        for loop in self.loops:
            loop.close()

    def _end_of_step(self) -> None:
        self._steps += 1
        if self._steps % METER_STEPS == 0:
            for meter in self._meters:
                meter.row()
            self._meters = self._new_meters()

    def _new_meters(self) -> list[Meter]:
        return [Meter(1, sharing=len(self.loops)) for _ in self.loops]


def with_seed(batches: ResidentBatches, seed: int) -> ResidentBatches:
    """The same training set in memory, in the order and with the views of another seed."""
    other = copy.copy(batches)
    other.seed = seed
    return other
