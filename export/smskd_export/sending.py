"""A folder as a tar stream whose end cannot be mistaken."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smskd.errors import StoreError

WHOLE = ".whole"
"""The last, empty file of every stream: without it the stream was cut off."""

_BLOCK, _CHUNK, _CLUSTER = 512, 1 << 16, 4096


@dataclass(frozen=True)
class Payload:
    """Files that travel together.

    Attributes:
        folder: Where they lie.
        names: Their paths in it; None: all plain files.
    """

    folder: Path
    names: tuple[str, ...] | None = None

    def packed(self) -> Iterator[bytes]:
        """A tar stream that depends on nothing but names and bytes.

        Raises:
            StoreError: a file cannot be read, or changes meanwhile.
        """
        for path in self._files():
            try:
                yield from _member(path.relative_to(self.folder).as_posix(), path)
            except (OSError, ValueError) as error:
                raise StoreError(f"cannot send {path}: {error}") from error
        yield _head(WHOLE, 0)
        yield bytes(2 * _BLOCK)

    def kilobytes(self) -> int:
        """Space that they take on a disk."""
        clusters = sum(-(-path.stat().st_size // _CLUSTER) for path in self._files())
        return clusters * _CLUSTER // 1024

    def size(self) -> int:
        """Bytes of their content."""
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        if self.names is not None:
            return [self.folder / name for name in self.names]
        found = self.folder.rglob("*")
        return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _member(name: str, path: Path) -> Iterator[bytes]:
    left = path.stat().st_size
    padding = -left % _BLOCK
    yield _head(name, left)
    with path.open("rb") as file:
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise ValueError("it became shorter meanwhile")
            left -= len(chunk)
            yield chunk
    if padding:
        yield bytes(padding)


def _head(name: str, length: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = length, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
