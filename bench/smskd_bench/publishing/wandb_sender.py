"""The program that sends a publication to Weights & Biases, in a process of its own.

Beside the standard library and wandb it needs only the parts of this package that import neither
torch nor numpy. It reads one JSON document and answers with JSON lines on its standard output, so
that whoever started it can show how far it is, and end it if it hangs.

Document:  {"mode", "project", "entity", "groups", "folder", "known", "runs", "report"}
Answers:   {"step": "looked" | "same" | "sent" | "offline" | "report" | "problem" | "gone"
            | "refused" | "failed", ...}

What makes a repeat harmless: ids are fixed, the digest of a run is the last thing that is written
into it, and a run that has the digest already is not touched.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smskd_bench.publishing.wandb_report import save
from smskd_bench.wandb_mirror import drop_staged, one_line, stage, staged_path, sync_folder

API_TIMEOUT_S = 20
COMMIT_TIMEOUT_S = 120
AT_ONCE = 4
"""Runs that are sent at the same time: most of the time is waiting for the server."""

JOB_TYPES = ("leaderboard", "board", "stage", "export", "measurement")
MISSING_PACKAGE = "no report: pip install 'smskd-bench[wandb-report]', then the same command again"

Document = dict[str, Any]
Answer = Callable[..., None]


class Refused(Exception):
    """Nothing was sent: the server cannot be used."""


def send(document: Document, answer: Answer) -> bool:
    """Send everything; False if it ended early, with the reason in the answers."""
    online = document["mode"] == "online"
    known: dict[str, str] = document["known"]
    api = entity = None
    if online:
        try:
            api, entity, known = _look(document)
        except Refused as error:
            answer("refused", text=str(error))
            return False
        answer("looked", url=_address(f"{entity}/{document['project']}"))
    try:
        _send_runs(document, entity, known, answer)
        if online:
            _tell_gone(document, known, answer)
            _send_report(document, api, entity, answer)
    except Exception as error:
        answer("failed", text=one_line(error))
        return False
    return True


def _look(document: Document) -> tuple[Any, str, dict[str, str]]:
    """Log in, and see which runs are there already: their digests, by id.

    Raises:
        Refused: the server cannot be reached, or says no.
    """
    import wandb

    try:
        api = wandb.Api(timeout=API_TIMEOUT_S)
        entity = document["entity"] or api.default_entity
        if not entity:
            raise Refused("W&B knows no entity for this login")
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"W&B cannot be used: {one_line(error)}") from None
    try:
        filters = {"group": {"$in": document["groups"]}, "jobType": {"$in": list(JOB_TYPES)}}
        path = f"{entity}/{document['project']}"
        runs = api.runs(path, filters=filters, per_page=500, lazy=False)
        return api, entity, {run.id: _digest_of(run) for run in runs}
    except ValueError:  # how wandb says that there is no such project yet
        return api, entity, {}
    except Exception as error:
        raise Refused(f"W&B cannot be used: {one_line(error)}") from None


def _address(path: str) -> str:
    """Of a project, for a browser."""
    import wandb

    return f"{wandb.setup().settings.app_url}/{urllib.parse.quote(path)}"


def _digest_of(run: Any) -> str:
    return str(run.summary_metrics.get("digest", ""))


def _send_runs(
    document: Document, entity: str | None, known: dict[str, str], answer: Answer
) -> None:
    """Send what is new or changed, a few at a time; the first failure ends it.

    Nodes, rows and the table follow each other, so that the table never shows what is not there.
    """
    for runs in _by_turn(document["runs"]):
        changed = []
        for run in runs:
            if known.get(run["id"]) == run["digest"]:
                answer("same", id=run["id"])
            else:
                changed.append(run)
        with ThreadPoolExecutor(AT_ONCE if document["mode"] == "online" else 1) as pool:
            waiting = [pool.submit(_send_run, run, document, entity, answer) for run in changed]
            try:
                for one in waiting:
                    one.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _by_turn(runs: list[Document]) -> Iterable[list[Document]]:
    last = ("leaderboard", "board")
    yield [run for run in runs if run["job_type"] not in last]
    for job_type in last:
        yield [run for run in runs if run["job_type"] == job_type]


def _send_run(run: Document, document: Document, entity: str | None, answer: Answer) -> None:
    opened = _open(run, document, entity)
    try:
        _fill(opened, run, document)
    except BaseException:
        opened.finish(exit_code=1)
        raise
    opened.finish(exit_code=0)
    folder = Path(document["folder"])
    if opened.offline:
        answer("offline", id=run["id"], digest=run["digest"], folder=sync_folder(opened))
    else:
        drop_staged(folder, opened)
        answer("sent", id=run["id"])


def _open(run: Document, document: Document, entity: str | None) -> Any:
    """Open the run, or go on with it if it is there."""
    import wandb

    return wandb.init(
        project=document["project"],
        entity=entity or document["entity"],
        id=run["id"],
        name=run["name"],
        notes=run["notes"] or None,
        group=run["group"],
        job_type=run["job_type"],
        tags=run["tags"],
        dir=document["folder"],
        resume="allow",
        reinit="create_new",
        mode=document["mode"],
        settings=wandb.Settings(silent=True, console="off", finish_timeout_raises=True),
    )


def _fill(opened: Any, run: Document, document: Document) -> None:
    """Bring everything in a run up to date; the digest comes last."""
    opened.config.update(run["config"], allow_val_change=True)
    for name in set(opened.summary.keys()) - set(run["summary"]):
        if not name.startswith("_"):  # of an earlier publication, and not measured any more
            del opened.summary[name]
    opened.summary.update(run["summary"])
    for number, artifact in enumerate(run["uses"]):
        _use(opened, _artifact(artifact, opened, document, f"use{number}"))
    logged = [
        opened.log_artifact(_artifact(artifact, opened, document, f"log{number}"))
        for number, artifact in enumerate(run["logs"])
    ]
    if media := _media(run):
        opened.log(media)
    if not opened.offline:
        for artifact in logged:
            artifact.wait(timeout=COMMIT_TIMEOUT_S)
    opened.summary["digest"] = run["digest"]


def _use(opened: Any, artifact: Any) -> None:
    """Record an input by its content, which makes the link also where it is not there yet."""
    if opened.offline:
        # `use_artifact` of wandb 0.31 refuses to work offline. This is what it calls online for an
        # artifact that is not on the server; the record survives `wandb sync`.
        opened._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        opened.use_artifact(artifact)


def _artifact(wanted: Document, opened: Any, document: Document, mark: str) -> Any:
    """An artifact of files of the store, read through links that wandb may delete."""
    import wandb

    artifact = wandb.Artifact(wanted["name"], type=wanted["kind"], metadata=wanted["metadata"])
    for number, (path, name) in enumerate(wanted["files"]):
        target = staged_path(document["folder"], opened, f"{mark}-{number}")
        link = stage(Path(wanted["folder"], path), target)
        artifact.add_file(str(link), name=name, policy="immutable", skip_cache=True)
    return artifact


def _media(run: Document) -> dict[str, Any]:
    """Tables, their charts and pictures, to be logged in one step."""
    import wandb

    media: dict[str, Any] = {}
    for name, table in run["tables"].items():
        made = wandb.Table(
            columns=list(table["columns"]), data=table["rows"], allow_mixed_types=True
        )
        media[name] = made
        if table["line"]:
            x, y, stroke = table["line"]
            media[f"{name}_chart"] = wandb.plot.line(
                made, x, y, stroke=stroke, title=table["title"]
            )
    for name, path in run["images"].items():
        media[name] = wandb.Image(path)
    return media


def _tell_gone(document: Document, known: dict[str, str], answer: Answer) -> None:
    """Rows that are in W&B and no longer in the matrix: they would rank beside the others."""
    here = {run["id"] for run in document["runs"]}
    gone = [name for name in known if name.startswith("row-") and name not in here]
    if gone:
        answer("gone", ids=gone)


def _send_report(document: Document, api: Any, entity: str | None, answer: Answer) -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        answer("problem", text=MISSING_PACKAGE)
        return
    project = document["project"]
    existing = list(api.reports(f"{entity}/{project}", per_page=100))
    what, report = save(document["report"], str(entity), project, existing)
    title = document["report"]["title"]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")  # for people; the id finds it
    url = _address(f"{entity}/{project}/reports/{slug}--{report}")
    if what == "not ours":
        text = f"no report: there is one named {title!r} that was not made here; rename it: {url}"
        answer("problem", text=text)
    else:
        answer("report", what=what, url=url)


def main() -> None:
    """Send the document on standard input; what wandb prints goes to the log."""
    answers = os.dup(1)  # not inherited, so wandb's own service cannot keep the pipe open
    os.dup2(2, 1)
    with os.fdopen(answers, "w", encoding="utf-8") as sink:

        def answer(step: str, **fields: object) -> None:
            print(json.dumps({"step": step, **fields}), file=sink, flush=True)

        done = send(json.load(sys.stdin), answer)
    sys.stdout.flush()
    os._exit(0 if done else 1)  # exit hooks of wandb may wait for a server


if __name__ == "__main__":
    main()
