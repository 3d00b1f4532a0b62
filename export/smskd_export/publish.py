"""A directory that is complete or absent: built beside its place, then renamed into it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smskd.errors import StoreError


@contextmanager
def published(out_dir: Path) -> Iterator[Path]:
    """Give a scratch directory that becomes ``out_dir`` if the block ends well.

    An exception in the block removes the scratch directory; a killed process leaves it behind,
    under a name that begins with a dot and holds ``.partial-``. ``out_dir`` itself is never half
    there, and what it holds is on the disk before it gets its name.

    Raises:
        StoreError: ``out_dir`` exists with content, or the place cannot be written.
    """
    scratch = out_dir.parent / f".{out_dir.name}.partial-{secrets.token_hex(6)}"
    try:
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise StoreError(f"{out_dir} already exists", "delete it, or choose another place")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        _sync_tree(scratch)
        scratch.rename(out_dir)
        _sync(out_dir.parent)
    except OSError as error:
        raise StoreError(
            f"cannot write {out_dir}: {error}", "choose a place that is writable and has space"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Force a file, or the list of names of a directory, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
