"""Starts the sender and watches it: how far it is, what it says, and its end if it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smskd.errors import RefusedError, RunError
from smskd_bench.wandb_tracker import mirror_environment

STALL_S = 300.0
"""Without an answer for so long, the sender hangs: each of its own waits is shorter."""


@dataclass
class Outcome:
    """What became of a publication.

    Attributes:
        same: Ids of runs that were as they should be.
        sent: Ids of runs that are on the server now.
        offline: Id, digest and folder of runs that were recorded.
        report: "made", "changed" or "same", and its address.
        problems: What was left out, in sentences.
        gone: Ids of rows that the matrix has no more.
        url: Of the project.
        refused: Why nothing was sent, if nothing was.
        failed: Why it ended early, if it did.
    """

    same: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    offline: list[tuple[str, str, Path]] = field(default_factory=list)
    report: tuple[str, str] | None = None
    problems: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    url: str = ""
    refused: str = ""
    failed: str = ""

    @property
    def count(self) -> int:
        """Runs that are settled."""
        return len(self.same) + len(self.sent) + len(self.offline)

    def take(self, answer: Mapping[str, Any]) -> None:
        """Note one answer of the sender."""
        step = answer["step"]
        if step in ("same", "sent"):
            (self.same if step == "same" else self.sent).append(answer["id"])
        elif step == "offline":
            self.offline.append((answer["id"], answer["digest"], Path(answer["folder"])))
        elif step == "report":
            self.report = (answer["what"], answer["url"])
        elif step == "problem":
            self.problems.append(answer["text"])
        elif step == "gone":
            self.gone = answer["ids"]
        elif step == "looked":
            self.url = answer["url"]
        elif step in ("refused", "failed"):
            setattr(self, step, answer["text"])


def run_sender(
    document: Mapping[str, Any],
    folder: Path,
    told: Callable[[Outcome], None],
    stall_s: float = STALL_S,
) -> Outcome:
    """Send a document and wait for the end.

    Args:
        document: What ``wandb_sender`` reads.
        folder: Where wandb may write, and where its log goes.
        told: Called after every answer.
        stall_s: Seconds without an answer after which it is ended.

    Raises:
        RefusedError: nothing was sent, because the server cannot be used.
        RunError: it ended early; a repeat goes on.
    """
    outcome = Outcome()
    log = folder / "sender.log"
    with log.open("a", encoding="utf-8") as errors, _started(folder, errors) as process:
        try:
            _feed(process, document)
            for answer in _answers(process, stall_s):
                outcome.take(answer)
                told(outcome)
        finally:
            if process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2.0)
                process.kill()
    _check(outcome, process.returncode, len(document["runs"]), log)
    return outcome


def _started(folder: Path, errors: Any) -> subprocess.Popen[str]:
    package = Path(__file__).parents[2]
    environment = mirror_environment(folder)
    paths = [str(package), *filter(None, [environment.get("PYTHONPATH")])]
    # -P: nothing in the working folder may shadow what is imported.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "smskd_bench.publishing.wandb_sender"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _feed(process: subprocess.Popen[str], document: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it is gone; its exit status and its log say why
        json.dump(document, process.stdin, allow_nan=False)
        process.stdin.close()


def _answers(process: subprocess.Popen[str], stall_s: float) -> Any:
    """Answers as they come, until the sender ends or is silent for too long."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="wandb-answers", daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=stall_s)
        except queue.Empty:
            process.kill()
            yield {"step": "failed", "text": f"no answer for {stall_s:g} s, so it was ended"}
            return
        if line is None:
            return
        yield json.loads(line)


def _check(outcome: Outcome, code: int, total: int, log: Path) -> None:
    again = "the same command goes on where it stopped; --offline records on disk instead"
    if outcome.refused:
        raise RefusedError(outcome.refused, f"check the login and the network; {again}")
    if outcome.failed or code != 0:
        why = outcome.failed or f"its process ended with status {code}; see {log}"
        raise RunError(f"W&B: {why}; {outcome.count} of {total} runs are up to date", again)
