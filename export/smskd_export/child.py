"""A process that never outlives its use: its pipes are served together, and it is always ended."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Self

MAX_LINE = 1 << 18
"""Longest line, in bytes, that is looked at; longer ones are dropped."""

_CHUNK, _KEPT = 1 << 16, 1 << 14
_QUIET_S, _GRACE_S = 0.5, 5.0


class Child:
    """A running command with pipes for everything.

    Its input stays open while it runs, so a command that stops when its input ends does not
    outlive this process, however this process ends.

    Args:
        command: Program and arguments.
        env: Its environment; None: this one's.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=env,
        )
        self._complaints = b""
        for pipe in self._pipes():
            os.set_blocking(pipe.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def complaints(self) -> list[bytes]:
        """The last lines of its standard error."""
        return self._complaints.splitlines()

    def chunks(self, data: Iterable[bytes] | None = None) -> Iterator[bytes]:
        """What it prints, as it comes, until it ends; ``data`` goes to its input, which then ends.

        A command that does not want all of ``data`` is no error here.
        """
        stdin, stdout, stderr = self._pipes()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            if data is not None:
                selector.register(stdin, selectors.EVENT_WRITE, _Feed(stdin, data))
            while stdout in (key.fileobj for key in selector.get_map().values()):
                ready = selector.select(_QUIET_S)
                if not ready and self._process.poll() is not None:
                    return  # somebody else still holds the pipe
                for key, _ in ready:
                    got = key.data.write() if key.data else _read(key.fileobj)
                    if not got:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is stdout:
                        yield got
                    elif key.fileobj is stderr:
                        self._keep(got)

    def lines(self, data: Iterable[bytes] | None = None) -> Iterator[bytes]:
        """The same line by line, without line ends; lines beyond ``MAX_LINE`` are dropped."""
        return split_lines(self.chunks(data))

    def end(self) -> int:
        """End it, if it has not ended, and return its exit status.

        It is first told by the end of its pipes, then by signals.
        """
        stdin, stdout, stderr = self._pipes()
        try:
            stdin.close()
            stdout.close()
            self._wait()
        finally:
            if self._process.poll() is None:
                self._signal(signal.SIGKILL)
                self._process.wait()
            self._drain(stderr)
        return self._process.returncode

    def _wait(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(_GRACE_S)
                return
            except subprocess.TimeoutExpired:
                self._signal(number)

    def _signal(self, number: int) -> None:
        """To it and to what it started; until it is waited for, its group cannot be another's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _drain(self, pipe: IO[bytes]) -> None:
        """Keep what is left; somebody else may still hold the other end, so do not wait."""
        with contextlib.suppress(BlockingIOError, ValueError):
            while got := _read(pipe):
                self._keep(got)
        pipe.close()

    def _keep(self, got: bytes) -> None:
        self._complaints = (self._complaints + got)[-_KEPT:]

    def _pipes(self) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        return stdin, stdout, stderr


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; lines beyond ``MAX_LINE`` are dropped."""
    rest, dropping = b"", False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if not dropping and len(line) <= MAX_LINE:
                yield line
            dropping = False
        if len(rest) > MAX_LINE:
            rest, dropping = b"", True
    if rest and not dropping:
        yield rest


class _Feed:
    """Data on their way into a pipe, which is closed behind them."""

    def __init__(self, pipe: IO[bytes], data: Iterable[bytes]) -> None:
        self._pipe, self._data, self._rest = pipe, iter(data), b""

    def write(self) -> bytes:
        """Write what fits and return it: nothing at the end, or when nobody reads any more."""
        self._rest = self._rest or next(self._data, b"")
        with contextlib.suppress(BrokenPipeError):
            written = os.write(self._pipe.fileno(), self._rest) if self._rest else 0
            sent, self._rest = self._rest[:written], self._rest[written:]
            if sent:
                return sent
        self._pipe.close()
        return b""


def _read(pipe: object) -> bytes:
    """Some bytes; nothing at the end."""
    return os.read(pipe.fileno(), _CHUNK)  # type: ignore[attr-defined]
