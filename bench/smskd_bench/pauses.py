"""When a stage run is saved within an epoch: before a stop, and now and then in a long one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from smskd.train import StageRun
from smskd_bench.leases import LeaseLostError
from smskd_bench.stopping import StopRequest

EVERY_S = 300.0
"""Most work that a kill can cost: an epoch, or this."""


class Pauses:
    """See :class:`smskd.train.Pause`.

    Args:
        stop: Whether the process was told to stop.
        save: Writes the checkpoint of one run.
        is_lost: Whether another machine took one of the stage runs over.
    """

    def __init__(
        self,
        stop: StopRequest,
        save: Callable[[StageRun], None],
        is_lost: Callable[[], bool],
    ) -> None:
        self._stop = stop
        self._save = save
        self._is_lost = is_lost
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether to save after this step."""
        late = time.monotonic() - self._saved > EVERY_S
        return late or self._stop.asked or self._is_lost()

    def take(self, runs: Sequence[StageRun]) -> None:
        """Save, and stop if that was asked.

        Raises:
            Interrupted: it was.
            LeaseLostError: they are no longer ours, so that nothing may be saved.
        """
        self.check_ours()
        for run in runs:
            self._save(run)
        self.saved()
        self._stop.check()

    def check_ours(self) -> None:
        """Nothing may be saved that another machine took over.

        Raises:
            LeaseLostError: it did.
        """
        if self._is_lost():
            raise LeaseLostError("another machine took it over, as this one was away for a minute")

    def saved(self) -> None:
        """An epoch was saved."""
        self._saved = time.monotonic()
