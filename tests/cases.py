"""Cases of a test that run with ``-m slow``, where the first ones show the same every day."""

from typing import Any

import pytest


def later(*values: Any) -> Any:
    """A case, of one value or more, that runs with ``-m slow``."""
    return pytest.param(*values, marks=pytest.mark.slow)


def daily(cases: Any, count: int = 1) -> list[Any]:
    """Cases of which the first ``count`` run every day and the others with ``-m slow``."""
    found = list(cases)
    return [*found[:count], *map(later, found[count:])]
