"""Data inside pages: JSON that cannot end its script, text without what hides or turns round."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def script_json(value: Any) -> str:
    """Compact JSON for a script element or file: no markup, no end of a script, no NaN.

    Raises:
        ValueError: a number is not finite; see :func:`number`.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def visible(text: str) -> str:
    """Text without control characters, but for line ends, and without marks that turn it round."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def number(value: object, digits: int = 5) -> float | None:
    """A finite number, rounded to so many significant digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
