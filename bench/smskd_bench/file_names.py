"""Names from matrices as names of files, which never lead out of a folder."""

from __future__ import annotations

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_KEPT = 40


def file_name(name: str) -> str:
    """A plain name as it is; any other with odd signs replaced, and a hash to tell it apart."""
    if _PLAIN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_KEPT]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
