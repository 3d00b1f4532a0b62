"""Commands on another machine, through the system's ssh program and the shell there.

Each command is one line of POSIX sh between two marks drawn at random: what a login prints around
it is told apart from what the command prints, and an end without the last mark is a lost link.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from smskd.errors import ConfigError, RunError, UsageError
from smskd_export.child import Child, split_lines
from smskd_export.ssh_errors import connection_error
from smskd_export.transport import LinkLostError, Step, plain

PROGRAM = "SMSKD_SSH"
"""Environment variable: what to run instead of ``ssh``, e.g. ``ssh -F my_config``."""

_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
    "LogLevel": "ERROR",
}
_DEVICE = re.compile(
    r"(ssh://)?([A-Za-z0-9_.][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_.:\[][A-Za-z0-9_.:%\[\]-]*"
)
# The login shell may be any: no line ends, quotes or backslashes in what it must pass on to sh.
_FRAME = 'm=$1; shift; echo; echo "$m begin"; ( %s ); c=$?; echo; echo "$m exit $c"'
_SHOWN = 3


class Session:
    """One command on the device while it runs; leaving the block ends it.

    Args:
        device: A checked name.
        script: One line of sh; its arguments are ``"$@"``, and ``$m`` is the mark.
        arguments: Any text, for the script.
        mark: What its marks begin with.

    Raises:
        RunError: there is no ssh program here.
    """

    def __init__(self, device: str, script: str, arguments: Sequence[str], mark: str) -> None:
        self._device, self.mark = device, mark
        self._noise: list[str] = []
        self._begun = False
        self._code: int | None = None
        remote = shlex.join(["sh", "-c", _FRAME % script, "smskd", mark, *arguments])
        self.child = _start([*_program(), "-T", *_options(), "--", device, remote])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.child.end()

    def chunks(self, data: Iterable[bytes] | None = None) -> Iterator[bytes]:
        """Everything that comes, marks included."""
        return self.child.chunks(data)

    def lines(self, data: Iterable[bytes] | None = None) -> Iterator[bytes]:
        """What the command itself prints; ``data`` goes to its input."""
        for line in split_lines(self.chunks(data)):
            if self._code is None and not self.at_mark(line) and self._begun:
                yield line

    def at_mark(self, line: bytes) -> bool:
        """Take note of a mark, and of what stands before the first one."""
        text = line.decode("utf-8", "replace")
        if text.startswith(self.mark):
            self._begun = self._begun or text == f"{self.mark} begin"
            ended = re.fullmatch(rf"{self.mark} exit (\d+)", text)
            self._code = int(ended[1]) if ended else self._code
            return bool(ended) or text == f"{self.mark} begin"
        if not self._begun:
            self._noise = [*self._noise, plain(text).strip()][-_SHOWN:]
        return False

    def finish(self, step: Step) -> int:
        """Wait for the end; the exit status of the command.

        Raises:
            RefusedError: ssh does not get in.
            RunError: ssh fails otherwise, or the login runs no commands.
            LinkLostError: the link broke.
        """
        status = self.child.end()
        if self._code is not None:
            return self._code
        said = [plain(line.decode("utf-8", "replace")).strip() for line in self.child.complaints]
        said = [line for line in said if line]
        if not self._begun and (refusal := connection_error(self._device, said)):
            raise refusal
        if self._begun or status == _SSH_FAILED:
            detail = f" ({said[-1]})" if said else ""
            raise LinkLostError(
                f"the link to {self._device} was lost while {step.doing}{detail}", step.remedy
            )
        noise = " / ".join(filter(None, [*self._noise, *said[-_SHOWN:]])) or "it says nothing"
        raise RunError(
            f"the login on {self._device} runs no commands: {noise}",
            f"make this work: ssh {self._device} true",
        )


_SSH_FAILED = 255


def new_mark() -> str:
    """A mark that nothing else on the line can be."""
    return f"smskd-{secrets.token_hex(8)}"


def checked_device(device: str) -> str:
    """A device's name that ssh cannot take for anything else.

    Raises:
        UsageError: it is none.
    """
    if _DEVICE.fullmatch(device):
        return device
    raise UsageError(
        f"{plain(device)!r} is no name of a device",
        "user@host, a Host of ~/.ssh/config, or ssh://user@host:port; "
        "passwords have no place in it",
    )


def _program() -> list[str]:
    try:
        return shlex.split(os.environ.get(PROGRAM, "")) or ["ssh"]
    except ValueError as error:
        raise ConfigError(f"{PROGRAM} cannot be read: {error}", "quote it as in a shell") from error


def _options() -> list[str]:
    return [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]


def _start(command: list[str]) -> Child:
    try:
        return Child(command, {**os.environ, "LC_ALL": "C"})
    except OSError as error:
        raise RunError(
            f"cannot start {command[0]}: {error.strerror}",
            f"install the OpenSSH client, or name another program in {PROGRAM}",
        ) from error
