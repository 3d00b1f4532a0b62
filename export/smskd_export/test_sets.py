"""Test sets as devices get them: two arrays, named by their content, stored once."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smskd.errors import StoreError
from smskd_export.manifest import TestSet
from smskd_export.publish import published

IMAGES, LABELS = "images.npy", "labels.npy"
FILES = (IMAGES, LABELS)
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


def hash_test_set(folder: Path) -> str:
    """SHA-256 over both files of a test set.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").hexdigest().encode())
    return digest.hexdigest()


def place_test_set(
    images: NDArray[np.uint8], labels: NDArray[np.int64], folder: Path, shared: Path | None = None
) -> TestSet:
    """Put a test set into the new ``folder``, as hard links to ``shared/<its hash>`` if given.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        folder: Folder to make.
        shared: Where one copy for all bundles is kept; None: this one is the only copy.

    Raises:
        StoreError: the shared copy was changed, or cannot be written.
        OSError: ``folder`` cannot be written.
    """
    folder.mkdir()
    np.save(folder / IMAGES, np.ascontiguousarray(images), allow_pickle=False)
    np.save(folder / LABELS, np.ascontiguousarray(labels, dtype=np.int64), allow_pickle=False)
    found = TestSet(hash_test_set(folder), len(labels))
    if shared is not None:
        _share(folder, shared / found.sha256, found)
    return found


def has_test_set(folder: Path) -> bool:
    """Whether a folder looks like a test set."""
    return all((folder / name).is_file() for name in FILES)


def verify_test_set(folder: Path, wanted: TestSet) -> None:
    """Check that a folder holds a certain test set and nothing else.

    Raises:
        StoreError: it does not.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
        plain = all((folder / n).is_file() and not (folder / n).is_symlink() for n in FILES)
        right = plain and names == sorted(FILES) and hash_test_set(folder) == wanted.sha256
    except OSError as error:
        raise StoreError(f"cannot read the test set {folder}: {error}") from error
    if not right:
        raise StoreError(
            f"{folder} is not the test set of this bundle, or was changed",
            "get the export again, or measure without a test set",
        )


def _share(folder: Path, kept: Path, wanted: TestSet) -> None:
    """Make ``folder`` share its files with the test set of the same content that is kept.

    Where files cannot be linked, each folder has its own.
    """
    if kept.exists():
        verify_test_set(kept, wanted)
        for name in FILES:
            _replace_by_link(kept / name, folder / name)
        return
    try:
        with published(kept) as scratch:
            for name in FILES:
                os.link(folder / name, scratch / name)
    except StoreError as error:
        unlinkable = isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_LINKS
        if not (unlinkable or kept.exists()):  # another process may have been faster
            raise


def _replace_by_link(kept: Path, path: Path) -> None:
    link = path.with_name(f".{path.name}")
    try:
        os.link(kept, link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return
    link.replace(path)
