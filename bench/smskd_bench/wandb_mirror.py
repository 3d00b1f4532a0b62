"""The program that talks to Weights & Biases, in a process of its own.

`WandbTracker` starts it and writes one JSON object per line to its standard input; it answers with
JSON lines on its standard output. It stands alone (standard library and wandb), and nothing in
here can slow, hang or kill training: its environment, exit hooks, signal handlers and memory are
its own, and it can be killed.

Requests:  {"op": "begin", "card": {...}} | {"op": "log", "key", "row", "epoch"}
           | {"op": "end", "key", "status", "summary", "weights", "outputs"} | {"op": "close"}
Answers:   {"problem": text} | {"offline": folder of a run} | {"left": folder of a run}
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

ID_CHARS = 16
MAX_TAG_CHARS = 64
MAX_FAILED_RUNS = 3
# After the trainer is gone, this long to finish uploads; the trainer itself may kill us earlier.
ORPHAN_TIMEOUT_S = 120.0

Mode = Literal["online", "offline"]
Report = Callable[[str, str], None]


def run_id(key: str) -> str:
    """W&B run id of a stage run: the same after a restart."""
    return key[:ID_CHARS]


def artifact_name(key: str) -> str:
    """W&B name of the weights of a stage run: the same as its output and as another's input."""
    return f"student-{key[:ID_CHARS]}"


class Mirror:
    """The W&B runs that are open, by the key of their stage run.

    Args:
        mode: "online" or "offline".
        report: Called with a kind of answer and its text.
    """

    def __init__(self, mode: Mode, report: Report) -> None:
        self._mode = mode
        self._report = report
        self._runs: dict[str, Any] = {}
        self._postponed: dict[str, list[dict[str, Any]]] = {}
        self._failures = 0

    def handle(self, message: dict[str, Any]) -> None:
        """Carry out one request; a run whose request fails is dropped, and said so once."""
        if self._failures >= MAX_FAILED_RUNS:
            return
        key = message["card"]["key"] if message["op"] == "begin" else message["key"]
        if key in self._postponed:
            self._postponed[key].append(message)
            return
        try:
            self._OPERATIONS[message["op"]](self, key, message)
            self._take_up_postponed()
        except Exception as error:
            self._runs.pop(key, None)
            self._failures += 1
            self._report("problem", f"run {run_id(key)} is no longer mirrored: {one_line(error)}")
            if self._failures == MAX_FAILED_RUNS:
                self._report("problem", "mirroring is off after repeated failure")

    def close(self) -> None:
        """Finish the runs nobody ended, as failed: a resumed stage run continues them."""
        for key in list(self._runs):
            self.handle({"op": "end", "key": key, "status": "stopped", "summary": {}})
        if self._runs:  # those that were postponed, and have begun only now
            self.close()

    def _take_up_postponed(self) -> None:
        if self._postponed and not self._runs:
            postponed, self._postponed = self._postponed, {}
            forget_failed_runs()
            for message in [message for each in postponed.values() for message in each]:
                self.handle(message)

    def _begin(self, key: str, message: dict[str, Any]) -> None:
        if key in self._runs:
            return
        card = message["card"]
        run = self._init(card)
        if run is None:
            self._postponed[key] = [message]
            return
        self._runs[key] = run
        run.define_metric("epoch", hidden=True)
        run.define_metric("*", step_metric="epoch")
        if run.offline:
            self._report("offline", sync_folder(run))
        for item in card["inputs"]:
            self._use(run, card, item)

    def _init(self, card: dict[str, Any]) -> Any:
        """Open the run; when the server cannot be used, here and from now on offline.

        None if that has to wait, because others are open.
        """
        try:
            return open_run(card, self._mode)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._mode = "offline"
            self._report("problem", f"recording offline, no online run: {one_line(error)}")
            if self._runs:
                return None
            forget_failed_runs()
            return open_run(card, self._mode)

    def _use(self, run: Any, card: dict[str, Any], item: dict[str, str]) -> None:
        """Record an input. Its lineage is in the config as well, so a failure costs little."""
        try:
            staged = stage(Path(item["weights"]), staged_path(card["folder"], run, item["key"]))
            # `use_artifact` refuses to work offline. What it does with an artifact not yet on the
            # server is this call, and its record does survive a later `wandb sync`.
            run._log_artifact(
                weights_artifact(item["key"], staged), is_user_created=True, use_after_commit=True
            )
        except Exception as error:
            self._report("problem", f"{item['role']} of run {run.id} not linked: {one_line(error)}")

    def _log(self, key: str, message: dict[str, Any]) -> None:
        if key in self._runs:
            self._runs[key].log({**message["row"], "epoch": message["epoch"]})

    def _end(self, key: str, message: dict[str, Any]) -> None:
        run = self._runs.get(key)
        if run is None:
            return
        status = message["status"]
        run.summary.update({**message["summary"], "status": status})
        folder = Path(run.settings.root_dir)
        if message.get("weights"):
            staged = stage(Path(message["weights"]), staged_path(folder, run, key))
            run.log_artifact(weights_artifact(key, staged))
        for output in message.get("outputs", ()):
            run.log_artifact(files_artifact(output, staged_path(folder, run, key)))
        del self._runs[key]
        if self._finish(run, 0 if status == "done" else 1) and not run.offline:
            drop_staged(folder, run)

    def _finish(self, run: Any, exit_code: int) -> bool:
        """Upload the rest and close; False when the server took too long, then offline from now."""
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self._mode = "offline"
            self._report("left", sync_folder(run))
            return False
        return True

    _OPERATIONS: ClassVar = {"begin": _begin, "log": _log, "end": _end}


