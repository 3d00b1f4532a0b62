"""Tracking: what a mirror of the store has to be able to do, and which mirror to use.

The store on disk is the truth. A tracker only mirrors it for people to look at, so it never raises
once it has been made, and it never makes training wait. Importing this module imports neither
wandb nor torch.

Where Weights & Biases keeps credentials and modes was read from wandb 0.31 (`wandb.sdk.lib.wbauth`
and `wandb.sdk.wandb_settings`); see docs/tracking.md.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]
TrackerKind = Literal["wandb", "none"]

DEFAULT_SERVER = "https://api.wandb.ai"
# The names wandb accepts, with the old ones, and what they mean to us.
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


@dataclass(frozen=True)
class ArtifactRef:
    """The weights of another stage run that a stage run starts from or learns from.

    Attributes:
        role: "teacher" or "parent".
        key: Key of the stage run that made the weights, 64 hexadecimal digits.
        weights: Its weights file in the store.
    """

    role: Literal["teacher", "parent"]
    key: str
    weights: Path


@dataclass(frozen=True)
class OutputRef:
    """Files that a run made, other than a student's weights.

    Attributes:
        name: Name of the W&B artifact.
        kind: Its type, e.g. "bundle".
        folder: Holds the files.
        files: Which of them, as paths below ``folder``.
    """

    name: str
    kind: str
    folder: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class RunCard:
    """What is known about a stage run (or a measurement) before it starts.

    Attributes:
        key: Key of the stage run, 64 hexadecimal digits; the W&B run id is made from it.
        name: Name shown to people.
        project: W&B project.
        group: Cell or matrix the run belongs to.
        job_type: "teacher", "student" or "measurement".
        tags: Free labels; W&B keeps the first 64 characters of each.
        config: The full specification, may be nested.
        inputs: Weights of the parent and of the teachers.
        folder: Where all files of W&B go: `<store>/wandb`.
    """

    key: str
    name: str
    project: str
    group: str
    job_type: str
    folder: Path
    tags: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    inputs: tuple[ArtifactRef, ...] = ()


class Tracker(Protocol):
    """A mirror of stage runs. No method raises because of the mirror, and none waits but `close`.

    One tracker per process; call it from one thread at a time.
    """

    def begin(self, card: RunCard) -> None:
        """Open the mirror of a stage run; a key seen before continues its old run."""

    def log(self, key: str, row: Mapping[str, float], epoch: int) -> None:
        """Add the metrics of one epoch."""

    def end(
        self,
        key: str,
        status: str,
        summary: Mapping[str, object],
        weights: Path | None,
        outputs: Sequence[OutputRef] = (),
    ) -> None:
        """Close the mirror of a stage run.

        Args:
            key: Key of the stage run.
            status: "done", or any other word for a run that did not end well.
            summary: Flat fields for the leaderboard, such as test_top1, pair, row, seed.
            weights: Weights file to record as this run's output, or None.
            outputs: Other files to record as its outputs.
        """

    def close(self, timeout_s: float) -> list[str]:
        """Wait at most `timeout_s` seconds for the mirror, then leave it.

        Returns:
            Messages for the user: problems met, and how to upload what is only on disk.
        """

    def leave(self, timeout_s: float) -> list[str]:
        """Wait at most `timeout_s` seconds, then let the mirror end by itself: we were stopped.

        Returns:
            Messages for the user, as far as there are any yet.
        """


class NullTracker:
    """Mirrors nothing."""

    def begin(self, card: RunCard) -> None:
        """Do nothing."""

    def log(self, key: str, row: Mapping[str, float], epoch: int) -> None:
        """Do nothing."""

    def end(
        self,
        key: str,
        status: str,
        summary: Mapping[str, object],
        weights: Path | None,
        outputs: Sequence[OutputRef] = (),
    ) -> None:
        """Do nothing."""

    def close(self, timeout_s: float) -> list[str]:
        """Do nothing and report nothing."""
        return []

    def leave(self, timeout_s: float) -> list[str]:
        """Do nothing and report nothing."""
        return []


def make_tracker(kind: TrackerKind) -> Tracker:
    """Return the tracker called `kind`; nothing is started before its first `begin`.

    Raises:
        UnknownNameError: `kind` is neither "wandb" nor "none".
        ConfigError: WANDB_MODE, or the mode in a settings file of wandb, is not one wandb knows.
    """
    if kind == "none":
        return NullTracker()
    if kind != "wandb":
        from smskd.errors import unknown_name

        raise unknown_name("tracker", kind, ("wandb", "none"))
    state = login_state()
    if state.mode == "disabled":
        return NullTracker()
    from smskd_bench.wandb_tracker import WandbTracker

    return WandbTracker(state.mode)


@dataclass(frozen=True)
class LoginState:
    """How W&B will be used on this machine.

    Attributes:
        mode: "online", "offline" or "disabled".
        reason: Where that comes from, for people.
    """

    mode: Mode
    reason: str


def login_state() -> LoginState:
    """Find the W&B mode from the environment and wandb's files, without any network call.

    An explicit mode wins; otherwise online when there are credentials, else offline.

    Raises:
        ConfigError: The explicit mode is not one wandb knows.
    """
    settings = _settings_files()
    for where, value in (
        ("WANDB_MODE", os.environ.get("WANDB_MODE")),
        ("the settings file of wandb", settings.get("mode")),
    ):
        if value:
            return LoginState(_known_mode(value, where), f"{where} says {value}")
    source = _credentials(settings)
    if source:
        return LoginState("online", f"logged in: credentials from {source}")
    return LoginState("offline", "not logged in: run `wandb login`, or set WANDB_API_KEY")


def _known_mode(value: str, where: str) -> Mode:
    if value not in _MODES:
        from smskd.errors import ConfigError  # here, because the package imports torch

        known = ", ".join(_MODES)
        raise ConfigError(f"{where} is {value!r}, which is no mode of W&B", f"use one of: {known}")
    return _MODES[value]


def _credentials(settings: Mapping[str, str]) -> str | None:
    """Return the place that holds credentials for the configured server, or None."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or DEFAULT_SERVER
    path = _netrc_path()
    if _netrc_has(path, urlsplit(server).netloc):
        return str(path)
    return "the settings file of wandb" if settings.get("api_key") else None


def _netrc_path() -> Path:
    """Return the netrc file wandb reads: $NETRC, else ~/.netrc, else ~/_netrc."""
    if os.environ.get("NETRC"):
        return Path(os.environ["NETRC"]).expanduser()
    paths = (Path.home() / ".netrc", Path.home() / "_netrc")
    return next((path for path in paths if path.exists()), paths[0])


def _netrc_has(path: Path, host: str) -> bool:
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return bool(entry and entry[2])


def _settings_files() -> dict[str, str]:
    """Return wandb's global settings, overridden by those of the working folder."""
    config = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    local = Path(os.environ.get("WANDB_DIR") or Path.cwd())
    folder = local / (".wandb" if (local / ".wandb").exists() else "wandb")
    found: dict[str, str] = {}
    for path in (Path(config).expanduser() / "settings", folder / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found.update(parser["default"])
    return found
