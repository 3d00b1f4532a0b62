"""``smskd-bench verify``: train a cell of a leaderboard again from its record, and compare."""

from __future__ import annotations

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status as Line
from rich.text import Text

from smskd.atomic import write_json
from smskd.errors import ConfigError, StoreError, did_you_mean
from smskd.meter import Row
from smskd_bench.agreement import Comparison, Outputs, compare
from smskd_bench.config import load_matrix
from smskd_bench.executors.observing import Status
from smskd_bench.garbage import SCRATCH
from smskd_bench.leases import LOCK, try_lock
from smskd_bench.manner import differences, manner_of
from smskd_bench.plan import Cell, Plan, make_plan
from smskd_bench.reproducing import Reproduction, jobs_for, recorded
from smskd_bench.spec import StageSpec, key_of
from smskd_bench.stopping import StopRequest
from smskd_bench.store import Record, Store

DIFFERS = 4
MARKER = "verify.json"
"""Says that a folder is a scratch, and of which store."""


@dataclass(frozen=True)
class VerifyRequest:
    """What the user asked for on the command line.

    Attributes:
        cell: Name of a cell, or of a row without its seed: then all of its seeds.
        stage: Which stage is trained again, from 1; None: the last.
        all_stages: Train everything again, teachers included.
        scratch: Folder to work in, which stays; None: one in the store, which does not.
    """

    cell: str
    matrix: Path
    store: Path
    data_root: Path | None = None
    stage: int | None = None
    all_stages: bool = False
    scratch: Path | None = None


def verify(request: VerifyRequest, console: Console) -> int:
    """Train again, compare, and say what became of each stage run.

    Returns:
        The exit code: 0, or 4 if something differs.

    Raises:
        SmskdError: an unknown cell, something not trained yet or damaged, data missing, or the
            scratch cannot be written.
    """
    plan = make_plan(load_matrix(request.matrix))
    cells = _cells(request.cell, plan)
    store = Store.peek(request.store)
    targets = _targets(request, cells, plan)
    before = {key: recorded(store, plan, key, cell.name) for key, cell in targets.items()}
    jobs = jobs_for(plan, store, targets, request.all_stages)
    with ExitStack() as stack:
        with suppress(StoreError) if request.scratch else ExitStack():  # may be read-only then
            stack.enter_context(store.in_use(plan.nodes))
        folder = stack.enter_context(_scratch(request, store))
        what = key_of({"targets": sorted(targets), "all": request.all_stages})[:12]
        stop = stack.enter_context(StopRequest().on())
        teller = stack.enter_context(_Teller(console))
        again = Reproduction(
            plan, store, Store.open(folder / what), request.data_root, teller, stop
        )
        again.carry_out(jobs)
        found = {
            key: _compared(key, cell, plan, store, before[key], again)
            for key, cell in targets.items()
        }
    for line in _report(found, targets, plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return DIFFERS if any(c.verdict == "differs" for c in found.values()) else 0


def _cells(name: str, plan: Plan) -> list[Cell]:
    """The cell of this name, or all seeds of the row of this name."""
    found = [c for c in plan.cells if name in (c.name, f"{c.pair}/{c.row}")]
    if not found:
        hint = did_you_mean(name, [c.name for c in plan.cells])
        if len(hint) > 300:
            hint = f"cells are named like {plan.cells[0].name!r}"
        raise ConfigError(f"no cell {name!r}", hint)
    return found


def _targets(request: VerifyRequest, cells: list[Cell], plan: Plan) -> dict[str, Cell]:
    """Keys of the stage runs to compare, in the order of the plan, and a cell of each.

    Raises:
        ConfigError: there is no such stage.
    """
    if request.all_stages and request.stage is not None:
        raise ConfigError("--stage and --all-stages exclude each other", "drop one")
    count = len(cells[0].stages)
    number = count if request.stage is None else request.stage
    if number > count:
        raise ConfigError(f"{request.cell} has no stage {number}", f"it has {count}, from 1")
    wanted = {
        key: cell
        for cell in cells
        for key in (cell.everything if request.all_stages else (cell.stages[number - 1],))
    }
    return {key: wanted[key] for key in plan.nodes if key in wanted}


def _compared(
    key: str, cell: Cell, plan: Plan, store: Store, before: Outputs, again: Reproduction
) -> Comparison:
    """The comparison of one stage run, with what may be the reason for other bits."""
    place = cell.everything.index(key)
    keys = dict.fromkeys(
        c.everything[place] for c in plan.cells if (c.pair, c.row) == (cell.pair, cell.row)
    )
    seeds = [_top1(record) for k in keys if (record := store.result(k)) is not None]
    now = again.outputs(key)
    labels = again.labels(plan.nodes[key])
    result = compare(before, now, labels, [value for value in seeds if value is not None])
    if result.verdict == "same bits":
        return result
    why = differences(before.record, now.record)
    changed = [k for k in plan.nodes[key].depends_on if _other_weights(k, store, again)]
    why += [f"it builds on {plan.nodes[k].label}, which has other bits already" for k in changed]
    reasons = [f"may be why: {reason}" for reason in why] or [
        "nothing that the record names is different here: was it altered, or made by other code?"
    ]
    return Comparison(result.verdict, (*result.lines, *reasons))


def _other_weights(key: str, store: Store, again: Reproduction) -> bool:
    ours, theirs = again.scratch.result(key) or {}, store.result(key) or {}
    return ours.get("files") != theirs.get("files")


def _top1(record: Record) -> float | None:
    test = record.get("test")
    value = test.get("top1") if isinstance(test, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _report(found: dict[str, Comparison], targets: dict[str, Cell], plan: Plan) -> Iterator[str]:
    for key, comparison in found.items():
        yield f"{targets[key].name}: {plan.nodes[key].label}: {comparison.verdict}"
        yield from (f"    {line}" for line in comparison.lines)
    counts = Counter(comparison.verdict for comparison in found.values())
    yield "verified: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


@contextmanager
def _scratch(request: VerifyRequest, store: Store) -> Iterator[Path]:
    """A folder to train in, held while it is used.

    Raises:
        ConfigError: the folder that was named is something else.
        StoreError: it cannot be written, or another process has it.
    """
    folder = request.scratch or store.root / SCRATCH / secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if request.scratch:
            _mark(folder, store)
        with (folder / LOCK).open("a") as handle:
            if not try_lock(handle.fileno()):
                raise StoreError(f"another process works in {folder}", "choose another folder")
            yield folder
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}",
            "choose another folder with --scratch DIR",
        ) from None
    finally:
        if request.scratch is None:
            shutil.rmtree(folder, ignore_errors=True)


