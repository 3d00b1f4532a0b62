"""Bundle and test set in one file, and back: nothing is used that was not checked.

The file is a tar of one exact form: plain files in order of their names, no times, no owners. Every
header must be byte for byte the one that this module writes, so links, devices, folders, long names
and all other things that a tar can hold are refused by one comparison.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from smskd.atomic import write_atomically
from smskd.errors import StoreError
from smskd_export.bundle import hash_file, verify_bundle
from smskd_export.manifest import MANIFEST, Manifest
from smskd_export.publish import published
from smskd_export.test_sets import has_test_set, verify_test_set

BUNDLE, TEST_SET = "bundle", "test_set"
MOST_FILES = 1000
MOST_BYTES = 8 << 30

_NAME = re.compile(r"(bundle|test_set)(/[A-Za-z0-9][A-Za-z0-9+_.-]*){1,4}")
_BLOCK, _LONGEST, _CHUNK = 512, 100, 1 << 20
_AGAIN = "get the file again, or write it again with smskd-bench export --archive"


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle that was checked.

    Attributes:
        bundle: Its folder.
        test_set: Folder of its test set; None if that is not there.
        manifest: What the bundle says of itself.
    """

    bundle: Path
    test_set: Path | None
    manifest: Manifest


def open_bundle(path: Path, cache: Path) -> OpenedBundle:
    """Find and check a bundle.

    Args:
        path: A bundle's folder, a folder that holds ``bundle/`` (and ``test_set/``), or an archive.
        cache: Folder where archives are unpacked, each once, named by its hash.

    Raises:
        StoreError: there is none, it is damaged, or it cannot be unpacked.
    """
    try:
        if path.is_file():
            return _open_folder(_unpacked(path, cache))
        if (path / MANIFEST).is_file() and path.absolute().name == BUNDLE:
            return _open_folder(path.absolute().parent)
        if (path / MANIFEST).is_file():
            return OpenedBundle(path, None, verify_bundle(path))
        return _open_folder(path)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def write_archive(opened: OpenedBundle, path: Path) -> None:
    """Write a bundle, and its test set if that is there, as one file; the same one every time.

    Raises:
        StoreError: a file has a name that archives cannot hold, or the file cannot be written.
    """
    folders = {BUNDLE: opened.bundle, TEST_SET: opened.test_set}
    files = {
        f"{top}/{found.relative_to(folder).as_posix()}": found
        for top, folder in folders.items()
        if folder is not None
        for found in folder.rglob("*")
        if found.is_file()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: _write(temporary, files))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into ``folder``, which is there and empty; nothing is checked but its form.

    Raises:
        StoreError: it holds anything but plain files in their places.
        OSError: it cannot be read, or a file cannot be written.
    """
    seen: set[str] = set()
    with archive.open("rb") as file:
        for name, size in _entries(file, archive):
            lower = PurePosixPath(name.lower())
            if seen.intersection(map(str, (lower, *lower.parents))):
                raise _refused(archive, f"holds {name!r} twice, or as a file and a folder")
            seen.add(str(lower))
            if len(seen) > MOST_FILES:
                raise _refused(archive, f"holds more than {MOST_FILES} files")
            _copy(file, folder / name, size, archive)


def _open_folder(folder: Path) -> OpenedBundle:
    manifest = verify_bundle(folder / BUNDLE)
    test_set = folder / TEST_SET
    if not has_test_set(test_set):
        return OpenedBundle(folder / BUNDLE, None, manifest)
    verify_test_set(test_set, manifest.test_set)
    return OpenedBundle(folder / BUNDLE, test_set, manifest)


def _unpacked(archive: Path, cache: Path) -> Path:
    """The folder of an archive's content, which is unpacked aside, checked, then put in place."""
    folder = cache / hash_file(archive)
    if not folder.exists():
        try:
            with published(folder) as scratch:
                unpack(archive, scratch)
                _open_folder(scratch)
        except StoreError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def _write(path: Path, files: dict[str, Path]) -> None:
    with path.open("wb") as out:
        for name, source in sorted(files.items()):
            if not _NAME.fullmatch(name) or len(name) > _LONGEST:
                raise ValueError(f"{name!r} is no name of a file in a bundle")
            data = source.read_bytes()
            out.write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))
        out.write(bytes(2 * _BLOCK))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _entries(file: IO[bytes], archive: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes; the reader takes each file's bytes before it asks for the next."""
    left = MOST_BYTES
    while True:
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK):
            break
        name, size = _parsed(block, archive)
        left -= size
        if left < 0:
            raise _refused(archive, f"holds more than {MOST_BYTES >> 30} GiB")
        yield name, size
    if file.read(_BLOCK + 1) != bytes(_BLOCK):
        raise _refused(archive, "goes on after its end, or ends too early")


def _parsed(block: bytes, archive: Path) -> tuple[str, int]:
    """Name and size in a header, which must be the one that :func:`_header` makes of them."""
    if len(block) < _BLOCK:
        raise _refused(archive, "ends too early")
    try:
        name, size = block[:_LONGEST].rstrip(b"\0").decode("ascii"), int(block[124:135], 8)
    except ValueError:
        raise _refused(archive, "is no archive of a bundle") from None
    if not _NAME.fullmatch(name) or size < 0:
        raise _refused(archive, f"holds {name!r}, which is no file of a bundle or a test set")
    if block != _header(name, size):
        raise _refused(archive, f"holds {name!r} as something else than a plain file")
    return name, size


def _copy(file: IO[bytes], path: Path, size: int, archive: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with path.open("xb") as out:
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                raise _refused(archive, f"ends within {path.name!r}")
            out.write(data)
            left -= len(data)
    padding = file.read(-size % _BLOCK)
    if padding != bytes(-size % _BLOCK):
        raise _refused(archive, f"holds something behind {path.name!r}, or ends there")


def _refused(archive: Path, what: str) -> StoreError:
    return StoreError(f"{archive} {what}", _AGAIN)
