"""Names and reasons as text of each format: what comes from a file is never markup."""

from __future__ import annotations

import unicodedata

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\u00b1": r"$\pm$",
}  # fmt: skip

_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet computes a cell of text that begins so."""


def plain(text: str) -> str:
    """One line without control characters: no escape code reaches a terminal, no line is broken."""
    shown = (" " if character.isspace() else character for character in text)
    # Cc are control codes; Cf turn text round or hide it.
    kept = (c for c in shown if unicodedata.category(c) not in ("Cc", "Cf"))
    return " ".join("".join(kept).split())


def markdown(text: str) -> str:
    """A cell of a Markdown table: no HTML, no link, no column border."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("](", "]\\(").replace("`", "\\`").replace("|", "\\|")


def latex(text: str) -> str:
    """Text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in plain(text))


def csv_text(text: str) -> str:
    """A text cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith((*_FORMULA, "\t", "\r")) else text
