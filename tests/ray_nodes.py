"""A real Ray cluster of several nodes on this machine; a node can be killed with all it has."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class RayNodes:
    """Nodes as `ray start --block` processes; the head has no CPU to train with.

    Args:
        environment: Of all of their processes.
        log: File for what they print.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = {**environment, "RAY_raylet_start_wait_time_s": "120"}
        self.log = log
        self.started: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        head = ("--head", "--node-ip-address", "127.0.0.1", "--port", port, "--num-cpus", 0)
        self.head = self._start(*head, "--include-dashboard", "false")
        wait_until(self.answers, [self.head])

    def add(self, cpus: int = 1, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a node; ``prefix`` is a command that starts it, such as unshare."""
        words = ("--address", self.address, "--node-ip-address", "127.0.0.1", "--num-cpus", cpus)
        return self._start(*words, prefix=prefix)

    def answers(self) -> bool:
        """Whether the head listens."""
        host, _, port = self.address.partition(":")
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            return False
        return True

    def wait_for(self, count: int) -> None:
        """Wait until so many nodes have joined, the head among them."""
        count_nodes = (
            "import logging, sys, ray; ray.init(sys.argv[1], logging_level=logging.ERROR);"
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        command = [sys.executable, "-c", count_nodes, self.address]

        def joined() -> bool:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
            return done.stdout.split()[-1:] == [str(count)]

        wait_until(joined, self.started)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """What pulling its plug does: all of its processes are gone at once."""
        for pid in [node.pid, *descendants(node.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.started):
            self.kill(node)

    def _start(self, *words: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        # Several nodes of one machine would take the same ports.
        ports = ("--min-worker-port", 0, "--max-worker-port", 0, "--disable-usage-stats")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        rest = map(str, (*words, *ports, "--object-store-memory", 80_000_000))
        with self.log.open("ab") as log:
            node = subprocess.Popen(
                [*prefix, *command, *rest], stdout=log, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(node)
        return node


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children and so on, now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def wait_until(condition, processes=(), timeout_s=180.0):
    """Wait until a condition holds; fails if one of the processes ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.05)
