"""One pair on one device: its data, its networks, its tables, and loops of our own step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.folded_loop import with_seed
from benchmarks.images import INFO, TrainImages
from benchmarks.interleave import Contestant
from benchmarks.ours import Options, OurLoop, filled_table, plain_number, plain_view, resident
from benchmarks.pair import CALIBRATION_IMAGES, SEED, Networks, Pair
from smskd.data import Batch
from smskd.datasets.base import DatasetInfo
from smskd.output_table import OutputTable


class BenchPair:
    """Builds loops that train the same pair from the same weights; closes them in the end.

    Args:
        pair: The networks, both known to the zoo.
        data: The training set.
        batch_size: B.
        device: Where to train.
        info: Facts about the training set.
    """

    def __init__(
        self,
        pair: Pair,
        data: TrainImages,
        batch_size: int,
        device: torch.device,
        info: DatasetInfo = INFO,
    ) -> None:
        self.pair, self.device = pair, device
        self.batches = resident(data, batch_size, device, info=info)
        calibration = torch.arange(CALIBRATION_IMAGES, device=device)
        images = plain_view(self.batches, calibration).cpu()
        self.networks = Networks(pair, info.num_classes, images)
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory()))

    def __enter__(self) -> BenchPair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def loop(self, options: Options, seed: int = SEED, teacher: nn.Module | None = None) -> OurLoop:
        """A new loop; ``teacher`` is shared with others, None is one of its own."""
        teacher = teacher or self.networks.teacher()
        batches = self.batches if seed == SEED else with_seed(self.batches, seed)
        student = self.networks.student(seed)
        made = OurLoop(self.pair, student, teacher, self.device, batches, options)
        self._stack.callback(made.close)
        return made

    def teacher_table(self, images: int) -> OutputTable:
        """The teacher's table, filled for the first ``images`` that a loop reads."""
        teacher = self.networks.teacher()
        return filled_table(self._folder, self.pair.teacher, teacher, self.batches, images)

    def student_table(self, student: nn.Module, images: int) -> OutputTable:
        """The table of a student that is frozen as the reference."""
        return filled_table(self._folder, self.pair.student, student, self.batches, images)

    def plain_batch(self) -> Batch:
        """An un-augmented batch."""
        index = torch.arange(self.batches.batch_size, device=self.device)
        view = torch.full_like(index, plain_number(self.batches))
        return Batch(plain_view(self.batches, index), self.batches.labels[index], index, view)

    def image(self) -> Tensor:
        """One image ``(1, C, H, W)`` on the device."""
        return self.plain_batch().images[:1]


def turns_of(loops: Iterable[OurLoop], steps: int) -> list[Contestant]:
    """Turns of so many steps, each under the loop's own numerics."""
    return [
        Contestant(loop.name, partial(loop.train, steps), before=loop.numerics.apply)
        for loop in loops
    ]
