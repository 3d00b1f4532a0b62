"""Every error a user can meet, in one tree.

SmskdError
  UsageError            exit 2: what was asked cannot be understood
    ConfigError           a matrix file or a setting is wrong
    UnknownNameError      a name is not in its registry
  RefusedError          exit 3: understood, but a check says no
    DataError             data unreadable or corrupt
      MissingDataError      data not there at all
    TableError            a table of outputs cannot be made or written
    StoreError            store unwritable, damaged or newer than this program
    IncompatibleError     this method cannot work with this pair of networks
    ExportError           the exported graph failed a check
  RunError              exit 4: started, and did not end well
    DivergedError         a loss term became NaN or infinite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from smskd.printable import printable


class SmskdError(Exception):
    """A problem with one clear message: what, where and why, then what to do next.

    Both may name anything found in a file; what could steer a terminal is escaped here.

    Args:
        message: What went wrong, where, and why.
        hint: What the user can do next; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = printable(message)
        self.hint = printable(hint)

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class UsageError(SmskdError):
    """What was asked cannot be understood."""

    exit_code = 2


class ConfigError(UsageError):
    """A matrix file or a setting is wrong."""


class UnknownNameError(UsageError):
    """A name is not in its registry."""


class RefusedError(SmskdError):
    """The request was understood, but a check says no."""

    exit_code = 3


class DataError(RefusedError):
    """Data are missing, unreadable or corrupt."""


class MissingDataError(DataError):
    """Data are not there at all; they can be fetched."""


class TableError(RefusedError):
    """A table of a frozen network's outputs cannot be made or written; it can be run live."""


class StoreError(RefusedError):
    """The store is unwritable, damaged or newer than this program."""


class IncompatibleError(RefusedError):
    """This method cannot work with this pair of networks."""


class ExportError(RefusedError):
    """The exported graph failed a check."""


class RunError(SmskdError):
    """Something started and did not end well."""

    exit_code = 4


class DivergedError(RunError):
    """A loss term became NaN or infinite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt name: the close ones first, else all that are known."""
    names = sorted(map(str, known))  # a file may hold other keys than text
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(names)}" if names else "nothing is registered"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that is not in a registry."""
    return UnknownNameError(f"unknown {kind} {name!r}", did_you_mean(name, known))
