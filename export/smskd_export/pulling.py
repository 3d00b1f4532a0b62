"""Files from a device as one stream, kept as far as they came.

The device sends ``<mark> file <name>``, the bytes, a line end, ``<mark> end``, for each file, from
the offset that this side already has. The mark is drawn at random for each stream, so that neither
noise of a login nor the bytes of a file can be taken for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from smskd.errors import RunError
from smskd_export.measurement import RESULT

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.-]*")
"""Names that files of a measurement have."""

LARGEST = 4 << 30
"""Bytes that a measurement may have in all; more is no measurement."""

_LONGEST_LINE, _KEPT = 1 << 12, 1000


class Stream:
    """Writes the files of one stream into a folder.

    Args:
        folder: Where they go; parts that are there are continued.
        mark: What separates them.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        self._head = f"{mark} file ".encode()
        self._end = f"\n{mark} end\n".encode()
        self.received = 0
        self.others: list[bytes] = []
        """The lines between the files: noise, and the marks of the sending command."""

    def offsets(self) -> str:
        """What is there, as ``" name=first missing byte ..."``, for the sender."""
        parts = [p for p in sorted(self._folder.iterdir()) if PLAIN_NAME.fullmatch(p.name)]
        return "".join(f" {p.name}={p.stat().st_size + 1}" for p in parts) + " "

    def take(self, chunks: Iterable[bytes]) -> Iterator[int]:
        """Write the files; gives how many bytes have come, from time to time.

        Raises:
            RunError: the device sends what no measurement holds.
        """
        buffer, file = b"", None
        try:
            for chunk in chunks:
                buffer += chunk
                while True:
                    before = file, len(buffer)
                    file, buffer = self._body(file, buffer) if file else self._between(buffer)
                    if (file, len(buffer)) == before:
                        break
                yield self.received
        finally:
            if file is not None:
                file.close()

    def _between(self, buffer: bytes) -> tuple[IO[bytes] | None, bytes]:
        """Look for the next head; everything before it is noise."""
        line, newline, rest = buffer.partition(b"\n")
        if not newline:
            return None, buffer[-_LONGEST_LINE:]
        if not line.startswith(self._head):
            self.others = [*self.others, line][-_KEPT:]
            return None, rest
        name = line.removeprefix(self._head).decode("utf-8", "replace")
        if not PLAIN_NAME.fullmatch(name):
            raise RunError(f"the device sends a file named {name!r}, which no measurement has")
        return (self._folder / name).open("ab"), rest

    def _body(self, file: IO[bytes], buffer: bytes) -> tuple[IO[bytes] | None, bytes]:
        """Write what surely belongs to the file: the end mark may be half here."""
        at = buffer.find(self._end)
        if at >= 0:
            self._write(file, buffer[:at])
            file.close()
            return None, buffer[at + len(self._end) :]
        sure = max(0, len(buffer) - len(self._end))
        self._write(file, buffer[:sure])
        return file, buffer[sure:]

    def _write(self, file: IO[bytes], data: bytes) -> None:
        self.received += len(data)
        if self.received > LARGEST:
            raise RunError(f"the device sends more than {LARGEST >> 30} GiB; stopped")
        file.write(data)


def damaged(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that are not what ``result.json`` says, itself included."""
    try:
        record: Any = json.loads((folder / RESULT).read_bytes())
        files = dict(record["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return [RESULT]
    return [name for name, digest in files.items() if _sha256(folder, str(name)) != digest]


def _sha256(folder: Path, name: str) -> str | None:
    if not PLAIN_NAME.fullmatch(name):
        return None
    try:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
