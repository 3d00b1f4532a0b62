"""Names of the site's files: made of harmless characters, whatever rows and pairs are called."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

LONGEST = 56
"""Characters of a readable part."""


def slug(text: str) -> str:
    """Letters, digits and hyphens that still tell what it is; never empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:LONGEST].strip("-") or "x"


def tag(*parts: object) -> str:
    """Ten digits that stand for exactly these parts: different names never share a file."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def row_file(board: int, pair: str, row: str) -> str:
    """Path of a row's page within the site."""
    return f"rows/{slug(f'{pair} {row}')}-{tag(board, pair, row)}.html"
