"""How a run is stopped from outside: Ctrl-C, a scheduler's SIGTERM, or a terminal that is gone.

The first signal asks: a training loop that listens writes a checkpoint after its next step and
ends; all else ends at once. The second signal ends the process where it stands. Checkpoints are
complete or absent, so neither harms anything.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = b"\x1b[?25h\n"
"""A progress display hides it."""
STEP_S = 1.2
"""A loop that does not come to the end of its step in this time is stopped without a checkpoint."""


class Interrupted(KeyboardInterrupt):
    """The run was told to stop.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """Whether this process was told to stop.

    Args:
        patient: A second signal does not end the process where it stands: a scheduler may send
            the same one twice, to the job and to its step.

    Attributes:
        number: The signal that said so; None if none did.
    """

    def __init__(self, patient: bool = False) -> None:
        self.number: int | None = None
        self._patient = patient
        self._listening = False

    @contextmanager
    def on(self, signals: Iterable[signal.Signals] = STOPPING) -> Iterator[StopRequest]:
        """Take the signals in this block, except those that the process was started to ignore.

        Outside of the main thread no signal can be taken, and none is.
        """
        before = {}
        for number in (*signals, signal.SIGALRM):
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup, or a shell's background job
                continue
            try:
                before[number] = signal.signal(number, self._heard)
            except ValueError:
                break
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this block :meth:`check` is called often, and decides where to stop."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    @property
    def asked(self) -> bool:
        """Whether it was told to stop."""
        return self.number is not None

    def check(self) -> None:
        """End here if it was told to stop.

        Raises:
            Interrupted: it was.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            self.check()
            return
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.asked and self._patient:
            return
        if self.asked:
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os._exit(128 + number)
        self.number = number
        if not self._listening:
            self.check()
        signal.setitimer(signal.ITIMER_REAL, STEP_S)


def _leave_terminal() -> None:
    """Words to a terminal that is gone must not stop us before the checkpoint does."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (1, 2):
        os.dup2(nowhere, handle)
    os.close(nowhere)
