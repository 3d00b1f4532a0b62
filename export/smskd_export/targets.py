"""Target profiles: what a graph is made for, and how it is timed there. Data, not code.

A profile is a YAML file; the shipped ones lie in ``targets/``. ``README.md`` explains the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from smskd.errors import ConfigError, unknown_name

_FORBID = ConfigDict(extra="forbid")
_SUFFIXES = (".yaml", ".yml")
OLDEST_OPSET, NEWEST_OPSET = 17, 23


@dataclass(frozen=True)
class Protocol:
    """How long to measure. A window ends when *both* of its minimums are met.

    Attributes:
        warmup_s: Seconds of inference before the first window.
        min_duration_s: Seconds that every window lasts at least.
        min_samples: Inferences that every window holds at least.
        windows: Number of windows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    warmup_s: float
    min_duration_s: float
    min_samples: int
    windows: int

    def __post_init__(self) -> None:
        _require(self.warmup_s >= 0 and self.min_duration_s >= 0, "durations must not be negative")
        _require(
            self.min_samples >= 1 and self.windows >= 1, "min_samples and windows must be >= 1"
        )

    def shortened(self) -> Protocol:
        """Return a smoke-test version of this protocol, good for wiring and for no claim."""
        return replace(
            self,
            warmup_s=min(self.warmup_s, 0.1),
            min_duration_s=min(self.min_duration_s, 0.1),
            min_samples=min(self.min_samples, 50),
            windows=min(self.windows, 2),
        )


@dataclass(frozen=True)
class ParityThresholds:
    """How closely a graph must repeat the PyTorch model.

    Attributes:
        max_abs_diff: Largest difference of any logit.
        min_agreement: Images with the same predicted class, in percent.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    max_abs_diff: float
    min_agreement: float

    def __post_init__(self) -> None:
        _require(self.max_abs_diff > 0, "max_abs_diff must be above 0")
        _require(0 <= self.min_agreement <= 100, "min_agreement is a percentage")


@dataclass(frozen=True)
class Target:
    """What a graph is made for.

    Attributes:
        name: Identifier, and the stem of its file.
        description: One line for people.
        runtime: What executes the graph on the target.
        opset: ONNX operator set, exactly.
        dynamic_batch: Whether the graph takes any batch size, else only ``batches[0]``.
        batches: Batch sizes the graph is run at: the first is timed, the largest carries parity.
        threads: CPU threads of the runtime.
        measure_here: Whether the machine that exports is the machine to time.
        protocol: How long to measure.
        parity: How closely the graph must repeat the PyTorch model.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    description: str
    runtime: Literal["onnxruntime", "tensorrt"]
    opset: int
    dynamic_batch: bool
    batches: tuple[int, ...]
    threads: int
    measure_here: bool
    protocol: Protocol
    parity: ParityThresholds

    def __post_init__(self) -> None:
        _require(
            OLDEST_OPSET <= self.opset <= NEWEST_OPSET,
            f"opset must be {OLDEST_OPSET} to {NEWEST_OPSET}",
        )
        _require(self.threads >= 1, "threads must be >= 1")
        _require(bool(self.batches) and min(self.batches) >= 1, "batches must be sizes >= 1")
        _require(
            self.dynamic_batch or len(self.batches) == 1,
            "a graph without dynamic_batch has exactly one batch size",
        )
        _require(
            self.runtime == "onnxruntime" or not self.measure_here,
            f"measure_here: {self.runtime} is timed on its device, not by the export",
        )


def list_targets() -> list[str]:
    """Names of the shipped profiles, sorted."""
    folder = files("smskd_export") / "targets"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_target(name_or_path: str | Path) -> Target:
    """Read a shipped profile by name, or one of your own by the path of its YAML file.

    Raises:
        UnknownNameError: no shipped profile has this name.
        ConfigError: the file cannot be read, or a field is missing, unknown or wrong.
    """
    text, where = _read(str(name_or_path))
    try:
        return TypeAdapter(Target).validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(_problem(e["loc"], e["msg"]) for e in error.errors())
        raise ConfigError(
            f"{where}: {problems}",
            "compare it with a shipped profile: " + ", ".join(list_targets()),
        ) from error


def _read(name: str) -> tuple[str, str]:
    """Text of a profile and how to call it in a message."""
    if name.endswith(_SUFFIXES) or len(Path(name).parts) > 1:
        try:
            return Path(name).read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read target profile {name}: {error}") from error
    if name not in list_targets():
        raise unknown_name("target", name, list_targets())
    profile = files("smskd_export") / "targets" / f"{name}.yaml"
    return profile.read_text(encoding="utf-8"), f"target {name}"


def _problem(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(str(part) for part in location)
    message = message.removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
