"""A real SLURM of one node on this machine, with two GPUs that are none, in folders of its own.

munged, slurmctld and slurmd run in the foreground as our children, on free ports, without systemd
and without accounting.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=300
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=512 Gres=gpu:2 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""
GPUS = "Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n"


class Slurm:
    """The cluster; ``environment`` is what its commands need.

    Args:
        folder: Where everything of it goes; a short path, as sockets have no room for long ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self._configure()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __call__(self, *command: str) -> str:
        """Output of one of SLURM's commands; "" if it fails."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> list[str]:
        """Ids of what is queued or runs; elements of an array one by one."""
        return self("squeue", "--noheader", "--array", "--format=%i").split()

    def close(self) -> None:
        """End all jobs, then the daemons."""
        if self.jobs():
            self("scancel", "--quiet", *self.jobs())
            self.wait(lambda: not self.jobs(), 15.0)
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait(self, condition, timeout_s: float = 30.0) -> bool:
        """Whether a condition came to hold in that time."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _configure(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        values = {
            "host": socket.gethostname().split(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "controller_port": free_port(),
            "node_port": free_port(),
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (self.folder / "gres.conf").write_text(GPUS)

    def _start(self) -> None:
        folder, configuration = self.folder, self.environment["SLURM_CONF"]
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        places = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        self._daemon("munged", "--foreground", "--force", *places)
        self._need((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-i", "-f", configuration)
        self._need(lambda: bool(self("sinfo", "--noheader")), "slurmctld")
        self._daemon("slurmd", "-D", "-f", configuration)
        self._need(lambda: "idle" in self("sinfo", "--noheader", "--format=%t"), "slurmd")

    def _daemon(self, name: str, *options: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [program(name) or name, *options]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _need(self, condition, name: str) -> None:
        if not self.wait(condition):
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            pytest.skip(f"{name} does not start here: {log[-400:]}")


def program(name: str) -> str | None:
    """A program's path; daemons are not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing() -> str:
    """Why there can be no SLURM here, or ""."""
    lacking = [name for name in (*DAEMONS, "sbatch", "srun") if program(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm, munge)"
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "submitit is not installed"
    return ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def cluster():
    """A SLURM for the tests of this block; skips them with the reason where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    # A short path, as a socket has no room for more.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    started = None
    try:
        started = Slurm(folder)
        yield started
    finally:
        if started:
            started.close()
        shutil.rmtree(folder, ignore_errors=True)
