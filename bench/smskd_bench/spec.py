"""The specification of one stage run, and the key that is computed from it.

A stage run trains one student with one method (or several jointly) for one stage. Its key is the
SHA-256 of its canonical specification, which holds the keys of its parent and teachers: a Merkle
graph. Whatever can change the result is in here; whatever cannot (device, folders, tags, how often
to evaluate) is not. ``docs/store.md`` lists both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from smskd_export.records import adapter

from smskd.settings import STRICT, Reference, Schedule, Training, Weighting

SPEC_SCHEMA = 1
"""Form of the specification."""

LOOP_VERSION = 1
"""Raised when a change of the loop, the data stream or the reference changes results."""


@dataclass(frozen=True)
class DataSpec:
    """Which samples are trained on: a named data set of known content, and a seeded split."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    name: str
    version: int
    fingerprint: str
    train_size: int | None = None
    dev_size: int = 0
    split_seed: int = 0


@dataclass(frozen=True)
class NamedSettings:
    """A registered method or modifier with all of its settings written out."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    name: str
    version: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSpec(NamedSettings):
    """A method and the modifiers of the signals it sees."""

    modifiers: tuple[NamedSettings, ...] = ()


@dataclass(frozen=True)
class StageSpec:
    """One stage run.

    Attributes:
        model: The network that is trained.
        seed: Decides initial weights, order and views.
        number: Position of the stage in its sequence, from 1.
        first_epoch: Epochs trained in the stages before.
        methods: One, or several that are trained jointly.
        parent: Key of the stage run whose student this one continues; None in stage 1.
        teachers: Keys of the stage runs that trained the teachers; empty if none is needed.
        imported: SHA-256 of a weights file that is taken instead of training.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    dataset: DataSpec
    model: str
    model_version: int
    seed: int
    methods: tuple[MethodSpec, ...]
    training: Training
    number: int = 1
    first_epoch: int = 0
    method_weight: float = 1.0
    ce_weight: float | None = None
    reference: Reference | None = None
    parent: str | None = None
    teachers: tuple[str, ...] = ()
    imported: str | None = None
    schema: int = SPEC_SCHEMA
    loop: int = LOOP_VERSION

    def document(self) -> dict[str, Any]:
        """The specification as plain JSON values."""
        return adapter(StageSpec).dump_python(self, mode="json")  # type: ignore[no-any-return]

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> StageSpec:
        """Read back what :meth:`document` gave."""
        return adapter(StageSpec).validate_python(document)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return key_of(self.document())

    def sibling(
        self, model: str, version: int, seed: int, parent: str | None, teachers: tuple[str, ...]
    ) -> StageSpec:
        """The same stage of another student; its key is made from what is new in it.

        A large matrix has a few different stages and many students, so that writing the stage out
        again for each of them would be most of the work of planning.
        """
        new: dict[str, Any] = {
            "model": model,
            "model_version": version,
            "seed": seed,
            "parent": parent,
            "teachers": teachers,
        }
        other = replace(self, **new)
        parts = {name: _known_part(name, value) for name, value in new.items()}
        vars(other)["_stem"] = self._stem
        vars(other)["key"] = _joined_key(self._stem | parts)
        return other

    @cached_property
    def _stem(self) -> dict[str, str]:
        """The canonical JSON by entry, in its order; only what siblings share counts."""
        return {name: _part(name, value) for name, value in sorted(self.document().items())}

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Keys that must be done before."""
        return (*self.teachers, *((self.parent,) if self.parent else ()))

    @property
    def label(self) -> str:
        """Short human name of the work, e.g. ``resnet8 kd s0 stage 2``."""
        what = "+".join(m.name for m in self.methods) if not self.imported else "imported"
        return f"{self.model} {what} s{self.seed} stage {self.number}"


def key_of(document: dict[str, Any]) -> str:
    """SHA-256 over sorted, compact JSON."""
    return hashlib.sha256(_canonical(document).encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _part(name: str, value: object) -> str:
    """One entry of a specification in its canonical JSON."""
    return f'"{name}":{_canonical(value)}'


# Typed, as 1 and 1.0 are equal and are written differently.
_known_part = lru_cache(maxsize=4096, typed=True)(_part)


def _joined_key(parts: dict[str, str]) -> str:
    """What :func:`key_of` gives for the document whose entries these are."""
    return hashlib.sha256(f"{{{','.join(parts.values())}}}".encode()).hexdigest()


def canonical_reference(reference: Reference | None, number: int) -> Reference | None:
    """Forget settings that cannot have an effect, so that they cannot change a key."""
    if reference is None or number == 1 or reference.weight == 0.0:
        return None
    if reference.space == "features":
        reference = replace(reference, temperature=Reference().temperature)
    weighting = reference.weighting
    if weighting.map == "constant":
        normalise = "none" if weighting.normalise == "batch_mean" else weighting.normalise
        weighting = replace(weighting, temperature=Weighting().temperature, normalise=normalise)
        if normalise == "none":  # all weights are 1, so their sum is the batch size
            weighting = replace(weighting, denominator="batch")
    return replace(reference, weighting=weighting)


def canonical_schedule(schedule: Schedule, epochs: int) -> Schedule:
    """Forget what a schedule does not read, and how a milestone was written.

    Only the epoch at which the rate drops can change a result: a third of 90 is 30, whether it was
    written 0.333 or 0.3333.
    """
    if schedule.kind != "step":
        return replace(schedule, milestones=(), gamma=1.0)
    drops = [round(milestone * epochs) for milestone in schedule.milestones]
    return replace(schedule, milestones=tuple(drop / epochs for drop in drops))


def canonical_split(data: DataSpec) -> DataSpec:
    """Forget the split's seed where there is no split."""
    whole = data.train_size is None and data.dev_size == 0
    return replace(data, split_seed=0) if whole else data
