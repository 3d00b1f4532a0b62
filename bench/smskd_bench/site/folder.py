"""The site's folder: complete or absent, and never in the place of anything that is not ours."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smskd.atomic import sync_folder, write_json
from smskd.errors import StoreError
from smskd.strict_json import parse_json

MARKER = ".smskd-bench-site.json"
FORM = 1
ABANDONED_S = 24 * 3600.0
"""Age of an unfinished folder that nobody works on any more."""


def check_folder(folder: Path, force: bool) -> None:
    """Refuse a target before any work is done.

    Raises:
        StoreError: it holds something, and ``force`` is not given or not all of it is ours; or it
            cannot be written.
    """
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(
            f"{folder} cannot be written: {parent} is no folder to write to", "name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file", "name a folder that is not there yet")
    if folder.is_dir() and not _is_empty(folder):
        _check_ours(folder, force)


def _is_empty(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is None
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error}") from None


def _check_ours(folder: Path, force: bool) -> None:
    ours = _written_files(folder)
    if ours is None:
        raise StoreError(
            f"{folder} holds files and is no site of this command; it is left as it is",
            "name a folder that is empty or not there yet",
        )
    if foreign := sorted(_content(folder) - ours):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise StoreError(
            f"{folder} holds files that this command did not write: {', '.join(foreign[:3])}{more}",
            "move them elsewhere, or name another folder",
        )
    if not force:
        raise StoreError(f"{folder} is there already", "add --force to replace it")


def _content(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def _written_files(folder: Path) -> set[str] | None:
    """What the site's own list says it is made of; None if it is no site."""
    try:
        marker = parse_json((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = marker.get("files") if isinstance(marker, dict) else None
    known = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return {MARKER, *files} if known and files is not None else None


@contextmanager
def new_site(folder: Path, force: bool) -> Iterator[Path]:
    """A folder to write the site into; when the block ends well it takes its place.

    A kill leaves the old site or the new one, and at most a hidden unfinished folder beside it,
    which a later call removes.

    Raises:
        StoreError: it cannot be written, or somebody else wrote there meanwhile.
    """
    target = folder.resolve()  # a link stays, and leads to the new site
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        work.chmod(0o755)  # as other folders: a site is made to be shown
        try:
            yield work
            write_json(work / MARKER, {"form": FORM, "files": sorted(_content(work))})
            check_folder(target, force)
            _put(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}",
            "free some space, or name another folder",
        ) from None


def _put(work: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f"{work.name.replace('.partial-', '.old-')}")
        target.rename(old)
        work.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        work.rename(target)
    sync_folder(target.parent)


def _sweep(target: Path) -> None:
    """Remove what killed calls left beside the site."""
    for kind in ("partial", "old"):
        for path in target.parent.glob(f".{_literal(target.name)}.{kind}-*"):
            if kind == "old" and not target.exists():
                path.rename(target)  # killed between taking the old one away and putting the new
            elif time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
