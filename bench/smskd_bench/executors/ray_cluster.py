"""A Ray cluster as a run sees it: joining it, its nodes, and whether they can do our work."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smskd.atomic import write_atomically
from smskd.errors import ConfigError, RefusedError, StoreError
from smskd_bench.environment import package_versions
from smskd_bench.executors.ray_settings import RaySettings
from smskd_bench.executors.ray_task import Sighting, look
from smskd_bench.store import Store

PIP = "pip install 'smskd-bench[ray]'"
KNOCK_S = 5
"""How long an address may take to answer."""
LOOK_S = 120
"""How long a node may take to start a worker process and say what it sees."""
SAME = ("smskd-bench", "torch", "numpy")
"""Packages whose versions decide bits, and must be the same everywhere."""


@dataclass(frozen=True)
class Share:
    """What one stage run takes of a node: CPU cores, and a GPU or a part of it."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its id, its name, and what it has in all."""

    id: str
    host: str
    cpus: float
    gpus: float

    def places(self, share: Share) -> int:
        """How many stage runs it can train at once."""
        by_gpu = self.gpus / share.gpus if share.gpus else float("inf")
        return int(min(self.cpus / share.cpus, by_gpu) + 1e-9)


class RayCluster:
    """A cluster that this process has joined."""

    def __init__(self, settings: RaySettings, ray: Any) -> None:
        self.settings = settings
        self.ray = ray

    def nodes(self) -> list[Node]:
        """The nodes that are alive now."""
        return [
            Node(n["NodeID"], n["NodeManagerHostname"], *(_amount(n, w) for w in ("CPU", "GPU")))
            for n in self.ray.nodes()
            if n["Alive"]
        ]

    def device(self, wanted: str) -> Literal["cpu", "cuda"]:
        """The device of the stage runs: "auto" is a GPU if any node has one.

        Raises:
            ConfigError: it is not what Ray can give.
        """
        has_gpus = any(node.gpus for node in self.nodes())
        if wanted == "auto":
            return "cuda" if has_gpus else "cpu"
        if wanted == "cpu":
            return "cpu"
        if wanted != "cuda":
            raise ConfigError(
                f"--device {wanted} cannot be had: Ray chooses the GPU of each stage run",
                "use auto, cpu or cuda",
            )
        if not has_gpus:
            raise ConfigError("no node of the cluster has a GPU", "use --device cpu")
        return "cuda"

    def share(self, device: str, threads: int) -> Share:
        """What a stage run takes.

        Raises:
            ConfigError: no node has that much, or a CPU is to be trained on with a GPU.
        """
        wanted = self.settings.gpus_per_stage_run
        if device == "cpu" and wanted:
            raise ConfigError(
                "--gpus-per-stage-run is for GPUs, and this trains on CPUs", "drop it"
            )
        share = Share(float(threads), (wanted or 1.0) if device == "cuda" else 0.0)
        nodes = self.nodes()
        if not any(node.places(share) for node in nodes):
            most = max((node.cpus for node in nodes), default=0.0)
            raise ConfigError(
                f"no node has room for a stage run of {threads} CPU threads"
                + (f" and {share.gpus:g} GPU" if share.gpus else "")
                + f"; the largest has {most:g} CPUs",
                "use --threads N for less, or start the nodes with more (ray start --num-cpus N)",
            )
        return share

    def on(self, node: str, soft: bool) -> Any:
        """Ray's way to say on which node a task should (soft) or has to run."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=soft)

    def everywhere(self, function: Any, *arguments: Any) -> dict[Node, Any]:
        """Call a function once on every node; None where no answer came in time."""
        task = self.ray.remote(num_cpus=0, max_retries=0)(function)
        nodes = self.nodes()
        refs = {
            task.options(scheduling_strategy=self.on(node.id, soft=False)).remote(*arguments): node
            for node in nodes
        }
        ready, _ = self.ray.wait(list(refs), num_returns=len(refs), timeout=LOOK_S)
        answers: dict[Node, Any] = dict.fromkeys(nodes)
        for ref in ready:
            with suppress(self.ray.exceptions.RayError):  # a node that went: it has no answer
                answers[refs[ref]] = self.ray.get(ref)
        return answers

    @contextmanager
    def beacon(self, store: Store, token: str) -> Iterator[Path | None]:
        """A file in the store by which a node knows it; None if nodes have stores of their own.

        Raises:
            RefusedError: a node does not see the store, or has other versions than we.
        """
        if self.settings.store_mode == "fetch":
            self._check(None, token)
            yield None
            return
        beacon = store.root / f".ray-{token}.tmp"
        try:
            write_atomically(beacon, lambda path: path.write_text(token, encoding="utf-8"))
            self._check(beacon, token)
            yield beacon
        except OSError as error:
            raise StoreError(
                f"the store {store.root} cannot be written: {error.strerror or error}",
                "free some space or choose another folder with --store DIR; nothing done is lost",
            ) from None
        finally:
            with suppress(OSError):
                beacon.unlink(missing_ok=True)

    def _check(self, beacon: Path | None, token: str) -> None:
        answer = f".ray-{token}-answer.tmp"
        found = self.everywhere(look, beacon, token, answer)
        wrote = beacon is None or _take_away(beacon.with_name(answer))
        for node, sighting in found.items():
            if sighting is None:
                raise RefusedError(
                    f"node {node.host} gave no answer: it cannot run this program, or is gone",
                    "install smskd-bench there, with the same Python, as Ray's nodes find it",
                )
            _check_versions(node, sighting)
            if not (sighting.sees_store and wrote):
                raise RefusedError(
                    f"node {node.host} does not see the store {beacon.parent if beacon else ''}",
                    "put the store into a folder that all nodes share, under the same path, "
                    "or use --store-mode fetch",
                )


@contextmanager
def joined(settings: RaySettings) -> Iterator[RayCluster]:
    """Join a cluster, or start Ray on this machine, for the length of a run.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _import_ray()
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR,
            configure_logging=True, **own,
        )  # fmt: skip
    except Exception as error:  # Ray has no type of its own for this
        raise _no_cluster(address, " ".join(str(error).split())) from None
    _quieten()
    try:
        yield RayCluster(settings, ray)
    finally:
        ray.shutdown()


