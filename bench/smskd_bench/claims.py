"""What SMSKD claims, as data: ``leaderboards/claims.yaml``. No result is in it.

A claim names rows of matrices and their controls; :mod:`smskd_bench.report.evidence` computes from
a store what they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from smskd_export.yaml_reader import YamlDocument, read_yaml

from smskd.errors import ConfigError, did_you_mean
from smskd.settings import STRICT
from smskd_bench.matrix import Matrix
from smskd_bench.naming import row_name
from smskd_bench.problems import Problems
from smskd_bench.published import repository_file

Expectation = Literal["better", "worse", "equal", "different", "cheap"]

CLAIMS = Path("leaderboards/claims.yaml")


@dataclass(frozen=True)
class ClaimTest:
    """One comparison that tests a claim.

    Attributes:
        matrix: Name of the matrix that has the rows.
        row: The row that the claim is about.
        control: The row it is held against.
        asks: What differs between the two.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    matrix: str
    row: str
    control: str
    asks: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        id: Short name.
        claim: In a sentence.
        source: Who says so.
        expect: What it says of the row against its control.
        tests: What tests it.
        percent: For ``cheap``: additional training time that counts as next to nothing.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    id: str
    claim: str
    source: str
    expect: Expectation
    tests: tuple[ClaimTest, ...]
    percent: float = 10.0


@dataclass(frozen=True)
class Ledger:
    """The file of claims."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    claims: tuple[Claim, ...]
    schema: Literal[1] = 1


def load_claims(file: Path | None = None) -> Ledger:
    """Read a file of claims; None takes the repository's.

    Raises:
        ConfigError: lists every problem found, one a line.
        MissingDataError: the program is installed without the repository, and no file is given.
    """
    return check_claims(read_yaml(file or repository_file(CLAIMS)))


def check_claims(document: YamlDocument) -> Ledger:
    """Check a parsed file of claims; see :func:`load_claims`."""
    problems = Problems(document)
    ledger = problems.validate(Ledger, document.content, ())
    if ledger is not None:
        seen: set[str] = set()
        for i, claim in enumerate(ledger.claims):
            if claim.id in seen:
                problems.add(("claims", i, "id"), f"{claim.id!r} is the id of an earlier claim")
            if not claim.tests:
                problems.add(("claims", i, "tests"), "is empty; name a row and its control")
            if not claim.percent > 0:
                problems.add(("claims", i, "percent"), "has to be above 0")
            seen.add(claim.id)
    if problems.found or ledger is None:
        raise problems.error()
    return ledger


def tests_of(claim: Claim, matrix: Matrix) -> tuple[ClaimTest, ...]:
    """The tests that a matrix can make.

    Raises:
        ConfigError: a test names a row that the matrix does not have.
    """
    rows = [row_name(row) for row in matrix.rows]
    found = tuple(test for test in claim.tests if test.matrix == matrix.name)
    for name in (name for test in found for name in (test.row, test.control)):
        if name not in rows:
            raise ConfigError(
                f"claim {claim.id!r}: the matrix {matrix.name} has no row {name!r}",
                did_you_mean(name, rows),
            )
    return found
