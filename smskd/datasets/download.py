"""Fetch a published archive, check it, and unpack it without trusting it."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath

from smskd.errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
"""Longest silence of the server; the whole download may take longer."""

MOST_FETCHED, MOST_UNPACKED, MOST_FILES = 1 << 30, 4 << 30, 10_000
"""Bytes of an archive and of what it holds: several times the largest data set that is known."""


def download_archive(url: str, md5: str, dest_dir: Path) -> None:
    """Download a ``.tar.gz``, check its MD5 and put what it holds into ``dest_dir``.

    All work is done in a temporary folder inside ``dest_dir``; each top-level entry of the archive
    is then renamed into place, so a folder that is there is complete. Links, devices and paths
    that lead out of the folder are refused.

    Args:
        url: Address of the archive.
        md5: Its published checksum, hexadecimal.
        dest_dir: Folder to unpack in; made if it does not exist.

    Raises:
        DataError: no connection, wrong checksum, unsafe or broken archive, target exists or
            disk full.
    """
    by_hand = f"or fetch {url} in another way and unpack it in {dest_dir}"
    try:
        dest_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=dest_dir) as work:
            archive, unpacked = Path(work, "archive"), Path(work, "unpacked")
            found = _fetch(url, archive)
            if found != md5:
                raise DataError(
                    f"download of {url}: MD5 is {found}, expected {md5}", f"try again, {by_hand}"
                )
            _unpack(archive, unpacked)
            _move_into_place(unpacked, dest_dir)
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = str(error) or type(error).__name__
        raise DataError(
            f"download of {url} to {dest_dir} failed: {reason}",
            f"check the connection and the free space and try again, {by_hand}",
        ) from error


def _fetch(url: str, path: Path) -> str:
    """Write the answer to ``path``; return its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, path.open("wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > MOST_FETCHED:
                raise DataError(
                    f"{url} sends more than {MOST_FETCHED} bytes, and no archive is as large",
                    "fetch the archive in another way",
                )
    return digest.hexdigest()


def _unpack(archive: Path, target: Path) -> None:
    """Write regular files only, by hand: tarfile's own filter is missing before Python 3.11.4."""
    target.mkdir()
    left = MOST_UNPACKED
    with tarfile.open(archive, "r:gz") as tar:
        for count, member in enumerate(tar):
            left -= member.size
            if left < 0 or count >= MOST_FILES:
                raise DataError(
                    f"the archive holds more than {MOST_FILES} files or {MOST_UNPACKED} bytes; "
                    "nothing was unpacked",
                    "do not use this archive; report where it came from",
                )
            name = PurePosixPath(member.name)
            escapes = name.is_absolute() or ".." in name.parts or "\\" in member.name
            if escapes or not (member.isfile() or member.isdir()):
                raise DataError(
                    f"the archive holds {member.name!r}, which is a link, a device or leads out "
                    "of its folder; nothing was unpacked",
                    "do not use this archive; report where it came from",
                )
            if content := tar.extractfile(member):
                path = target.joinpath(*name.parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as file:
                    shutil.copyfileobj(content, file, CHUNK_BYTES)


def _move_into_place(unpacked: Path, dest_dir: Path) -> None:
    entries = sorted(unpacked.iterdir())
    for entry in entries:
        target = dest_dir / entry.name
        if target.exists():
            raise DataError(
                f"{target} is already there and was not replaced",
                "move it away, then download again",
            )
    for entry in entries:
        entry.rename(dest_dir / entry.name)
