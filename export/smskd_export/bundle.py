"""A bundle on disk: sealed by its manifest, checked before it is used, named by its content."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from smskd.errors import StoreError
from smskd_export.manifest import (
    MANIFEST,
    PROTOCOL,
    RUNNER,
    Manifest,
    as_json,
    bundle_id,
    read_manifest,
)

INPUTS, LOGITS, CLASSES = "parity/inputs.npy", "parity/logits.npy", "parity/classes.npy"
_ALWAYS = (PROTOCOL, RUNNER, INPUTS, LOGITS, CLASSES)
_SHOWN = 5


def seal_bundle(folder: Path, manifest: Manifest) -> str:
    """Write the manifest of a folder that holds everything else, and return the bundle's id.

    Args:
        folder: The bundle.
        manifest: Everything but the hashes of the files, which are taken here.
    """
    sealed = replace(manifest, files=hash_files(folder))
    (folder / MANIFEST).write_text(as_json(sealed), encoding="utf-8")
    return bundle_id(folder)


def verify_bundle(folder: Path) -> Manifest:
    """Check that a bundle is whole: every file is the one that the manifest lists, and no other.

    Raises:
        StoreError: there is no bundle, or a file is missing, changed, unknown or no plain file.
    """
    manifest = read_manifest(folder)
    try:
        now = hash_files(folder)
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error}") from error
    listed = manifest.files
    changed = sorted(p for p in listed.keys() | now.keys() if listed.get(p) != now.get(p))
    if changed:
        raise StoreError(
            f"{folder}: missing, changed or unknown files: {_listed(changed)}",
            "get the bundle again, or export the student again",
        )
    _check_content(folder, manifest)
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` except the manifest, by path with forward slashes.

    Raises:
        StoreError: something there is neither a plain file nor a folder.
        OSError: a file cannot be read.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"{folder}: {name!r} is no plain file", "remove it")
        if path.is_file() and name != MANIFEST:
            hashes[name] = hash_file(path)
    return hashes


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_content(folder: Path, manifest: Manifest) -> None:
    """Check that what every bundle needs is among its files."""
    graphs = {graph.path: graph.sha256 for graph in manifest.graphs}
    lacking = sorted({*_ALWAYS, *graphs} - manifest.files.keys())
    wrong = sorted(p for p, sha256 in graphs.items() if manifest.files.get(p, sha256) != sha256)
    if lacking or wrong or not graphs:
        problem = f"lacks {_listed(lacking)}" if lacking else f"speaks of other graphs: {wrong}"
        raise StoreError(f"{folder} {problem}", "export the student again")


def _listed(names: list[str]) -> str:
    """Some of the names, as text that is safe to print."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(ascii(name)[1:-1] for name in names[:_SHOWN]) + more
