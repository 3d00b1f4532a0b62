"""Runs the command line in processes of its own, on matrices of seconds, and reads their stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file
from smskd_bench.store import Store
from warm import warm

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / name) for name in ("", "bench", "export")]
TIMEOUT_S = 120.0
PAIR = {"teacher": "resnet8_half", "student": "resnet8_quarter"}


def tiny(*rows: object, **changes: Any) -> dict[str, Any]:
    """A matrix document whose stage runs take a tenth of a second each."""
    document = {
        "schema": 1,
        "name": "tiny",
        "dataset": {"name": "digits", "train_size": 100},
        "pairs": [PAIR],
        "seeds": [0],
        "recipe": {"epochs": [3, 2], "batch_size": 32},
        "teacher": {"epochs": 4},
        "rows": list(rows),
    }
    return document | changes


@dataclass(frozen=True)
class Done:
    """A command that ended: exit status, what it printed, how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err


class Bench:
    """The command line with a home, a working folder and W&B settings of its own.

    Args:
        folder: Where all of that is; matrices and stores may go there too.
        prefix: A command that starts ours, such as one that drops rights.
    """

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.prefix = prefix
        self.started: list[subprocess.Popen[str]] = []
        for name in ("home", "cwd"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def matrix(self, document: dict[str, Any], name: str = "matrix") -> Path:
        """Write a matrix file."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def environment(self, **changes: str) -> dict[str, str]:
        """Ours without the settings of the person who runs the tests."""
        dropped = ("WANDB_", "SMSKD_", "NETRC", "XDG_", "PYTHON")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        home = {"HOME": str(self.folder / "home"), "PYTHONPATH": os.pathsep.join(PATHS)}
        return {**kept, **home, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **changes}

    def start(self, *words: object, **env: str) -> subprocess.Popen[str]:
        """Start a command and do not wait."""
        command = [*self.prefix, sys.executable, "-m", "smskd_bench.cli", *map(str, words)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(**env), cwd=self.folder / "cwd",
        )  # fmt: skip
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def start_run(self, matrix: Path, store: Path, *words: object, **env: str) -> Any:
        """Start ``run`` plainly and do not wait."""
        return self.start("run", *plain(matrix, store, *words), **env)

    def __call__(self, *words: object, expect: int = 0, **env: str) -> Done:
        """Run a command to its end and check its exit status."""
        environment = self.environment(**env)
        python = None if self.prefix else warm(environment)
        if python is None:
            return finish(self.start(*words, **env), expect)
        started, folder = time.perf_counter(), self.folder / "cwd"
        ended = python([str(word) for word in words], environment, folder, TIMEOUT_S)
        return checked(Done(*ended, time.perf_counter() - started), expect)

    def run(self, matrix: Path, store: Path, *words: object, expect: int = 0, **env: str) -> Done:
        """``run`` to its end."""
        return self("run", *plain(matrix, store, *words), expect=expect, **env)


def plain(matrix: Path, store: Path, *words: object) -> tuple[object, ...]:
    """Words of ``run``: one of each, and nothing that is measured; ``words`` come last."""
    where = ("--matrix", matrix, "--store", store)
    one = ("--threads", 1, "--workers", 1, "--fold-seeds", "off", "--tracking", "none")
    return (*where, *one, *words)


def finish(process: subprocess.Popen[str], expect: int = 0, timeout_s: float = TIMEOUT_S) -> Done:
    """Wait for a started command."""
    started = time.perf_counter()
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
    return checked(Done(process.returncode, out, err, time.perf_counter() - started), expect)


def checked(done: Done, expect: int) -> Done:
    """A command that ended as expected, without a traceback."""
    assert done.code == expect, f"exit status {done.code}, not {expect}\n{done.text}"
    assert "Traceback" not in done.text, done.text
    return done


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> float:
    """Send a signal, wait for the end, and say when it was sent."""
    sent = time.time()
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    return sent


def wait_for(condition: Callable[[], bool], process: Any, timeout_s: float = 60.0) -> None:
    """Wait until a condition holds; fails if the process (if any) ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def records(store: Path) -> dict[str, dict[str, Any]]:
    """Results of all finished stage runs, by key."""
    found = store.glob("stages/*/*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def results(store: Path) -> dict[str, dict[str, Any]]:
    """The same by a name such as ``resnet8_quarter/fitnet>kd/s0``."""
    specs = {p.parent.name: json.loads(p.read_text()) for p in store.glob("stages/*/*/spec.json")}
    return {stage_name(key, specs): record for key, record in records(store).items()}


def stage_name(key: str, specs: dict[str, dict[str, Any]]) -> str:
    """Model, methods of all stages up to this one, and seed."""
    spec = specs[key]
    model, rows, seed = spec["model"], methods_of(key, specs), spec["seed"]
    return f"{model}/{rows}/s{seed}"


def methods_of(key: str, specs: dict[str, dict[str, Any]]) -> str:
    spec = specs[key]
    own = "+".join(method["name"] for method in spec["methods"])
    return f"{methods_of(spec['parent'], specs)}>{own}" if spec["parent"] else own


def folder_of(store: Path, name: str) -> Path:
    """Folder of a finished stage run."""
    return Store(store).folder(results(store)[name]["key"])


def outputs(store: Path) -> dict[str, tuple[bytes, bytes]]:
    """Bytes of weights and predictions of all stage runs, by key."""
    return {
        path.parent.name: (
            path.read_bytes(),
            path.with_name("predictions.safetensors").read_bytes(),
        )
        for path in store.glob("stages/*/*/student.safetensors")
    }


def predictions(store: Path, key: str) -> Any:
    """Predicted classes of a stage run."""
    return load_file(Store(store).folder(key) / "predictions.safetensors")["predictions"]


def litter(store: Path) -> list[str]:
    """What a finished store should not hold, and stage runs that somebody still holds."""
    opened = Store(store)
    found = [p for p in store.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".tmp")]
    for result in store.glob("stages/*/*/result.json"):
        found += [
            p
            for name in ("checkpoint.pt", "failed.json", "lease.json")
            if (p := result.with_name(name)).exists()
        ]
    held = [key for key in opened.stage_keys() if opened.is_running(key)]
    return [str(path.relative_to(store)) for path in found] + held
