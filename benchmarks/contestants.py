"""All contestants of the step benchmark for one pair of networks."""

from __future__ import annotations

from itertools import product, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.conventional import ConventionalLoop
from benchmarks.images import INFO, TrainImages
from benchmarks.interleave import WARMUP_ROUNDS
from benchmarks.loop import Loop
from benchmarks.ours import (
    Options,
    OurLoop,
    filled_table,
    plain_view,
    resident,
)
from benchmarks.pair import CALIBRATION_IMAGES, Networks, Pair
from benchmarks.pil_loader import Passes, make_loader
from benchmarks.torchdistill_loop import TorchdistillLoop, why_missing
from smskd.output_table import OutputTable
from smskd.precision import why_not
from smskd.settings import Precision

if TYPE_CHECKING:
    from benchmarks.kd_step import Settings


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
        self._folder = TemporaryDirectory()
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
        self._folder.cleanup()

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
        table = self._table()
        precisions: tuple[Precision, ...] = ("fp32", "bf16")
        for from_table, precision in product((False, True), precisions):
            options = Options(precision, table if from_table else None)
            memory = self.settings.feed == "memory"
            device = self.settings.device
            if (reason := why_not(precision, device)) is not None:
                self.missing[options.name] = reason
                continue
            loops.append(OurLoop(self.pair, *self._copies(), device, self.batches, options, memory))
        return loops

    def _table(self) -> OutputTable:
        """The teacher's table, filled for as many steps as there can be."""
        s = self.settings
        images = (s.rounds + WARMUP_ROUNDS) * s.steps * s.batch_size
        folder, teacher = Path(self._folder.name), self.networks.teacher()
        return filled_table(folder, self.pair.teacher, teacher, self.batches, images)

    def _copies(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return self.networks.student(), self.networks.teacher()
