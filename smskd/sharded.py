"""One stage run trained by several processes, each of which runs the networks on a part of a batch.

Every process draws the same batches, as order and views are functions of seed and epoch, and takes
its own samples of each. What student and teachers say is gathered, so that every process computes
the loss of the whole batch: methods that relate samples to each other, and the modules of a method,
see what they see in one process. Only the student's gradients are then added up. The result is that
of one process, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from smskd.data import Batch
from smskd.errors import IncompatibleError
from smskd.meter import Meter
from smskd.methods.base import Signals
from smskd.precision import autocast
from smskd.ranks import Ranks
from smskd.shared_norm import share_norms
from smskd.train import Alone, StageRun, loss_terms


class Sharded(Alone):
    """A group of one stage run, in which every process of ``ranks`` takes part.

    Args:
        run: The same one, built alike, in every process. Its student's batch norms become shared.
        ranks: The processes.

    Raises:
        IncompatibleError: it cannot be divided.
    """

    def __init__(self, run: StageRun, ranks: Ranks) -> None:
        super().__init__(run)
        if (reason := why_not_sharded(run)) is not None:
            raise IncompatibleError(
                f"this stage run cannot be divided among processes: {reason}",
                "train it in one process",
            )
        self.ranks = ranks
        self._parameters = [p for p in run.student.model.parameters() if p.requires_grad]
        share_norms(run.student.model, ranks)
        run.optimizer.register_step_pre_hook(self._add_up_gradients)

    def step(self, batches: Sequence[Batch], epoch: int, meters: Sequence[Meter]) -> None:
        """Run the networks on our part of the batch and descend on the loss of the whole."""
        (run,), (batch,), (meter,) = self.runs, batches, meters
        count = len(batch.labels)
        if count < self.ranks.size:
            raise IncompatibleError(
                f"a batch of {count} samples cannot be divided among {self.ranks.size} processes",
                "choose a batch size that leaves no such rest, or start fewer processes",
            )
        ours = part_of(batch, self.ranks.part(count))
        whole = partial(self._whole, count)
        with autocast(run.training.precision, batch.images.device):
            student = run.student(ours.images).map(whole)
            with torch.no_grad():
                teachers = tuple(teacher(ours).map(whole) for teacher in run.teachers)
                said = run.anchor.network(ours).map(whole) if run.anchor else None
        networks = run.networks(batch.images) if run.reaches_networks else None
        signals = Signals(
            student, teachers, batch.labels, batch.index, epoch, run.training.epochs, networks
        )
        task, distill = loss_terms(run, signals, said, meter)
        run.objective.descend(task, distill, run.optimizer)

    def _whole(self, count: int, own: Tensor) -> Tensor:
        return self.ranks.gather(own, count)

    def _add_up_gradients(self, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        """Before a step: the student's gradients of all parts; a method's modules saw them all."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(total.view_as(gradient))


def part_of(batch: Batch, part: slice) -> Batch:
    """Some of a batch's samples."""
    view = None if batch.view is None else batch.view[part]
    return Batch(batch.images[part], batch.labels[part], batch.index[part], view)


def why_not_sharded(run: StageRun) -> str | None:
    """Why a stage run cannot be divided, or None."""
    if (reason := run.objective.why_not_shared()) is not None:
        return reason
    if has_dropout(run.student.model):
        return DROPOUT
    return None


DROPOUT = "its student's dropout draws random numbers, which would fall on other samples"


def has_dropout(model: nn.Module) -> bool:
    """Whether a network drops anything in training."""
    return any(isinstance(m, _DropoutNd) and m.p > 0.0 for m in model.modules())