def _mark(folder: Path, store: Store) -> None:
    """Make an empty folder a scratch, or recognise one that was made for this store."""
    ours = {"store": str(store.root.resolve())}
    marker = folder / MARKER
    if not any(folder.iterdir()):
        write_json(marker, ours)
        return
    with suppress(OSError, ValueError):
        if json.loads(marker.read_text(encoding="utf-8")) == ours:
            return
    raise ConfigError(
        f"{folder} is neither empty nor a scratch of the store {store.root}",
        "name an empty folder, or leave --scratch out",
    )


class _Teller:
    """Tells what is trained again: lines that stay, and on a terminal one that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line: Line | None = Line("", console=console) if console.is_terminal else None

    def __enter__(self) -> _Teller:
        if self._line:
            self._line.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._line:
            self._line.stop()

    def begin(self, spec: StageSpec) -> None:
        self._say(f"{spec.label}: training it again, {spec.training.epochs} epochs")

    def epoch(self, spec: StageSpec, row: Row) -> None:
        self._move(f"{spec.label}: epoch {int(row['epoch'])} of {spec.training.epochs}")

    def end(self, spec: StageSpec, status: Status, result: Record | None, reason: str) -> None:
        if result is not None:
            how = manner_of(result).text() if result.get("sessions") else "imported"
            self._say(f"{spec.label}: {how}, {result['train_seconds']:.1f} s")

    def waiting(self, spec: StageSpec) -> None:
        pass

    def skip(self, spec: StageSpec, reason: str) -> None:
        self._say(f"{spec.label}: trained again before, in this scratch")

    def put_back(self, spec: StageSpec, reason: str) -> None:
        self._say(f"{spec.label}: {reason}")

    def note(self, spec: StageSpec, text: str) -> None:
        self._say(f"{spec.label}: {text}")

    def filling(self, spec: StageSpec, done: int, total: int) -> None:
        self._move(f"{spec.label}: filling a table, {done:,} of {total:,}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _move(self, text: str) -> None:
        if self._line:
            self._line.update(Text(text))
