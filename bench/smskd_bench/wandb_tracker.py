"""Mirror stage runs to Weights & Biases without ever making training wait.

Calls put a small message in a queue. One background thread feeds the queue to a process of its own
(`wandb_mirror.py`), the only place that imports wandb. A process rather than a thread, because
wandb starts a service, changes `os.environ`, hooks `sys.exit` and waits for uploads when the
interpreter exits: in another process all of that can be ignored, and killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from smskd_bench.tracking import OutputRef, RunCard

MAX_WAITING = 20_000
MAX_PROBLEMS = 5
# The user's environment may name another run, or the service of a surrounding wandb process.
_DROPPED = (
    "WANDB_MODE",
    "WANDB_RUN_ID",
    "WANDB_NAME",
    "WANDB_RESUME",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_TAGS",
    "WANDB_SWEEP_ID",
    "WANDB_SERVICE",
)
# Quiet, private and harmless to timings; a user who sets one of these keeps what is set.
_DEFAULTS = {
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB__DISABLE_STATS": "true",
    "WANDB_INIT_TIMEOUT": "10",
    "WANDB_FINISH_TIMEOUT": "120",
}

Message = dict[str, Any]


class WandbTracker:
    """The W&B mirror of this process's stage runs; see `Tracker` for the methods.

    Args:
        mode: "online" or "offline".
        max_waiting: Epoch rows that may wait for the mirror; more are dropped and counted.
    """

    def __init__(self, mode: Literal["online", "offline"], max_waiting: int = MAX_WAITING) -> None:
        self._mode = mode
        self._max_waiting = max_waiting
        self._waiting: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._problems: list[str] = []
        self._offline_runs: list[Path] = []
        self._left_runs: list[Path] = []
        self._dropped = 0
        self._closed = False
        self._abandoned = False

    def begin(self, card: RunCard) -> None:
        """Open or continue the W&B run of a stage run; the first call starts the mirror."""
        if self._closed:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._feed, args=(card.folder,), name="wandb-mirror", daemon=True
            )
            self._thread.start()
        self._put({"op": "begin", "card": card})

    def log(self, key: str, row: Mapping[str, float], epoch: int) -> None:
        """Add the metrics of one epoch; costs microseconds."""
        self._put({"op": "log", "key": key, "row": dict(row), "epoch": epoch})

    def end(
        self,
        key: str,
        status: str,
        summary: Mapping[str, object],
        weights: Path | None,
        outputs: Sequence[OutputRef] = (),
    ) -> None:
        """Close the W&B run, with its leaderboard fields and its weights."""
        message = {"op": "end", "key": key, "status": status, "summary": dict(summary)}
        files = [{**vars(output), "folder": str(output.folder.absolute())} for output in outputs]
        self._put(
            {**message, "weights": None if weights is None else str(weights), "outputs": files}
        )

    def close(self, timeout_s: float) -> list[str]:
        """Drain for at most `timeout_s` seconds, kill what is left, and tell what happened."""
        if self._thread is not None and not self._closed:
            self._closed = True
            self._waiting.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._abandon(timeout_s)
        return self._messages()

    def leave(self, timeout_s: float) -> list[str]:
        """As `close`, but what is not drained by then goes on by itself after we have ended."""
        if self._thread is not None and not self._closed:
            self._closed = True
            self._waiting.put(None)
            self._thread.join(timeout_s)
        return self._messages()

    def _put(self, message: Message) -> None:
        if self._thread is None or self._closed or not self._thread.is_alive():
            return
        # Begin and end are few; rows are what could fill the memory behind a hung mirror.
        if message["op"] == "log" and self._waiting.qsize() >= self._max_waiting:
            self._dropped += 1
            return
        self._waiting.put(message)

    def _abandon(self, timeout_s: float) -> None:
        self._abandoned = True
        self._problems.append(
            f"not finished within {timeout_s:g} s and stopped; what came last may be missing in "
            "W&B, nothing is missing in the store"
        )
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(5.0)

    def _feed(self, folder: Path) -> None:
        """Body of the thread: start the mirror, write messages to it, read its answers."""
        try:
            folder = folder.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "mirror.log").open("a") as log, _answer_file(folder) as answers:
                self._process = _start_mirror(self._mode, folder, answers, log)
                with self._process as process:
                    self._write_all(process)
                answers.seek(0)
                for line in answers:
                    self._read(json.loads(line))
            self._check_exit(process.returncode, folder)
        except Exception as error:
            self._problems.append(f"the mirror failed: {type(error).__name__}: {error}")

    def _write_all(self, process: subprocess.Popen[str]) -> None:
        """Write until the end of the queue; the mirror ends by itself after that."""
        assert process.stdin is not None
        # OSError: the mirror is gone; its exit status and its log say why.
        with contextlib.suppress(OSError):
            while (message := self._waiting.get()) is not None:
                try:
                    process.stdin.write(_encode(message))
                except (TypeError, ValueError) as error:
                    self._problems.append(f"a message could not be sent: {error}")
                process.stdin.flush()
            process.stdin.write('{"op": "close"}\n')
            process.stdin.flush()
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _read(self, answer: dict[str, str]) -> None:
        for kind, text in answer.items():
            if kind == "problem":
                self._problems.append(text)
            else:
                runs = self._offline_runs if kind == "offline" else self._left_runs
                runs.append(Path(text))

    def _check_exit(self, code: int, folder: Path) -> None:
        if code != 0 and not self._abandoned:
            self._problems.append(
                f"the mirror ended with status {code}; see {folder / 'mirror.log'}"
            )

    def _messages(self) -> list[str]:
        messages = [f"W&B: {problem}" for problem in self._problems[:MAX_PROBLEMS]]
        if len(self._problems) > MAX_PROBLEMS:
            messages.append(f"W&B: and {len(self._problems) - MAX_PROBLEMS} more problems")
        if self._dropped:
            messages.append(f"W&B: {self._dropped} epoch rows were dropped, W&B was too slow")
        if self._offline_runs:
            places = {shlex.quote(str(path.parent)) for path in self._offline_runs}
            commands = " ".join(f"{place}/offline-run-*" for place in sorted(places))
            count = len(self._offline_runs)
            runs = "1 run is" if count == 1 else f"{count} runs are"
            messages.append(f"W&B: {runs} recorded offline; to upload: wandb sync {commands}")
        for path in self._left_runs:
            folder = shlex.quote(str(path))
            messages.append(f"W&B: upload not complete: wandb sync --include-online {folder}")
        return messages


def _answer_file(folder: Path) -> IO[str]:
    """A nameless file for the answers: unlike a pipe it never fills, and outlives the trainer."""
    return tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8")


def _start_mirror(mode: str, folder: Path, answers: IO[str], log: IO[str]) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("wandb_mirror.py")
    # -P: the script's folder holds our modules, whose names must not shadow those wandb imports.
    return subprocess.Popen(
        [sys.executable, "-P", str(script), mode],
        stdin=subprocess.PIPE,
        stdout=answers,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=mirror_environment(folder),
    )


def mirror_environment(folder: Path) -> dict[str, str]:
    """Environment of the mirror only: ours, and so our other children's, stays as it was."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {
        **_DEFAULTS,
        "WANDB__STATS_PID": str(os.getpid()),
        **kept,
        "WANDB_DATA_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
        "WANDB_SILENT": "true",
    }


def _encode(message: Message) -> str:
    """One line of JSON for a message."""
    card = message.get("card")
    if isinstance(card, RunCard):
        message = {**message, "card": _encode_card(card)}
    return json.dumps(message, default=_plain) + "\n"


def _encode_card(card: RunCard) -> Message:
    inputs = [
        {"role": ref.role, "key": ref.key, "weights": str(ref.weights)} for ref in card.inputs
    ]
    folder = str(card.folder.absolute())
    return {**vars(card), "config": dict(card.config), "inputs": inputs, "folder": folder}


def _plain(value: object) -> object:
    """What JSON does not know: a mapping, a number of another library, or else its text."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)
