"""``smskd-bench leaderboard --publish wandb``: the store's board as runs, tables and a report."""

from __future__ import annotations

import os
import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from smskd.errors import ConfigError, SmskdError, StoreError
from smskd_bench.bars import counting_bar
from smskd_bench.config import load_matrix
from smskd_bench.file_names import file_name
from smskd_bench.plan import make_plan
from smskd_bench.publishing.addresses import FOLDER, Addresses, note_addresses
from smskd_bench.publishing.ledger import OfflineLedger
from smskd_bench.publishing.names import check_project
from smskd_bench.publishing.publication import Publication, make_publication
from smskd_bench.publishing.sending import Outcome, run_sender
from smskd_bench.report.leaderboard import Leaderboard, read_leaderboard
from smskd_bench.report.reading import read_shown
from smskd_bench.store import Store
from smskd_bench.tracking import LoginState, login_state

"""Below ``<store>/wandb``: apart from what ``run`` mirrors, so that one command uploads it."""


@dataclass(frozen=True)
class PublishRequest:
    """What the user asked for on the command line.

    Attributes:
        matrix: Its file.
        store: Where the results are.
        margin: Points that count as practically none.
        project: In W&B.
        entity: Person or team; None for that of the login.
        offline: Record on disk, whatever the login.
        weights: Send weights and bundles too.
    """

    matrix: Path
    store: Path
    margin: float
    project: str
    entity: str | None = None
    offline: bool = False
    weights: bool = False


def publish(request: PublishRequest, console: Console) -> None:
    """Bring W&B up to date with the store, and say where it is.

    Raises:
        SmskdError: the request is wrong, the store cannot be read, W&B cannot be used, or it ended
            early: then the same command goes on.
    """
    check_project(request.project)
    if request.entity is not None:
        check_project(request.entity, "entity")
    state = _mode(request)
    plan, store = make_plan(load_matrix(request.matrix)), Store.peek(request.store)
    board = read_leaderboard(plan, store, request.margin, held=read_shown(plan, store))
    if not board.test_set.stage_runs:
        raise StoreError(
            f"nothing to publish: {request.store} holds no result of {board.matrix}",
            "run the matrix first",
        )
    folder = _folder(store)
    with _say_what(console, "reading the store"):
        picture, problem = _picture(board, folder)
        publication = make_publication(plan, store, board, picture, request.weights)
    outcome = _send(request, state, publication, folder, console)
    if state.mode == "online":
        report = outcome.report[1] if outcome.report else ""
        there = tuple(sorted({*outcome.same, *outcome.sent}))
        note_addresses(store.root, board.matrix, Addresses(outcome.url, there, report))
    _tell(request, state, publication, outcome, folder, [problem] if problem else [], console)


def _mode(request: PublishRequest) -> LoginState:
    """Online or offline, as for ``run``.

    Raises:
        ConfigError: W&B is switched off.
    """
    if request.offline:
        return LoginState("offline", "--offline")
    state = login_state()
    if state.mode == "disabled":
        raise ConfigError(f"W&B is switched off: {state.reason}", "add --offline, or switch it on")
    return state


def _folder(store: Store) -> Path:
    folder = (store.root / FOLDER).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}",
            "W&B keeps its files there until they are sent; free the folder, or copy the store",
        ) from None
    return folder


def _say_what(console: Console, text: str) -> AbstractContextManager[object]:
    """A sign of life on a terminal; elsewhere nothing."""
    return console.status(text) if console.is_terminal else nullcontext()


def _picture(board: Leaderboard, folder: Path) -> tuple[Path | None, str]:
    """Accuracy against latency, where something was measured; and why it is missing."""
    from smskd_bench.report.picture import draw, points

    found = points(board.rows)
    if not found:
        return None, ""
    path = folder / f"{file_name(board.matrix)}.png"
    try:
        draw(found, path, board.matrix)
    except SmskdError as error:
        return None, f"no picture of accuracy against latency: {error.message}; {error.hint}"
    return path, ""


def _send(
    request: PublishRequest,
    state: LoginState,
    publication: Publication,
    folder: Path,
    console: Console,
) -> Outcome:
    mode: Literal["online", "offline", "disabled"] = state.mode
    ledger = OfflineLedger(folder, f"{request.entity or ''}/{request.project}")
    document = {
        "mode": mode,
        "project": request.project,
        "entity": request.entity,
        "groups": sorted({run.group for run in publication.runs}),
        "folder": str(folder),
        "known": ledger.known() if mode == "offline" else {},
        "runs": [run.message() for run in publication.runs],
        "report": publication.report.message(),
    }
    recorded: list[tuple[str, str, Path]] = []
    try:
        with counting_bar(console, "publishing", "runs") as bar:
            task = bar.add_task("", total=len(publication.runs))

            def told(outcome: Outcome) -> None:
                recorded[:] = outcome.offline
                bar.update(task, completed=outcome.count)

            return run_sender(document, folder, told)
    finally:
        if recorded:
            ledger.add(recorded)


def _tell(
    request: PublishRequest,
    state: LoginState,
    publication: Publication,
    outcome: Outcome,
    folder: Path,
    problems: list[str],
    console: Console,
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    rows = len(publication.rows)
    total = len(publication.runs)
    say(
        f"{rows} rows, their table, and {len(publication.nodes)} stage runs, exports and "
        f"measurements: {total - len(outcome.same)} runs new or changed, "
        f"{len(outcome.same)} as they were"
    )
    if state.mode == "offline":
        say(f"recorded offline ({state.reason}); to upload:")
        say(f"  wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*")
        say("the report is made online: publish again after the upload")
    else:
        say(f"runs:   {outcome.url}")
        if outcome.report is not None:
            say(f"report: {outcome.report[1]}")
    if outcome.gone:
        gone = ", ".join(outcome.gone)
        say(f"rows in W&B that the matrix has no more; delete these runs there: {gone}")
    for problem in (*problems, *outcome.problems):
        say(problem)