def open_run(card: dict[str, Any], mode: Mode) -> Any:
    """Open or continue the W&B run of a stage run."""
    import wandb

    folder = Path(card["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=card["project"],
        id=run_id(card["key"]),
        name=card["name"],
        group=card["group"],
        job_type=card["job_type"],
        tags=[tag[:MAX_TAG_CHARS] for tag in card["tags"]],
        config={**card["config"], **lineage(card)},
        dir=str(folder),
        resume="allow",
        reinit="create_new",
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", finish_timeout_raises=True),
    )


def forget_failed_runs() -> None:
    """Restart wandb's service, which holds on to the id of a run that could not be opened.

    It would end open runs as well: call it when there are none.
    """
    import wandb

    wandb.teardown()


def lineage(card: dict[str, Any]) -> dict[str, object]:
    """Config fields that hold the graph even where no artifact could be recorded."""
    keys: dict[str, list[str]] = {"parent": [], "teacher": []}
    for item in card["inputs"]:
        keys[item["role"]].append(item["key"])
    parent = keys["parent"][0] if keys["parent"] else None
    return {"key": card["key"], "parent_key": parent, "teacher_keys": keys["teacher"]}


def weights_artifact(key: str, staged: Path) -> Any:
    """Artifact of a stage run's weights.

    Name, path inside and bytes depend on the stage run alone, so its digest is the same as output
    and as input, and W&B takes both for one version.
    """
    import wandb

    artifact = wandb.Artifact(artifact_name(key), type="model", metadata={"key": key})
    # "immutable": read from where it is. The default copies every file once more.
    artifact.add_file(
        str(staged), name=f"weights{staged.suffix}", policy="immutable", skip_cache=True
    )
    return artifact


def files_artifact(output: dict[str, Any], staged: Path) -> Any:
    """Artifact of some files of the store, read from links that wandb may delete."""
    import wandb

    artifact = wandb.Artifact(output["name"], type=output["kind"])
    for number, name in enumerate(output["files"]):
        path = Path(output["folder"], name)
        link = stage(path, staged.with_name(f"{staged.name}-{output['kind']}-{number}"))
        artifact.add_file(str(link), name=name, policy="immutable", skip_cache=True)
    return artifact


def staged_path(folder: str | Path, run: Any, key: str) -> Path:
    """Name, without its ending, of the link that one run holds on the weights of `key`."""
    return Path(folder) / "staged" / f"{run.id}-{key[:ID_CHARS]}"


def stage(weights: Path, target: Path) -> Path:
    """Give W&B its own name for a weights file: a hard link, or a copy where links cannot be.

    Some versions of wandb delete the file named in a record once it is uploaded; that must never
    be the file of the store.
    """
    target = target.with_name(target.name + weights.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(weights, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(weights, target)
    return target


def drop_staged(folder: Path, run: Any) -> None:
    """Remove the links of a run that is uploaded."""
    for path in (folder / "staged").glob(f"{run.id}-*"):
        path.unlink(missing_ok=True)


def sync_folder(run: Any) -> str:
    """Folder of a run on disk, the one to give to `wandb sync`."""
    return str(run.settings.sync_dir)


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")


def serve(requests: IO[str], answers: IO[str], mode: Mode) -> None:
    """Carry out requests until "close" or the end of input, then finish what is open."""

    def report(kind: str, text: str) -> None:
        print(json.dumps({kind: text}), file=answers, flush=True)

    mirror = Mirror(mode, report)
    for line in requests:
        message = json.loads(line)
        if message["op"] == "close":
            break
        mirror.handle(message)
    _exit_after(ORPHAN_TIMEOUT_S)
    mirror.close()


def _exit_after(seconds: float) -> None:
    """Bound the time wandb may take from here, its exit hooks included."""
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def main() -> None:
    """Keep input and output for ourselves, send everything wandb prints to the log, and serve."""
    # Ctrl-C and a scheduler's SIGTERM are for the trainer; we end when it closes our input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Duplicates are not inherited, so wandb's own service cannot keep our pipe open.
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    with os.fdopen(requests, encoding="utf-8") as source, os.fdopen(answers, "w") as sink:
        serve(source, sink, "online" if sys.argv[1] == "online" else "offline")


if __name__ == "__main__":
    main()
