"""Why a cell has no number, as data: nothing is left out of a table without a reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from smskd.errors import StoreError
from smskd_bench.naming import row_name
from smskd_bench.plan import Cell, Plan
from smskd_bench.store import CHECKPOINT, Store

Reason = Literal[
    "not_for_this_pair", "not_run", "running", "stopped", "failed",
    "other_version", "other_data", "other_teacher", "other_recipe",
]  # fmt: skip

WORDS: dict[Reason, str] = {
    "not_for_this_pair": "the matrix has this row for other pairs only",
    "not_run": "not run yet",
    "running": "running now",
    "stopped": "stopped; run the matrix again to go on",
    "failed": "failed",
    "other_version": "the store has it by another version of the code, which is never mixed in",
    "other_data": "the store has it on other data, which is never mixed in",
    "other_teacher": "the store has it with another teacher, which is never mixed in",
    "other_recipe": "the store has it under another recipe, which is never mixed in",
}

Document = dict[str, Any]
Chain = list[Document]
"""Specifications of a sequence of stages, the first one first."""

Signature = tuple[object, ...]


@dataclass(frozen=True)
class MissingRow:
    """Seeds of one row that have no number.

    Attributes:
        pair: Name of the pair.
        row: Name of the row.
        seeds: Which of them.
        reason: In one word; :data:`WORDS` has it in several.
        detail: What exactly: the failure, or what the other result has otherwise.
    """

    pair: str
    row: str
    seeds: tuple[int, ...]
    reason: Reason
    detail: str = ""

    @property
    def text(self) -> str:
        """Reason and detail for people."""
        return f"{WORDS[self.reason]}: {self.detail}" if self.detail else WORDS[self.reason]


@dataclass
class Missing:
    """Finds reasons; reads the store's other stage runs once, and only if it has to.

    Attributes:
        plan: The matrix.
        store: Where its results are.
        begun: Keys that have a folder; None asks the store for each.
    """

    plan: Plan
    store: Store
    begun: Collection[str] | None = None
    states: dict[str, tuple[Reason, str] | None] = field(default_factory=dict, init=False)
    others: dict[Signature, list[tuple[str, Chain]]] | None = field(default=None, init=False)

    def of_cells(self, cells: list[Cell], numbers: Mapping[int, float]) -> tuple[MissingRow, ...]:
        """Reasons of the cells of one row without a number, equal ones together."""
        found: dict[tuple[Reason, str], list[int]] = {}
        for cell in cells:
            if cell.seed not in numbers:
                found.setdefault(self._reason(cell), []).append(cell.seed)
        place = (cells[0].pair, cells[0].row) if cells else ("", "")
        return tuple(
            MissingRow(*place, tuple(seeds), reason, detail)
            for (reason, detail), seeds in found.items()
        )

    def of_other_pairs(self) -> tuple[MissingRow, ...]:
        """Rows that the matrix limits to other pairs."""
        matrix = self.plan.matrix
        return tuple(
            MissingRow(pair.name, row_name(row), matrix.seeds, "not_for_this_pair")
            for pair in matrix.pairs
            for row in matrix.rows
            if row.only and pair.name not in row.only
        )

    def _reason(self, cell: Cell) -> tuple[Reason, str]:
        for key in cell.everything:
            if key in self.plan.nodes and (found := self._state(key)):
                return found
        return self._elsewhere(cell) or ("not_run", "")

    def _state(self, key: str) -> tuple[Reason, str] | None:
        """Why one stage run has no result; None if it has, or nobody has begun it."""
        if key not in self.states:
            self.states[key] = self._read_state(key)
        return self.states[key]

    def _read_state(self, key: str) -> tuple[Reason, str] | None:
        store, label = self.store, self.plan.nodes[key].label
        if (self.begun is not None and key not in self.begun) or store.is_done(key):
            return None
        if store.is_running(key):
            return "running", label
        if failure := store.failure(key):
            return "failed", f"{label}: {failure['status']}: {failure['reason']}"
        return ("stopped", label) if (store.folder(key) / CHECKPOINT).exists() else None

    def _elsewhere(self, cell: Cell) -> tuple[Reason, str] | None:
        """What the store has in its place: the same sequence under other conditions."""
        if self.others is None:
            self.others = _by_signature(self.store, self.plan)
        if not self.others:
            return None
        ours = [self.plan.nodes[key].document() for key in cell.stages]
        for key, theirs in self.others.get(_signature(ours), ()):
            if key != cell.stages[-1]:
                paths = list(_differing(ours, theirs))
                return _kind(paths), f"{', '.join(paths[:4]) or 'teachers'} (stage run {key[:12]})"
        return None


def _by_signature(store: Store, plan: Plan) -> dict[Signature, list[tuple[str, Chain]]]:
    """Sequences that are done and in no row of the plan."""
    found: dict[Signature, list[tuple[str, Chain]]] = {}
    for key in store.stage_keys():
        if key in plan.nodes or not store.is_done(key):
            continue
        if chain := _chain(key, store, plan):
            found.setdefault(_signature(chain), []).append((key, chain))
    return found


def _chain(key: str, store: Store, plan: Plan) -> Chain | None:
    chain: Chain = []
    above: str | None = key
    seen: set[str] = set()
    while above is not None:
        known = plan.nodes.get(above)
        try:
            document = known.document() if known else store.spec_document(above)
        except StoreError:  # damaged, or killed before it was written: it is no result anyway
            return None
        if above in seen or not _readable(document):
            return None
        seen.add(above)
        chain.append(document)
        above = document.get("parent")
    return chain[::-1]


def _readable(document: Document) -> bool:
    """Whether it has what a signature reads; other forms of specifications may not."""
    try:
        _signature([document])
    except (KeyError, TypeError):
        return False
    return True


def _signature(chain: Chain) -> Signature:
    """What makes two sequences the same for a reader: networks, methods, seed, data by name."""
    methods = tuple(tuple(method["name"] for method in stage["methods"]) for stage in chain)
    last = chain[-1]
    return (last["model"], last["seed"], last["dataset"]["name"], methods)


def _differing(ours: Chain, theirs: Chain) -> Iterator[str]:
    """Paths of what is not equal, each once."""
    seen: set[str] = set()
    for one, other in zip(ours, theirs, strict=True):
        flat, also = dict(_flat(one)), dict(_flat(other))
        for path in flat | also:
            if flat.get(path) != also.get(path) and path not in seen:
                seen.add(path)
                yield path


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if path or name not in ("parent", "teachers"):
                yield from _flat(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{number}]")
    else:
        yield path, value


def _kind(paths: list[str]) -> Reason:
    if not paths:
        return "other_teacher"
    if any(path in ("loop", "schema") or path.endswith("version") for path in paths):
        data = all(path.startswith("dataset") for path in paths)
        return "other_data" if data else "other_version"
    return "other_data" if any(p.startswith("dataset") for p in paths) else "other_recipe"
