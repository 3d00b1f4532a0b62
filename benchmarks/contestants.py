"""All contestants of the step benchmark for one pair of networks."""

from __future__ import annotations

from itertools import product, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.conventional import ConventionalLoop
from benchmarks.images import INFO, TrainImages
from benchmarks.loop import Loop
from benchmarks.ours import (
    Options,
    OurLoop,
    contestant_name,
    plain_view,
    resident,
    table_outputs,
)
from benchmarks.pair import CALIBRATION_IMAGES, Networks, Pair
from benchmarks.pil_loader import Passes, make_loader
from benchmarks.torchdistill_loop import TorchdistillLoop, why_missing
from smskd.settings import Precision

if TYPE_CHECKING:
    from benchmarks.kd_step import Settings

NO_TABLE = "no table of the teacher's outputs is connected"


class Contestants:
    """Loops that train the same pair from the same weights.

    Args:
        pair: The networks, both known to the zoo.
        data: The training set.
        settings: What is the same for all.

    Attributes:
        loops: In the table's order; the first is in fp32.
        missing: Why the others are not there, by name.
    """

    def __init__(self, pair: Pair, data: TrainImages, settings: Settings) -> None:
        self.pair, self.data, self.settings = pair, data, settings
        self.batches = resident(data, settings.batch_size, settings.device)
        calibration = torch.arange(CALIBRATION_IMAGES, device=settings.device)
        images = plain_view(self.batches, calibration).cpu()
        self.networks = Networks(pair, INFO.num_classes, images)
        self.missing: dict[str, str] = {}
        self.loops: list[Loop] = [*self._rivals(), *self._ours()]

    def plain_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Un-augmented images, labels and positions of one batch, on the device."""
        index = torch.arange(self.settings.batch_size, device=self.settings.device)
        return plain_view(self.batches, index), self.batches.labels[index], index

    def close(self) -> None:
        """End worker processes and take hooks off."""
        for loop in self.loops:
            loop.close()

    def _rivals(self) -> list[Loop]:
        s = self.settings
        images, labels, _ = self.plain_batch()
        # Their order of memory; in ours their networks would be faster than they are.
        memory = (images.contiguous(), labels) if s.feed == "memory" else None
        loops: list[Loop] = []
        if missing := why_missing():
            self.missing[TorchdistillLoop.name] = missing
        else:
            loops.append(
                TorchdistillLoop(
                    *self._copies(), s.device, self.data, s.batch_size, s.workers, memory
                )
            )
        source: Passes | repeat[Any] = (
            repeat(memory) if memory else Passes(make_loader(self.data, s.batch_size, s.workers))
        )
        loops.append(ConventionalLoop(*self._copies(), s.device, source))
        return loops

    def _ours(self) -> list[Loop]:
        loops: list[Loop] = []
        table = table_outputs(self.pair, self.networks.teacher(), self.batches)
        precisions: tuple[Precision, ...] = ("fp32", "bf16")
        for from_table, precision in product((False, True), precisions):
            if from_table and table is None:
                self.missing[contestant_name(precision, table=True)] = NO_TABLE
                continue
            options = Options(precision, table if from_table else None)
            memory = self.settings.feed == "memory"
            device = self.settings.device
            loops.append(OurLoop(self.pair, *self._copies(), device, self.batches, options, memory))
        return loops

    def _copies(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return self.networks.student(), self.networks.teacher()
