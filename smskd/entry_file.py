"""A memory-mapped array of which only some entries are filled, with checksums.

Beside the entries ``(N, V, D)`` lies a small state file: which entries are filled, and the SHA-256
of the filled entries of every block. What does not match its checksum when it is opened, because it
was altered or truncated, is emptied and so filled anew. Entries written after the last save count
as not filled.

Shapes: N samples, V views, D numbers an entry.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smskd.atomic import write_atomically

BLOCK_BYTES = 4 * 2**20
"""Size of what one checksum covers, and so of what one altered byte costs."""

DIGEST = 32
"""Bytes of a SHA-256."""


class EntryFile:
    """Entries ``(N, V, D)`` in a file; opening verifies every checksum.

    Callers see to it that only one process writes at a time.

    Args:
        path: The file; its state lies beside it, ``.state`` added to the name.
        shape: (N, V, D).
        dtype: Of the numbers.

    Raises:
        OSError: the file cannot be made at its full size.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.damaged = 0
        row_bytes = shape[1] * shape[2] * self.dtype.itemsize
        self._block = max(1, BLOCK_BYTES // row_bytes)
        self._touched: set[int] = set()
        _reserve(path, shape[0] * row_bytes)
        self.entries: NDArray[np.generic] = np.memmap(path, self.dtype, "r+", shape=shape)
        self.refresh()

    @property
    def num_bytes(self) -> int:
        """Size of the entries."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def refresh(self) -> None:
        """Read the state again, and empty what does not match it."""
        blocks = -(-self.shape[0] // self._block)
        state = _read_state(self._state_path, self.shape, blocks)
        if state is None:
            state = np.zeros(self.shape[:2], bool), np.zeros((blocks, DIGEST), np.uint8)
        self.filled, self._digests = state
        self.damaged = 0
        for block in range(blocks):
            rows = self._rows(block)
            if not self.filled[rows].any() or self._digest(block) == bytes(self._digests[block]):
                continue
            self.damaged += int(self.filled[rows].sum())
            self.filled[rows] = False

    def write(
        self, index: NDArray[np.int64], view: NDArray[np.int64], values: NDArray[np.generic]
    ) -> None:
        """Fill entries ``(index, view)``, each ``(B,)``, with ``(B, D)``; :meth:`save` keeps it."""
        self.entries[index, view] = values
        self.filled[index, view] = True
        self._touched.update((index // self._block).tolist())

    def save(self) -> None:
        """Make what was written last: entries first, then the state that vouches for them."""
        if not self._touched:
            return
        assert isinstance(self.entries, np.memmap)
        self.entries.flush()
        for block in self._touched:
            self._digests[block] = np.frombuffer(self._digest(block), np.uint8)
        self._touched.clear()
        state = self._digests.tobytes() + np.packbits(self.filled).tobytes()
        data = hashlib.sha256(state).digest() + state
        write_atomically(self._state_path, lambda temporary: temporary.write_bytes(data))

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(self.path.name + ".state")

    def _rows(self, block: int) -> slice:
        return slice(block * self._block, (block + 1) * self._block)

    def _digest(self, block: int) -> bytes:
        # Of filled entries only: what a killed process wrote after its last save does no harm.
        rows = self._rows(block)
        return hashlib.sha256(self.entries[rows][self.filled[rows]].data).digest()


def _reserve(path: Path, size: int) -> None:
    """Give the file its full size; a full disk must show here, not as a crash at a later write."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):  # not everywhere
            os.posix_fallocate(handle, 0, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _read_state(
    path: Path, shape: tuple[int, int, int], blocks: int
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]] | None:
    """Which entries are filled, and the digests; None if the state is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    written, state = data[:DIGEST], data[DIGEST:]
    if hashlib.sha256(state).digest() != written:
        return None
    digests = np.frombuffer(state, np.uint8, blocks * DIGEST).reshape(blocks, DIGEST)
    packed = np.frombuffer(state, np.uint8, offset=blocks * DIGEST)
    bits = np.unpackbits(packed, count=shape[0] * shape[1])
    return bits.astype(bool).reshape(shape[:2]), digests.copy()
