"""Read a YAML file safely, with line numbers and without YAML 1.1's traps.

In YAML 1.1 an unquoted ``no`` is false and ``1e-3`` is a string. Here, as in YAML 1.2, only
``true`` and ``false`` are booleans and ``1e-3`` is a number. A key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smskd.errors import ConfigError

DocPath = tuple[str | int, ...]

MAX_DEPTH = 50
MAX_ENTRIES = 200_000
"""Far above any real matrix; a few aliases of aliases stand for more memory than there is."""

MAX_BYTES = 4 << 20
"""Of the file, which may be anything that can be opened, such as a device without an end."""

MAX_INTEGER = 2**63
"""Numbers beyond are no counts of anything, and are too large for a float."""


@dataclass(frozen=True)
class YamlDocument:
    """A parsed file: its content, and the line (from 1) on which each path starts."""

    file: Path
    content: Any
    lines: dict[DocPath, int]

    def where(self, path: DocPath) -> str:
        """``file:line: a.b[2]``, with the line of the nearest parent that is in the file."""
        known = path
        while known not in self.lines:
            known = known[:-1]
        return f"{self.file}:{self.lines[known]}: {show_path(path)}"


def show_path(path: DocPath) -> str:
    """``("rows", 3, "name")`` as ``rows[3].name``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the document"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _refusal("merge keys (<<) are no part of YAML 1.2; write them out", key_node)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise _refusal("a key has to be text", key_node)
            if key in seen:
                raise _refusal(f"the key {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        text: str = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _refusal("half a character (an escape from d800 to dfff)", node)
        return text

    def construct_yaml_int(self, node: Any) -> int:
        number = int(self.construct_scalar(node))
        if abs(number) > MAX_INTEGER:
            raise _refusal("an integer beyond 64 bits", node)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refusal(reason: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Entries and depth of a node with every alias written out; refuses what is too large."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (0, MAX_DEPTH)  # what is met again inside itself has no end
    parts = () if isinstance(node, yaml.ScalarNode) else node.value
    inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    sizes = [_measure(part, known) for part in inner]
    entries = 1 + sum(count for count, _ in sizes)
    depth = 1 + max((depth for _, depth in sizes), default=0)
    if depth > MAX_DEPTH or entries > MAX_ENTRIES:
        what = (
            "nested too deeply" if depth > MAX_DEPTH else "too large with its aliases written out"
        )
        raise _refusal(what, node)
    known[id(node)] = (entries, depth)
    return known[id(node)]


def _yaml_1_2_scalars() -> None:
    kinds = ("bool", "int", "float", "timestamp", "value")
    replaced = {f"tag:yaml.org,2002:{kind}" for kind in kinds}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool",
        re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
        list("tTfF"),
    )
    # Octal (012) and base-60 (1:30) numbers of YAML 1.1 stay text, and so are refused as numbers.
    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
    )
    point = r"(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
    number = rf"^[-+]?(?:{point}|[0-9]+[eE][-+]?[0-9]+|\.inf)$|^\.nan$"
    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(number), list("-+0123456789.")
    )


_yaml_1_2_scalars()


def read_yaml(file: Path) -> YamlDocument:
    """Read one document.

    Raises:
        ConfigError: the file cannot be read or is not YAML, with the line.
    """
    return parse_yaml(read_text(file), file)


def read_text(file: Path) -> str:
    """The text of a YAML file that is not too large for one.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        text = data.decode("utf-8") if len(data) <= MAX_BYTES else None
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in file.parent.glob("*.yaml"))[:8])
        hint = f"files there: {near}" if near else f"no YAML file in {file.parent}"
        raise ConfigError(f"{file}: no such file", hint) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name with a zero in it
        raise ConfigError(f"{file}: cannot be read: {error}", "expected UTF-8 text") from None
    if text is None:
        raise ConfigError(f"{file} has more than {MAX_BYTES >> 20} MiB", "expected a short text")
    return text


def parse_yaml(text: str, file: Path) -> YamlDocument:
    """Parse YAML text; ``file`` is used in messages only."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _measure(node, {})
        content = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{file}{line}: not valid YAML: {reason}", "mend that line") from None
    except RecursionError:
        raise ConfigError(f"{file}: not valid YAML: nested too deeply", "mend the file") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}", "mend the file") from None
    lines: dict[DocPath, int] = {}
    if node is not None:
        _note_lines(node, (), lines, set())
    lines[()] = 1
    return YamlDocument(file, content, lines)


def _note_lines(node: yaml.Node, path: DocPath, lines: dict[DocPath, int], seen: set[int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: following each one again could take for ever
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _note_lines(value, (*path, i), lines, seen)
