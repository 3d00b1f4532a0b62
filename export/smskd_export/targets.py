"""Target profiles: what graphs are made for, what a device must offer, how it is measured there.

A profile is a YAML file, data and not code; the shipped ones lie in ``targets/``, and
``export/README.md`` has their table. It only states requirements: what a device really is, is found
out there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from smskd.errors import ConfigError, unknown_name
from smskd_export.records import adapter
from smskd_export.yaml_reader import parse_yaml, read_text

_FORBID = ConfigDict(extra="forbid")
_SUFFIXES = (".yaml", ".yml")
OLDEST_OPSET, NEWEST_OPSET = 17, 23
FP16_SCALES_OPSET = 19
"""QuantizeLinear and DequantizeLinear take float16 scales from here on."""

Graph = Literal["fp32", "fp16", "int8_signed", "int8_unsigned"]


@dataclass(frozen=True)
class Protocol:
    """How long to measure, frozen and named. A window ends when *both* of its minimums are met.

    Attributes:
        name: Name and version; measurements of different protocols are never ranked together.
        warmup_s: Seconds of inference before the first window, at least.
        warmup_runs: Inferences before the first window, at least.
        min_duration_s: Seconds that every window lasts at least.
        min_samples: Inferences that every window holds at least.
        windows: Number of windows.
        cooldown_s: Rest between two windows.
        sweep_duration_s: Length of the single window of every batch size after the first.
        settle_s: Rest before the warm-up.
        start_below_c: Wait (at most five times ``settle_s``) until no sensor is hotter; 0: any.
        abort_above_c: Stop measuring when a sensor is hotter; 0: never.
        cuda_graph: Whether to measure once more with the inference captured as a CUDA graph.
        energy_idle_s: Length of the idle part of the energy pass.
        energy_active_s: Length of the busy part of the energy pass; 0: no energy pass.
        parity_images: Images of the parity check.
        distinct_inputs: Different images that the timed inferences cycle through.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    warmup_s: float
    warmup_runs: int
    min_duration_s: float
    min_samples: int
    windows: int
    cooldown_s: float
    sweep_duration_s: float
    settle_s: float
    start_below_c: float
    abort_above_c: float
    cuda_graph: bool
    energy_idle_s: float
    energy_active_s: float
    parity_images: int = 256
    distinct_inputs: int = 64

    def __post_init__(self) -> None:
        seconds = {name: value for name, value in vars(self).items() if name.endswith(("_s", "_c"))}
        for name, value in seconds.items():
            _require(value >= 0, f"{name} must not be negative")
        for name in ("min_samples", "windows", "parity_images", "distinct_inputs"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1")
        _require(self.warmup_runs >= 0, "warmup_runs must not be negative")

    def shortened(self) -> Protocol:
        """Return a smoke-test version of this protocol, good for wiring and for no claim."""
        return replace(
            self,
            name="quick",
            warmup_s=min(self.warmup_s, 0.1),
            warmup_runs=min(self.warmup_runs, 10),
            min_duration_s=min(self.min_duration_s, 0.1),
            min_samples=min(self.min_samples, 50),
            windows=min(self.windows, 2),
            cooldown_s=0.0,
            sweep_duration_s=min(self.sweep_duration_s, 0.1),
            settle_s=0.0,
            energy_idle_s=0.0,
            energy_active_s=0.0,
        )


@dataclass(frozen=True)
class Precision:
    """One way to compute the student, and what still counts as the same student.

    Attributes:
        name: What tables call it. ``int8+fp32`` says int8 where quantised and fp32 elsewhere.
        graph: Which ONNX graph: ``int8_signed`` is what TensorRT reads, ``int8_unsigned`` what is
            fast in ONNX Runtime on x86.
        residue: What is not quantised is computed in this type.
        weak_fp16: On a TensorRT before 10, let the builder use fp16 where it likes.
        min_agreement: Images with the same predicted class as PyTorch, in percent.
        max_abs_diff: Largest difference of any logit from PyTorch's; None: not limited.
        max_drop: Points of top-1 that may be lost against PyTorch.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    graph: Graph
    min_agreement: float
    residue: Literal["fp32", "fp16"] = "fp32"
    weak_fp16: bool = False
    max_abs_diff: float | None = None
    max_drop: float = 1.0

    def __post_init__(self) -> None:
        _require(
            bool(re.fullmatch(r"[a-z0-9][a-z0-9+_.-]*", self.name)), "name: use a-z, 0-9, + - _ ."
        )
        _require(self.max_abs_diff is None or self.max_abs_diff > 0, "max_abs_diff must be above 0")
        _require(0 <= self.min_agreement <= 100, "min_agreement is a percentage")
        _require(self.max_drop >= 0, "max_drop must not be negative")

    @property
    def quantised(self) -> bool:
        """Whether it needs calibration images."""
        return self.graph.startswith("int8")


@dataclass(frozen=True)
class Calibration:
    """Where the scales of quantised graphs come from: always training images.

    Attributes:
        n: Number of images.
        seed: Chooses them.
        method: ``minmax`` or ``entropy`` or ``percentile`` of the observed activations.
        reduce_range: Use 7 of 8 bits of the weights; x86 processors without VNNI add pairs of
            products in 16 bits, which 8-bit weights can overflow.
        quantiser: ``onnxruntime``, or ``modelopt`` (NVIDIA Model Optimizer, extra ``modelopt``).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    n: int = 512
    seed: int = 0
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    reduce_range: bool = False
    quantiser: Literal["onnxruntime", "modelopt"] = "onnxruntime"

    def __post_init__(self) -> None:
        _require(self.n >= 1, "n must be >= 1")


@dataclass(frozen=True)
class Requirements:
    """What the device must offer; checked there. Empty: anything will do.

    Attributes:
        arch: Instruction sets, e.g. ``[aarch64]``.
        python: Oldest Python.
        runtime_min: Oldest version of the runtime.
        runtime_max: Newest version of the runtime, as far as written: "10" admits every 10.x.
        compute_capability: Of the GPU, e.g. ``["8.7"]``.
        board: Text that the board's name contains, e.g. "Orin Nano".
        power_mode: Name of the nvpmodel mode.
        clocks_locked: Whether ``jetson_clocks`` must hold the clocks.
        free_memory_mb: Memory that must be free.
        free_disk_mb: Space that must be free where the bundle lies.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    arch: tuple[str, ...] = ()
    python: str = "3.8"
    runtime_min: str = ""
    runtime_max: str = ""
    compute_capability: tuple[str, ...] = ()
    board: str = ""
    power_mode: str = ""
    clocks_locked: bool = False
    free_memory_mb: int = 0
    free_disk_mb: int = 0

    def __post_init__(self) -> None:
        for name in ("python", "runtime_min", "runtime_max"):
            text = getattr(self, name)
            _require(not text or bool(re.fullmatch(r"\d+(\.\d+)*", text)), f"{name}: not a version")


@dataclass(frozen=True)
class Target:
    """What graphs are made for.

    Attributes:
        name: Identifier, and the stem of its file.
        description: One line for people.
        runtime: What executes the graphs on the device.
        opset: ONNX operator set, exactly.
        batches: Batch sizes, one graph each: the first is the single stream, the others a sweep.
        precisions: In the order of tables; the first is the one that others are derived from.
        protocol: How to measure.
        requires: What the device must offer.
        threads: CPU threads of the runtime.
        affinity: CPU cores to run on; empty: whatever the system gives.
        tf32: Whether TensorRT may round fp32 products to TF32.
        workspace_mb: Memory that TensorRT may try tactics with.
        calibration: Where int8 scales come from.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str
    description: str
    runtime: Literal["onnxruntime", "tensorrt"]
    opset: int
    batches: tuple[int, ...]
    precisions: tuple[Precision, ...]
    protocol: Protocol
    requires: Requirements = field(default_factory=Requirements)
    threads: int = 1
    affinity: tuple[int, ...] = ()
    tf32: bool = False
    workspace_mb: int = 256
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        _require(  # folders are named after it
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+_.-]{0,63}", self.name)),
            "name: use at most 64 of A-Z, a-z, 0-9, + - _ ., a letter or digit first",
        )
        _require(
            OLDEST_OPSET <= self.opset <= NEWEST_OPSET,
            f"opset must be {OLDEST_OPSET} to {NEWEST_OPSET}",
        )
        _require(self.threads >= 1, "threads must be >= 1")
        _require(bool(self.batches) and min(self.batches) >= 1, "batches must be sizes >= 1")
        _require(len(set(self.batches)) == len(self.batches), "batches must differ")
        names = [precision.name for precision in self.precisions]
        _require(bool(names) and len(set(names)) == len(names), "precisions need different names")
        _require(self.precisions[0].graph == "fp32", "the first precision must be an fp32 graph")
        for precision in self.precisions:
            self._check(precision)

    def _check(self, precision: Precision) -> None:
        where = f"precision {precision.name}"
        _require(
            self.runtime == "onnxruntime" or precision.graph != "int8_unsigned",
            f"{where}: TensorRT reads signed int8 only",
        )
        _require(
            not precision.quantised
            or precision.residue == "fp32"
            or self.opset >= FP16_SCALES_OPSET,
            f"{where}: int8 with residue fp16 needs opset {FP16_SCALES_OPSET}; "
            "with an older TensorRT use residue fp32 and weak_fp16",
        )

    def with_threads(self, threads: int) -> Target:
        """The same target with another number of CPU threads."""
        return replace(self, threads=threads)


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
    document = parse_yaml(text, Path(where))
    try:
        return adapter(Target).validate_python(document.content)
    except ValidationError as error:
        problems = "; ".join(_problem(e["loc"], e["msg"]) for e in error.errors())
        raise ConfigError(
            f"{where}: {problems}",
            "compare it with a shipped profile: " + ", ".join(list_targets()),
        ) from error


def _read(name: str) -> tuple[str, str]:
    """Text of a profile and how to call it in a message."""
    if name.endswith(_SUFFIXES) or len(Path(name).parts) > 1:
        return read_text(Path(name)), name
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