def new_token() -> str:
    """A name for a run that no other has."""
    return secrets.token_hex(6)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--executor ray needs the package ray, which is not installed", PIP
        ) from None
    return ray


def _check_address(address: str) -> None:
    """Knock first: Ray itself would wait for minutes, and may end the process."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            f"{address!r} is no address of a Ray cluster",
            "give HOST:PORT as `ray start` prints it, and run this on a node of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from None
    with suppress(ImportError):  # not part of Ray's public face
        from ray._raylet import check_health

        try:
            healthy = check_health(address, timeout=KNOCK_S)
        except Exception as error:
            raise _no_cluster(address, " ".join(str(error).split())) from None
        if not healthy:
            raise _no_cluster(address, "what answers there is not Ray")


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"there is no Ray cluster to join at {address}: {why[:300]}",
        "give the address that `ray start --head` printed, and run this on a node of the cluster; "
        "without --address Ray is started on this machine",
    )


def _quieten() -> None:
    """Keep Ray's news of dying nodes out of our output: we tell what it means for stage runs."""
    with suppress(ImportError):
        from ray._private import worker

        if hasattr(worker, "print_to_stdstream"):
            worker.print_to_stdstream = lambda *args, **kwargs: None


def _check_versions(node: Node, sighting: Sighting) -> None:
    here = package_versions()
    for name in SAME:
        if sighting.versions.get(name) != here.get(name):
            raise RefusedError(
                f"node {node.host} has {name} {sighting.versions.get(name)}, and this machine "
                f"{here.get(name)}: results would not be the same bits",
                "install the same versions everywhere",
            )


def _take_away(file: Path) -> bool:
    """Remove a file that a node wrote; False if it never arrived here."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _amount(node: dict[str, Any], what: str) -> float:
    return float(node["Resources"].get(what, 0.0))
