"""Training the same stage for several seeds at once, their students folded into one network.

A :class:`~smskd.train.Group` of S stage runs. Each keeps its own batches, loss, meter, history and
optimiser state, so that it is saved, evaluated and resumed as if it were alone; only what happens
within an epoch is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor, nn

from smskd.data import Batch
from smskd.errors import IncompatibleError
from smskd.folding import fold, part_of, split, unfold, why_not
from smskd.frozen import Frozen, Live
from smskd.meter import Meter
from smskd.methods.base import Signals, total
from smskd.precision import autocast
from smskd.taps import Network, Outputs, TappedModel
from smskd.train import StageRun, loss_terms, set_rate


class Folded:
    """A group of stage runs that differ in their seed (and what follows from it) only.

    Args:
        runs: At least two, at the same epoch.
        image: One network-ready image ``(1, C, H, W)``, to check that the students can be folded;
            without one that is taken for granted.

    Raises:
        IncompatibleError: they cannot be trained as one.
    """

    def __init__(self, runs: Sequence[StageRun], image: Tensor | None = None) -> None:
        reason = why_not_together(runs)
        if reason is None and image is not None:
            student = runs[0].student
            reason = why_not_foldable(Network(student.model, student.taps), len(runs), image)
        if reason is not None:
            raise IncompatibleError(f"these stage runs cannot be folded: {reason}")
        self.runs = tuple(runs)
        first = runs[0].student
        folded = fold([run.student.model for run in runs])
        self._student = TappedModel(folded, first.taps, first.roles)
        self._references = self._fold_references()
        self._optimizer = self._make_optimizer(folded)

    def begin(self, rate: float) -> None:
        """Set the rate and the training mode."""
        set_rate(self._optimizer, rate)
        self._student.model.train()
        for run in self.runs:
            run.objective.train()

    def step(self, batches: Sequence[Batch], epoch: int, meters: Sequence[Meter]) -> None:
        """Run all networks on their batches and descend once for all of them."""
        side_by_side = torch.cat([batch.images for batch in batches], dim=1)
        with autocast(self.runs[0].training.precision, side_by_side.device):
            students = split(self._student(side_by_side), len(self.runs))
            with torch.no_grad():
                teachers = self._ask_teachers(batches)
                references = self._ask_references(batches, side_by_side)
        terms = []
        for i, (run, batch, meter) in enumerate(zip(self.runs, batches, meters, strict=True)):
            epochs = run.training.epochs
            signals = Signals(students[i], teachers[i], batch.labels, batch.index, epoch, epochs)
            task, distill = loss_terms(run, signals, references[i], meter)
            run.objective.check_terms(task, distill)
            terms += [task, distill]
        # No parameter is shared, so the gradient of the sum is each run's own gradient.
        self._optimizer.zero_grad(set_to_none=True)
        total(*terms).backward()
        self._optimizer.step()

    def settle(self) -> None:
        """Copy weights, statistics and momentum into the runs."""
        unfold(self._student.model, [run.student.model for run in self.runs])
        for i, run in enumerate(self.runs):
            for ours, theirs in zip(self._parameters(), _student_parameters(run), strict=True):
                self._hand_over(run, ours, theirs, i)
            for parameter in run.objective.parameters():
                self._hand_over(run, parameter, parameter, None)

    def close(self) -> None:
        """Take the hooks off the folded networks."""
        self._student.close()
        if self._references:
            self._references.close()

    def _hand_over(self, run: StageRun, ours: Tensor, theirs: Tensor, part: int | None) -> None:
        momentum = self._optimizer.state.get(ours, {}).get("momentum_buffer")
        if momentum is not None:
            mine = momentum if part is None else part_of(momentum, part, len(self.runs))
            run.optimizer.state[theirs] = {"momentum_buffer": mine.clone()}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._student.model.parameters() if p.requires_grad]

    def _make_optimizer(self, folded: nn.Module) -> torch.optim.Optimizer:
        """SGD over the folded student and every run's modules, with the runs' momentum."""
        adapters = [p for run in self.runs for p in run.objective.parameters() if p.requires_grad]
        group = dict(self.runs[0].optimizer.param_groups[0])
        group["params"] = [*self._parameters(), *adapters]
        optimizer = torch.optim.SGD([group], fused=True)
        of_runs = [_student_parameters(run) for run in self.runs]
        for ours, *theirs in zip(self._parameters(), *of_runs, strict=True):
            states = [r.optimizer.state.get(p, {}) for r, p in zip(self.runs, theirs, strict=True)]
            found = [state.get("momentum_buffer") for state in states]
            if all(momentum is not None for momentum in found):
                joined = torch.cat([m for m in found if m is not None])
                # In the parameter's own layout, which the fused step walks through.
                optimizer.state[ours] = {"momentum_buffer": torch.empty_like(ours).copy_(joined)}
        for run in self.runs:
            for parameter in run.objective.parameters():
                if parameter in run.optimizer.state:
                    optimizer.state[parameter] = copy.deepcopy(run.optimizer.state[parameter])
        return optimizer

    def _fold_references(self) -> TappedModel | None:
        live = [_live_model(run) for run in self.runs]
        models = [network for network in live if network is not None]
        if len(models) < len(live):
            return None
        folded = fold([network.model for network in models])
        folded.requires_grad_(False)
        return TappedModel(folded, models[0].taps, models[0].roles)

    def _ask_references(
        self, batches: Sequence[Batch], side_by_side: Tensor
    ) -> Sequence[Outputs | None]:
        if self._references is not None:
            return split(self._references(side_by_side), len(self.runs))
        anchors = [run.anchor for run in self.runs]
        return [a.network(b) if a else None for a, b in zip(anchors, batches, strict=True)]

    def _ask_teachers(self, batches: Sequence[Batch]) -> list[tuple[Outputs, ...]]:
        """What every run's teachers say; one that all runs share is run once for all of them."""
        by_place = [
            _ask(places, batches) for places in zip(*(r.teachers for r in self.runs), strict=True)
        ]
        return [tuple(said[i] for said in by_place) for i in range(len(self.runs))]


