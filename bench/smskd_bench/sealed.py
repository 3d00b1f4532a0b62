"""Files of ``torch.save`` that tell whether they are as they were written.

torch writes a checksum for each part of such a file, and looks at none. Checking those is not
enough: what lies between the parts says where they begin, and one flipped bit there gave a state
with other numbers. So the comment that ends every zip file holds a SHA-256 of all before it; torch
reads such a file as any other.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from typing import Any

import torch

END = b"PK\x05\x06"
END_BYTES = 22
"""Length of a zip file's last record, without the comment."""

NO_COMMENT = b"\0\0"
"""The end of that record: the length of the comment that follows."""

MARK = b"sha256:"
SEAL_BYTES = len(MARK) + 64


def seal(data: bytes) -> bytes:
    """The bytes of a file of ``torch.save`` with their SHA-256 behind them."""
    if data[-END_BYTES:][:4] != END or data[-2:] != NO_COMMENT:
        raise ValueError("no zip file without a comment")
    body = data[:-2] + struct.pack("<H", SEAL_BYTES)
    return body + MARK + hashlib.sha256(body).hexdigest().encode()


def is_whole(data: bytes) -> bool:
    """Whether every byte is as it was written.

    Of a file without a seal, from before there was one, whether the checksums of its parts hold.
    """
    if data[-SEAL_BYTES:].startswith(MARK):
        body, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES + len(MARK) :]
        return hashlib.sha256(body).hexdigest().encode() == seal
    if data[-END_BYTES:][:4] != END or data[-2:] != NO_COMMENT:
        return False  # of the seal, or of the file, the end is missing
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        return stored and archive.testzip() is None


def load_whole(data: bytes) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Raises:
        Exception: of many kinds: it is damaged, or no such file.
    """
    if not is_whole(data):
        raise ValueError("not as it was written")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
