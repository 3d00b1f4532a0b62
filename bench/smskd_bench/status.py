"""``smskd-bench status``: what a store holds, and how far a matrix has come in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from smskd.errors import StoreError
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.spec import StageSpec
from smskd_bench.store import Store

MISSING = ("missing", "")


def report(root: Path, matrix: Path | None, only: str | None, console: Console) -> None:
    """Print counts, then one line for every stage run that is neither done nor untouched."""
    store = Store.peek(root)
    for line in _lines(store, matrix, only):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(store: Store, matrix: Path | None, only: str | None) -> Iterator[str]:
    if matrix:
        plan, begun = make_plan(load_matrix(matrix), only), store.folders()
        states = {k: state_of(store, k) if k in begun else MISSING for k in plan.nodes}
        done = sum(states[cell.stages[-1]][0] == "done" for cell in plan.cells)
        yield f"{plan.matrix.name}: {done} of {len(plan.cells)} cells done"
    else:
        states = {key: state_of(store, key) for key in store.stage_keys()}
    counts = Counter(state for state, _ in states.values())
    shown = ", ".join(f"{count} {state}" for state, count in counts.most_common()) or "nothing yet"
    yield f"{store.root}: {shown} ({len(states)} stage runs)"
    for key, (state, detail) in states.items():
        if state not in ("done", "missing"):
            yield f"  {key[:12]}  {_label(store, key)}: {state}{detail}"


def _label(store: Store, key: str) -> str:
    """Name of a stage run; a kill can come before its specification, and forms can change."""
    try:
        return StageSpec.from_document(store.spec_document(key)).label
    except (StoreError, ValueError):
        return "(no readable spec.json)"


def state_of(store: Store, key: str) -> tuple[str, str]:
    """State of a stage run and what to add in words: done, running, stopped, failed, missing."""
    if store.is_done(key):
        return "done", ""
    if (owner := store.holder(key)) is not None:
        saved = f"{store.saved_epochs(key)} epochs saved"
        return "running", f" on {owner.name} (process {owner.pid}), {saved}"
    failure = store.failure(key)
    if failure:
        return str(failure["status"]), f": {failure['reason']}"
    epochs = store.saved_epochs(key)
    return ("stopped", f" after {epochs} epochs; run again to go on") if epochs else MISSING
