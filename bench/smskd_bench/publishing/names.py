"""Names for W&B: one line, within its limits, and told apart by a hash where they are cut."""

from __future__ import annotations

import hashlib
import re

from smskd.errors import ConfigError
from smskd_bench.report.escaping import plain

RUN_CHARS = 128
"""Of the name of a run, of a group and of a report; wandb 0.31 and its reports refuse more."""

TAG_CHARS = 64
PROJECT_CHARS = 128
_REFUSED = set("/\\#?%:")
"""What wandb 0.31 refuses in the name of a project."""

_HASH_CHARS = 8
_ID_CHARS = 24


def shortened(text: str, most: int = RUN_CHARS) -> str:
    """One line of at most ``most`` characters; where it is cut, a hash of the whole ends it."""
    line = plain(text)
    if 0 < len(line) <= most:
        return line
    mark = hashlib.sha256(text.encode()).hexdigest()[:_HASH_CHARS]
    return f"{line[: most - _HASH_CHARS - 1].rstrip()}-{mark}".lstrip("-")


def stable_id(kind: str, *parts: str) -> str:
    """The id of a W&B run: of the same parts always the same, whatever signs they hold."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{kind}-{digest[:_ID_CHARS]}"


def field_name(text: str) -> str:
    """Text as a part of a metric's name, where dots and slashes have a meaning for W&B."""
    simple = re.sub(r"[^A-Za-z0-9_-]", "_", text)[:40]
    if simple == text:
        return simple
    return f"{simple}_{hashlib.sha256(text.encode()).hexdigest()[:_HASH_CHARS]}"


def check_project(name: str, kind: str = "project") -> None:
    """Refuse a name that W&B would refuse, before anything is sent.

    Raises:
        ConfigError: it is empty, too long or holds a sign that W&B refuses.
    """
    wrong = sorted(_REFUSED & set(name))
    if wrong or not name.strip() or len(name) > PROJECT_CHARS or not name.isprintable():
        why = f"it holds {' '.join(wrong)}" if wrong else f"1 to {PROJECT_CHARS} characters"
        raise ConfigError(
            f"{name[:40]!r} is no name of a W&B {kind}: {why}",
            f"give another one with --{kind}, of letters, digits, - and _",
        )
