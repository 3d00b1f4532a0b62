"""What all rows of a table have in common; numbers of another basis are never put beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from smskd_bench.plan import Plan
from smskd_bench.spec import LOOP_VERSION, SPEC_SCHEMA


@dataclass(frozen=True)
class Basis:
    """Conditions of a board.

    Every one of them but ``protocol`` is also in the keys of the stage runs, so a result of
    another basis is not found in the store; this names the basis where boards are put together.

    Attributes:
        protocol: Rules of the matrix file (``leaderboards/README.md``).
        dataset: Name of the data set.
        fingerprint: Hash of its content.
        data_version: Version of its reader.
        train_size: Training images kept; None for all.
        dev_size: Training images set aside.
        split_seed: Decides both choices.
        recipe: SHA-256 of the matrix's recipe and teacher sections, first 12 digits.
        loop: Version of the training loop.
        schema: Form of the specifications.
    """

    protocol: int
    dataset: str
    fingerprint: str
    data_version: int
    train_size: int | None
    dev_size: int
    split_seed: int
    recipe: str
    loop: int = LOOP_VERSION
    schema: int = SPEC_SCHEMA


def basis_of(plan: Plan) -> Basis:
    """The basis of a matrix's rows."""
    matrix, data = plan.matrix, next(iter(plan.nodes.values())).dataset
    recipe = {"recipe": asdict(matrix.recipe), "teacher": asdict(matrix.teacher)}
    text = json.dumps(recipe, sort_keys=True)
    return Basis(
        protocol=matrix.protocol,
        dataset=data.name,
        fingerprint=data.fingerprint,
        data_version=data.version,
        train_size=data.train_size,
        dev_size=data.dev_size,
        split_seed=data.split_seed,
        recipe=hashlib.sha256(text.encode()).hexdigest()[:12],
    )
