"""Files that a report writes: complete or absent, and nothing overwritten unasked."""

from __future__ import annotations

import os
from pathlib import Path

from smskd.atomic import write_atomically
from smskd.errors import StoreError


def check_target(path: Path, force: bool) -> None:
    """Refuse a file that is there already or cannot be written, before any work is done.

    Raises:
        StoreError: it exists and ``force`` is not given, or its folder cannot be written.
    """
    if path.is_dir():
        raise StoreError(f"{path} is a folder", "give the name of a file")
    if path.exists() and not force:
        raise StoreError(f"{path} is there already", "add --force to replace it, or name another")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StoreError(f"{path} cannot be written: {folder} is no folder to write to")


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}", "name another file"
        ) from None
