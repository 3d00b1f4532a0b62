"""How often the test set was looked at: every look is a chance to choose on it."""

from __future__ import annotations

from dataclasses import dataclass

from smskd_bench.store import Record


@dataclass(frozen=True)
class EvaluationCount:
    """Evaluations on the test set.

    Attributes:
        stage_runs: Finished stage runs, teachers included.
        evaluations: Of all of them together.
        most: Of the stage run with most.
    """

    stage_runs: int
    evaluations: int
    most: int

    @property
    def text(self) -> str:
        """The count in a sentence."""
        return (
            f"The test set was evaluated {self.evaluations:,} times in {self.stage_runs:,} "
            f"finished stage runs, at most {self.most} times in one; no number was chosen by it."
        )


def evaluations_of(record: Record) -> int:
    """Evaluations of one finished stage run: its result, and those for curves on the way."""
    return 1 + sum("test_top1" in epoch for epoch in record.get("history", ()))
