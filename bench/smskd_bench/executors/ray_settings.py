"""What the user asked of ``--executor ray``; checked without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smskd.errors import ConfigError

ExecutorKind = Literal["local", "slurm", "ray"]
StoreMode = Literal["shared", "fetch"]


@dataclass(frozen=True)
class RaySettings:
    """How a matrix is spread over a Ray cluster.

    Attributes:
        address: HOST:PORT of a cluster, or "auto" for one that runs on this machine; None starts
            Ray on this machine, unless the environment names a cluster (RAY_ADDRESS).
        gpus_per_stage_run: Share of a GPU; None is a whole one on CUDA and none on a CPU.
        store_mode: "shared": all nodes see the store under its path. "fetch": nodes work in
            folders of their own, and what they finish is brought to the store.
        node_store: With "fetch", where nodes make these folders; default: for temporary files.
    """

    address: str | None = None
    gpus_per_stage_run: float | None = None
    store_mode: StoreMode = "shared"
    node_store: Path | None = None

    @classmethod
    def choose(cls, executor: ExecutorKind, **wanted: Any) -> RaySettings | None:
        """From the command line; None for another executor.

        Raises:
            ConfigError: options that do not go together.
        """
        settings = cls(**wanted)
        if executor != "ray":
            default = cls()
            given = [name for name in wanted if getattr(settings, name) != getattr(default, name)]
            if given:
                options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
                raise ConfigError(f"{options} is for a Ray cluster", "add --executor ray")
            return None
        if settings.node_store and settings.store_mode != "fetch":
            raise ConfigError(
                "--node-store is for nodes that do not see the store", "add --store-mode fetch"
            )
        return settings
