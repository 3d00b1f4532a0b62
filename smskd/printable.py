"""Text that is safe to print: names and messages come from files, and files from anywhere."""

from __future__ import annotations


def printable(text: str, keep: str = "\n") -> str:
    """The text with every character escaped that could steer a terminal or hide itself.

    Args:
        text: Anything.
        keep: Characters that stay although they cannot be seen.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