def why_not_together(runs: Sequence[StageRun]) -> str | None:
    """Why stage runs cannot be trained as one, or None."""
    if len(runs) < 2:
        return "there is only one"
    first = runs[0]
    if any((r.training, r.epoch) != (first.training, first.epoch) for r in runs):
        return "they differ in their settings or their epoch"
    for run in runs:
        if (reason := run.objective.why_not_shared()) is not None:
            return reason
        if type(run.optimizer) is not torch.optim.SGD:
            return "their optimiser is not the recipe's"
    return None


def why_not_foldable(student: Network, count: int, image: Tensor) -> str | None:
    """Why copies of a student cannot be folded, or None; ``image`` is ``(1, C, H, W)``."""
    images = image + 0.1 * torch.arange(4.0, device=image.device).view(4, 1, 1, 1)
    return why_not([student] * count, images.contiguous(memory_format=torch.channels_last))


def _ask(teachers: Sequence[Frozen], batches: Sequence[Batch]) -> list[Outputs]:
    first = teachers[0]
    shared = isinstance(first, Live) and all(
        isinstance(t, Live) and t.origin is first.origin for t in teachers
    )
    if not shared:
        return [teacher(batch) for teacher, batch in zip(teachers, batches, strict=True)]
    assert isinstance(first, Live)
    said = first.network(torch.cat([batch.images for batch in batches]))
    ends = list(accumulate(len(batch.labels) for batch in batches))
    rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [said.map(itemgetter(part)) for part in rows]


def _live_model(run: StageRun) -> TappedModel | None:
    network = run.anchor.network if run.anchor else None
    return network.network if isinstance(network, Live) else None


def _student_parameters(run: StageRun) -> list[nn.Parameter]:
    return [p for p in run.student.model.parameters() if p.requires_grad]
