"""JSON as our records have it: no NaN, nothing nested without end, one kind of error for all."""

from __future__ import annotations

import json
import math
from typing import Any

LARGEST = 2**63
"""No count in a record is larger."""


def parse_json(text: str, bounded: bool = False) -> Any:
    """Parse a document.

    Args:
        text: JSON.
        bounded: Whether numbers that a count or a float cannot hold are refused too; costs a call
            for each number.

    Raises:
        ValueError: it is none, or holds what our records never do.
    """
    try:
        if bounded:
            return json.loads(
                text, parse_constant=_no_constant, parse_int=_small, parse_float=_finite
            )
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _small(digits: str) -> int:
    number = int(digits)
    if abs(number) > LARGEST:
        raise ValueError("a number beyond 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number that no float holds")
    return number
