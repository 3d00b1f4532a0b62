"""Records of a known form in JSON files: read, checked, and refused with one message."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from smskd.errors import StoreError
from smskd.strict_json import parse_json

T = TypeVar("T")


def read_record(path: Path, kind: type[T], known: int, again: str) -> T | None:
    """Read a record of a known schema; None if there is no file.

    Args:
        path: A JSON file.
        kind: The dataclass it holds.
        known: The schema that this program reads.
        again: What to do if the file is damaged or too old.

    Raises:
        StoreError: it is damaged, or another version wrote it.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"), bounded=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}", again) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if isinstance(schema, int) and schema != known:
        raise StoreError(
            f"{path} has schema {schema}, this program reads {known}",
            "update smskd-bench" if schema > known else again,
        )
    try:
        return adapter(kind).validate_python(record)
    except ValidationError as error:
        raise StoreError(f"{path} is damaged: {first_problem(error)}", again) from error


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """What reads and checks values of a declared type, built at its first use."""
    return _built(cast(type, kind))


@cache  # building one takes 2 to 50 ms; tables read many records, every plan asks for all methods
def _built(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_problem(error: ValidationError) -> str:
    """Where and what, as text that is safe to print: names come from the file."""
    first = error.errors()[0]
    where = ".".join(ascii(str(part))[1:-1] for part in first["loc"])
    return f"{where}: {first['msg']}"
