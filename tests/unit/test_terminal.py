"""Text from files is shown and does nothing else; names from files stay inside a folder."""

import io

import pytest
from mutations import is_clean
from rich.table import Table
from rich.text import Text
from smskd_bench.file_names import file_name
from smskd_bench.terminal import Terminal

from smskd.errors import SmskdError
from smskd.printable import printable

HOSTILE = "a\x1b[2Jb\x07\x9b31m\u202ec\x00d\x7f"


@pytest.mark.parametrize("keep", ["", "\n"])
def test_printable(keep):
    shown = printable(HOSTILE + "\n", keep)
    assert is_clean(shown, keep)
    assert shown.startswith("a\\x1b[2Jb\\x07\\x9b31m\\u202ec\\x00d\\x7f")
    assert printable("Übung 网络 ± µ") == "Übung 网络 ± µ"


def test_errors_can_be_printed():
    error = SmskdError(f"no {HOSTILE}", f"try {HOSTILE}\nor this")
    assert is_clean(str(error))
    assert len(str(error).splitlines()) == 3


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_a_terminal_is_not_steered(colour):
    out = io.StringIO()
    terminal = Terminal(file=out, width=60, force_terminal=True, color_system=colour)
    table = Table(title=Text(HOSTILE))
    table.add_column(Text(HOSTILE))
    table.add_row(Text(HOSTILE, style="red"))
    terminal.print(HOSTILE, table, markup=False, highlight=False)
    text = out.getvalue()
    assert ("\x1b[" in text) == (colour is not None)  # our own colours stay
    assert "\x1b[2J" not in text
    assert "\\x1b[2J" in text
    assert not set(text) & set("\x07\x9b\u202e\x00\x7f")


def test_file_names():
    assert file_name("quickstart") == "quickstart"
    odd = [
        "../../x",
        "/etc/passwd",
        "a/b",
        "a_b/",
        "..",
        "",
        ".hidden",
        "x" * 300,
        "a\nb",
        "网络",
        "a b",
    ]
    names = [file_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        assert name.isascii()
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name) < 100
