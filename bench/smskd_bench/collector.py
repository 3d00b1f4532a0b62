"""Python's collector of circular garbage, paused while very many objects are made that all stay.

It looks at all of them again whenever there are a quarter more, which is a quarter of the time of
planning a large matrix, and finds nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run a block without the collector, unless it was off already."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
