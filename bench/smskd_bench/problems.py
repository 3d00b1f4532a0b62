"""Collects what is wrong with a document, so that a user sees everything at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from smskd_export.records import adapter
from smskd_export.yaml_reader import DocPath, YamlDocument

from smskd.errors import ConfigError, SmskdError, did_you_mean

Form = TypeVar("Form")


class Problems:
    """Collects what is wrong with a document, in the order of its lines."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self._found: dict[tuple[DocPath, str], None] = {}

    @property
    def found(self) -> list[tuple[DocPath, str]]:
        """Where, and what."""
        return list(self._found)

    def add(self, path: DocPath, message: str) -> None:
        """Note one problem; the same one twice is noted once."""
        message = message.replace("\n  -> ", "; ").replace("\n", " ")  # one problem, one line
        self._found.setdefault((path, message))

    def validate(self, form: type[Form], value: object, path: DocPath) -> Form | None:
        """Check ``value`` against a dataclass, strictly, and note what does not fit."""
        try:
            return read_strictly(form, value)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self.add((*path, *item["loc"]), _message(item, form))
        except (ValueError, SmskdError) as error:
            self.add(path, str(error))
        return None

    def error(self) -> ConfigError:
        """All problems as one error."""
        lines = self.document.lines

        def line_of(path: DocPath) -> int:
            while path not in lines:
                path = path[:-1]
            return lines[path]

        ordered = sorted(self.found, key=lambda item: line_of(item[0]))
        text = "\n".join(f"{self.document.where(path)}: {message}" for path, message in ordered)
        count = f"{len(ordered)} problem{'s' if len(ordered) != 1 else ''}"
        return ConfigError(f"{text}", f"{count} in {self.document.file}; nothing was run")


def read_strictly(form: type[Form], value: object) -> Form:
    """``value``, as parsed from a file, as a dataclass.

    Raises:
        ValueError: it does not fit.
    """
    # JSON mode: strict about types (true is no number), yet lists may fill tuples.
    text = json.dumps(value, default=str)
    return adapter(form).validate_json(text, strict=True)


def _message(item: Mapping[str, Any], form: type) -> str:
    """A pydantic complaint in a user's words."""
    kind, value = item["type"], item.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(form, tuple(item["loc"][:-1]))
        hint = did_you_mean(str(item["loc"][-1]), known) if known else "there are none here"
        return f"unknown key; {hint}"
    if kind in ("missing", "missing_argument"):
        return "is missing"
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    wanted = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    wanted = wanted.replace("an object", "a mapping").replace("valid array", "list")
    return f"{wanted}, but it is {shown}"


def _keys_at(form: Any, path: DocPath) -> list[str]:
    """Field names of the dataclass that sits at ``path`` inside ``form``."""
    schema = adapter(form).json_schema()
    node: dict[str, Any] = schema
    for part in path:
        node = _resolve(node, schema)
        if isinstance(part, int):
            node = node.get("items") or (node.get("prefixItems") or [{}])[0]
        else:
            inner = node.get("additionalProperties")
            fallback = inner if isinstance(inner, dict) else {}
            node = node.get("properties", {}).get(part, fallback)
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", []):
        if "$ref" in option or option.get("type") in ("object", "array"):
            node = option
            break
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
