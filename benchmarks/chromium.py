"""The Chromium of this machine, driven by Playwright; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> str:
    """Why there is no browser to drive; empty if there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed"
    if _path() is None:
        return f"no Chromium here: none of {', '.join(NAMES)}"
    return ""


def _path() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser; it ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=_path(), args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()
