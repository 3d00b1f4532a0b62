"""Commands in processes of their own that need not load torch again.

``import torch`` and what its optimizers pull in take four seconds, the command itself often a
tenth of one. A process that has loaded other people's packages, and none of ours, forks one child
per command; the child has the command's own arguments, environment, folder and streams and ends
as any process does. Tests that send signals, drop rights or ask what is loaded start Python anew.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

PACKAGES = (
    "torch", "torch._dynamo", "torch.utils.flop_counter", "scipy.stats", "sklearn.datasets",
    "onnx", "pydantic", "rich.progress", "yaml", "safetensors.torch",
)  # fmt: skip
MODULE = "smskd_bench.cli"
SHARED = ("LD_", "OMP_", "MKL_", "KMP_", "PYTHONDONTWRITEBYTECODE")
"""Settings that take effect when a library is loaded, so parent and command must agree on them."""


class WarmPython:
    """The process that forks; it ends with the one that made it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.agreed = agreed(environment)
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        atexit.register(self.close)

    def __call__(
        self, words: list[str], environment: dict[str, str], folder: Path, timeout_s: float
    ) -> tuple[int, str, str]:
        """Run the command line to its end: exit status (negative: the signal), output, errors."""
        with TemporaryDirectory(prefix="warm-") as made:
            streams = [str(Path(made, name)) for name in ("out", "err")]
            request = {"words": words, "env": environment, "folder": str(folder)}
            print(json.dumps(request | {"streams": streams}), file=self.process.stdin, flush=True)
            limit = Timer(timeout_s, os.kill, (self._number(), signal.SIGKILL))
            limit.start()
            try:
                code = self._number()
            finally:
                limit.cancel()
            out, err = (Path(path).read_text() for path in streams)
        return code, out, err

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _number(self) -> int:
        """What it says next: the child's number, then how that ended."""
        assert self.process.stdout
        return int(self.process.stdout.readline())


_started: list[WarmPython] = []


def warm(environment: dict[str, str]) -> WarmPython | None:
    """The one of this test process; None if a command's settings come too late for it."""
    if not _started:
        _started.append(WarmPython(environment))
    return _started[0] if _started[0].agreed == agreed(environment) else None


def agreed(environment: dict[str, str]) -> dict[str, str]:
    """Settings that parent and command must share."""
    return {name: text for name, text in environment.items() if name.startswith(SHARED)}


def serve() -> dict[str, Any] | None:
    """Fork for every request; returns the request in the child and None at the end."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return dict(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take on the command's environment, folder and streams."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in request["streams"]]
    for number, file in enumerate(files):
        os.dup2(file, number)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *dict.fromkeys([*paths, *sys.path[1:]])]
    sys.argv = [MODULE, *request["words"]]


if __name__ == "__main__":
    import gc
    import importlib
    import runpy

    for package in PACKAGES:
        importlib.import_module(package)
    ours = [name for name in sys.modules if name.split(".")[0].startswith("smskd")]
    assert not ours, f"loaded before the command: {ours}"
    gc.freeze()  # what is loaded already is never collected, so its memory stays shared
    if (asked := serve()) is not None:
        become(asked)
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
