"""The ways of training that the learning benchmark compares, each from initial to trained student.

A way trains several seeds only if it folds them. Every way is given the networks as they are before
training and the same teacher, and trains them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from smskd_bench.worker import to_device
from torch import nn

from benchmarks.conventional import LEARNING_RATE, ConventionalLoop
from benchmarks.expected_sheets import BF16, COMPILED, CONVENTIONAL, FOLDED, LIVE, TABLE, TF32
from benchmarks.learning_setting import Images, Setting
from benchmarks.numerics import EXACT, unchanged_numerics
from benchmarks.ours import plain_view
from benchmarks.pair import Pair
from benchmarks.pil_loader import Passes, make_loader
from smskd.compiled import compile_networks
from smskd.data import ResidentBatches
from smskd.folded import Folded
from smskd.methods import METHODS
from smskd.models import taps_of
from smskd.output_table import OutputTable, TableSettings, drawn
from smskd.seeding import derive
from smskd.settings import Precision, Schedule, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network
from smskd.train import StageRun, train, train_group


@dataclass(frozen=True)
class Lesson:
    """What a way of training is given.

    Attributes:
        setting: The recipe.
        images: To learn from.
        teacher: Trained; in evaluation mode.
        students: One for each seed, trained in place.
        seeds: Several for a way that folds them, else one.
        tables: Folder for tables of the teacher's outputs.
    """

    setting: Setting
    images: Images
    teacher: nn.Module
    students: Sequence[nn.Module]
    seeds: Sequence[int]
    tables: Path


Way = Callable[[Lesson], None]


def conventional(lesson: Lesson) -> None:
    """PIL images, a DataLoader in this process, the conventional step; rate by our schedule."""
    setting, (student,), (seed,) = lesson.setting, lesson.students, lesson.seeds
    torch.manual_seed(derive(seed, "conventional"))  # order and crops come from torch's generator
    loader = make_loader(lesson.images.train, setting.batch_size, 0)
    loop = ConventionalLoop(student, lesson.teacher, torch.device(setting.device), Passes(loader))
    loop.numerics.apply()
    with closing(loop):
        for epoch in range(1, setting.epochs + 1):
            rate = LEARNING_RATE * Schedule().factor(epoch, setting.epochs)
            for group in loop.optimizer.param_groups:
                group["lr"] = rate
            loop.train(len(loader))


@dataclass(frozen=True)
class Ours:
    """Our training, as the harness does it.

    Attributes:
        precision: Of the networks.
        table: Whether the teacher is looked up in a table of fp16 numbers.
        compiled: Whether networks are compiled.
    """

    precision: Precision = "fp32"
    table: bool = False
    compiled: bool = False

    def __call__(self, lesson: Lesson) -> None:
        """Train each seed by itself."""
        EXACT.apply()
        for student, seed in zip(lesson.students, lesson.seeds, strict=True):
            batches = lesson.images.resident(lesson.setting, seed)
            run = self.prepared(lesson, student, seed, batches)
            with closing(run):
                train(run, batches, _nothing)

    def prepared(
        self, lesson: Lesson, student: nn.Module, seed: int, batches: ResidentBatches
    ) -> StageRun:
        """One seed's stage run."""
        setting, pair = lesson.setting, Pair.parse(lesson.setting.pair)
        teacher = Network(to_device(lesson.teacher, setting.device), taps_of(pair.teacher))
        run = prepare(
            Network(to_device(student, setting.device), taps_of(pair.student)),
            [teacher],
            Stage(METHODS["kd"](), epochs=setting.epochs),
            Training(setting.epochs, batch_size=setting.batch_size, precision=self.precision),
            plain_view(batches, torch.zeros(1, dtype=torch.int64, device=setting.device)),
            seed=seed,
            num_train=batches.num_samples,
            train_labels=batches.labels,
        )
        if self.table:
            run.teachers[0].close()
            run.teachers = (self._filled(lesson, teacher, batches),)
        if self.compiled:
            compile_networks(run)
        return run

    def _filled(self, lesson: Lesson, teacher: Network, batches: ResidentBatches) -> OutputTable:
        table = OutputTable(lesson.tables, teacher, batches, TableSettings("fp16", self.precision))
        table.fill(drawn(batches, range(1, lesson.setting.epochs + 1)))
        return table


def folded(lesson: Lesson) -> None:
    """All seeds as one network, in fp32 with the teacher live."""
    EXACT.apply()
    batches = [lesson.images.resident(lesson.setting, seed) for seed in lesson.seeds]
    given = zip(lesson.students, lesson.seeds, batches, strict=True)
    runs = [Ours().prepared(lesson, *one) for one in given]
    with closing(Folded(runs)) as group:
        train_group(group, batches, _nothing)
    for run in runs:
        run.close()


WAYS: dict[str, Way] = {
    CONVENTIONAL: conventional,
    LIVE: Ours(),
    TABLE: Ours(table=True),
    BF16: Ours(precision="bf16"),
    FOLDED: folded,
    TF32: Ours(precision="tf32"),
    COMPILED: Ours(compiled=True),
}
ALL_SEEDS_AT_ONCE = (FOLDED,)


def teach(way: str, lesson: Lesson) -> None:
    """Train by one way; torch's settings are left as they were.

    Raises:
        SmskdError: it diverged, or this machine cannot do it.
    """
    with unchanged_numerics():
        WAYS[way](lesson)


def _nothing(run: StageRun) -> None:
    pass
