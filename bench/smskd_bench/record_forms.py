"""What the records of a stage run must hold for its readers, checked whenever one is read.

A result is shown beside others and a failure is printed, so neither may be taken on trust: files
are damaged, edited by hand, and copied from elsewhere. What no reader needs is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError
from smskd_export.records import adapter, first_problem

Percent = Annotated[float, Field(strict=True, ge=0.0, le=100.0)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Words = Annotated[str, Field(strict=True)]


@dataclass(frozen=True)
class _Test:
    top1: Percent


@dataclass(frozen=True)
class _Kept:
    kept: Percent


@dataclass(frozen=True)
class _Cost:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    parameters: Count
    macs: Count


@dataclass(frozen=True)
class ResultForm:
    """``result.json``."""

    test: _Test
    kept: _Kept | None
    key: Words = ""
    deployed: _Cost = _Cost(0, 0)
    files: dict[Words, Words] = field(default_factory=dict)
    fast_paths: dict[Words, Any] = field(default_factory=dict)
    train_seconds: Number = 0.0
    images_per_s: Number = 0.0


@dataclass(frozen=True)
class FailureForm:
    """``failed.json``."""

    status: Words
    reason: Words


def problem_with(record: dict[str, Any], form: type) -> str:
    """What is wrong with a record; empty if it has all that the form asks for."""
    try:
        adapter(form).validate_python(record)
    except ValidationError as error:
        return first_problem(error)
    return ""
