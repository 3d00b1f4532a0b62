"""A real ssh server on this machine's loopback, with keys and a home folder of its own.

It stands for a device. ``before`` is sourced by every session, so a test can make the device
strange; ``kill_sessions`` and ``Cut`` break the link as a real one breaks.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

SERVER = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)

SESSION = """#!/bin/sh
HOME={home}; export HOME; cd "$HOME" || exit 1
PATH={bin}:$PATH; export PATH
login=/bin/sh
. {before}
exec "$login" -c "$SSH_ORIGINAL_COMMAND"
"""
SERVER_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
AuthenticationMethods publickey
StrictModes no
UsePAM no
PrintMotd no
SetEnv HOME={folder}/home
ForceCommand {folder}/session
"""
CLIENT_CONFIG = """
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  IdentityAgent none
  HostKeyAlias device
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  KexAlgorithms curve25519-sha256
"""
SHARED = """
  ControlMaster auto
  ControlPath {folder}/%n
  ControlPersist 30
"""
"""One connection for all commands, which most tests want for speed."""


class Sshd:
    """The server.

    Args:
        folder: Where its keys, configurations and the device's home folder go; a short path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.before = folder, folder / "home", folder / "before"
        self.home.mkdir(parents=True)
        self.before.touch()
        for name in ("host", "user"):
            make_key(folder / name)
        self.know(folder / "host.pub")
        self.trust(folder / "user")
        self.bin = folder / "bin"
        self.bin.mkdir()
        write_script(self.bin / "python3", f'exec {quoted(Path(sys.executable))} "$@"')
        places = {"home": self.home, "before": self.before, "bin": self.bin}
        session = SESSION.format(**{name: quoted(path) for name, path in places.items()})
        (folder / "session").write_text(session)
        (folder / "session").chmod(0o755)
        self.port = free_port()
        config = folder / "sshd_config"
        config.write_text(SERVER_CONFIG.format(port=self.port, folder=folder))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.log = (folder / "log").open("wb")
        assert SERVER
        self.process = subprocess.Popen([SERVER, "-D", "-e", "-f", config], stderr=self.log)
        self._wait()

    def trust(self, key: Path) -> None:
        """Let the device know one user's key."""
        public = key.with_name(f"{key.name}.pub").read_text()
        (self.folder / "authorized_keys").write_text(public)

    def know(self, public: Path) -> None:
        """Let the client know a host key as the device's."""
        (self.folder / "known_hosts").write_text(f"device {public.read_text()}")

    def client(self, port: int | None = None, shared: bool = False, extra: str = "") -> str:
        """What ``SMSKD_SSH`` must be to reach it, perhaps through another port."""
        path = self.folder / f"config-{port or ''}-{shared}"
        text = CLIENT_CONFIG + (SHARED if shared else "") + extra
        user = getpass.getuser()
        path.write_text(text.format(port=port or self.port, folder=self.folder, user=user))
        return f"ssh -F {quoted(path)}"

    @property
    def cache(self) -> Path:
        """The work folder on the device."""
        return self.home / ".cache" / "smskd-bench"

    def sessions(self) -> list[int]:
        """Processes of the server that serve a connection."""
        children = descendants(self.process.pid)
        return [pid for pid in children if command_line(pid).startswith(("sshd:", "sshd-session:"))]

    def kill_sessions(self) -> None:
        """Break every connection, as a link does: no good-bye to either side."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it with all its sessions, and wait for the clients: a shared one removes its socket."""
        self.kill_sessions()
        self.process.terminate()
        self.process.wait(10)
        self.log.close()
        wait_until(lambda: not processes_with(str(self.folder)), 10.0)
        for pid in processes_with(str(self.folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _wait(self) -> None:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        pytest.skip("sshd does not start here: " + (self.folder / "log").read_text()[-300:])


class Cut:
    """A way to a port that breaks after so many bytes in one direction, once.

    Args:
        port: Where it leads.
        up: Bytes towards the device until it breaks; None: never.
        down: Bytes from the device until it breaks; None: never.
    """

    def __init__(self, port: int, up: int | None = None, down: int | None = None) -> None:
        self._to, self._left = port, {"up": up, "down": down}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.broken, self.passed = False, {"up": 0, "down": 0}
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Break everything and listen no more."""
        self._server.close()
        self._break()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for way, source, sink in (("up", near, far), ("down", far, near)):
                    threading.Thread(
                        target=self._pump, args=(way, source, sink), daemon=True
                    ).start()

    def _pump(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(8192):
                left = self._left[way]
                self.passed[way] += len(data)
                if left is not None and not self.broken:
                    self._left[way] = left - len(data)
                    if left < len(data):
                        self.broken = True
                        self._break()
                        return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _break(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open = []


def write_script(path: Path, text: str) -> None:
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make_key(path: Path) -> None:
    """A throw-away key pair."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Processes below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(path.parent.name)
                found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> str:
    """Of a process; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def processes_with(text: str) -> list[int]:
    """Processes whose command line holds a text, this one not counted."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in numbers if pid != os.getpid() and text in command_line(pid)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Wait for a condition; whether it holds in the end."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def quoted(path: Path) -> str:
    """A path for a shell."""
    return shlex.quote(str(path))
