"""Read features from any ``nn.Module`` by module name, without editing the model.

A *tap* is a module path as in ``named_modules()``: ``"layer2"`` reads that module's output,
``"fc:input"`` its first input; of a module that runs several times, the last time counts.
``"blocks.3:tokens"`` reads tokens ``(B, N, C)`` as a map, a leading class token left out, and
``":nhwc"`` a map ``(B, H, W, C)``, so that methods see ``(B, C, H, W)`` of every kind of network.
:class:`Taps` says which taps of a model play which role.

Shapes: B batch, K classes, C channels, H and W height and width, D width of the pooled feature,
N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smskd.errors import ConfigError, did_you_mean
from smskd.modes import eval_mode

MAPS, PREACT, POOLED, SPATIAL = "maps", "preact", "pooled", "spatial"
FEATURES = frozenset({MAPS, PREACT, POOLED, SPATIAL})
"""Roles that are read from a forward pass."""

CLASSIFIER, NETWORK = "classifier", "network"
"""Roles that are a module: the last linear layer, and the whole network, to be run on other images.
Who asks for one gets it in ``Signals.networks``."""

SIDES = ("", "input", "output", "tokens", "nhwc")
"""What may follow the colon of a tap."""


@dataclass(frozen=True)
class Taps:
    """Where the features that distillation methods ask for are found in one model.

    Attributes:
        maps: Feature maps ``(B, C, H, W)`` from the stem (f0) to the last block (fn).
        preact: The same places before their activation; empty if the model has none to offer.
        pooled: Penultimate feature ``(B, D)``, usually ``"<classifier>:input"``.
        classifier: Module path of the last linear layer.
        spatial: Map ``(B, D, H, W)`` whose mean over positions is the pooled feature.
    """

    maps: tuple[str, ...] = ()
    preact: tuple[str, ...] = ()
    pooled: str | None = None
    classifier: str | None = None
    spatial: str | None = None

    def wanted(self, roles: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Map each role to its tap strings.

        Raises:
            ConfigError: a role is asked for that this model has no tap for.
        """
        have = {
            MAPS: self.maps,
            PREACT: self.preact,
            POOLED: (self.pooled,) if self.pooled else (),
            SPATIAL: (self.spatial,) if self.spatial else (),
            CLASSIFIER: (self.classifier,) if self.classifier else (),
            NETWORK: ("",),
        }
        missing = [role for role in roles if not have[role]]
        if missing:
            raise ConfigError(
                f"the model has no tap for {' and '.join(missing)}",
                f"name the modules to read, e.g. Taps({missing[0]}=...)",
            )
        return {role: have[role] for role in roles if role in FEATURES}


@dataclass(frozen=True)
class Network:
    """A model with the places of its features."""

    model: nn.Module
    taps: Taps = field(default_factory=Taps)

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer.

        Raises:
            ConfigError: the taps do not name one.
        """
        self.taps.wanted([CLASSIFIER])
        found = self.model.get_submodule(self.taps.classifier or "")
        if not isinstance(found, nn.Linear):
            raise ConfigError(
                f"the classifier {self.taps.classifier!r} is a {type(found).__name__}",
                "name the last linear layer",
            )
        return found


@dataclass(frozen=True)
class Outputs:
    """What one network said about one batch.

    Attributes:
        logits: ``(B, K)``, always float32 or wider.
        maps: Feature maps ``(B, C, H, W)``; empty unless asked for.
        preact: Maps before their activation; empty unless asked for.
        pooled: ``(B, D)``; None unless asked for.
        spatial: ``(B, D, H, W)``, whose mean over positions is the pooled feature; None unless
            asked for.
    """

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    preact: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None
    spatial: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """The same with every tensor changed alike."""
        return Outputs(
            change(self.logits),
            tuple(map(change, self.maps)),
            tuple(map(change, self.preact)),
            None if self.pooled is None else change(self.pooled),
            None if self.spatial is None else change(self.spatial),
        )


@dataclass(frozen=True)
class Shapes:
    """Sizes of what one network says, without the batch dimension.

    Attributes:
        num_classes: K.
        maps: One ``(C, H, W)`` a map.
        preact: One ``(C, H, W)`` a map before activation.
        pooled: D, or 0 if not tapped.
        spatial: ``(D, H, W)``, or empty if not tapped.
    """

    num_classes: int
    maps: tuple[tuple[int, ...], ...] = ()
    preact: tuple[tuple[int, ...], ...] = ()
    pooled: int = 0
    spatial: tuple[int, ...] = ()


@dataclass
class TappedModel:
    """A model together with hooks on the taps that the roles in ``roles`` need.

    Calling it runs the model and returns :class:`Outputs`. Losses want float32, so features that
    autocast made narrower are widened here, once, for every method. Use ``close()`` (or a ``with``
    block) to take the hooks off again. ``compiled`` is set by :mod:`smskd.compiled`.

    Raises:
        ConfigError: a tap names no module, or the model does not give logits ``(B, K)`` and
            tensors at its taps.
    """

    model: nn.Module
    taps: Taps
    roles: frozenset[str] = frozenset()
    compiled: Callable[[TappedModel, Tensor], Outputs | None] | None = None
    _seen: dict[str, tuple[object, int]] = field(default_factory=dict, init=False, repr=False)
    _handles: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules())
        taps = [tap for role in self.taps.wanted(sorted(self.roles)).values() for tap in role]
        for tap in taps:
            _check_tap(tap, modules)
        self._handles.extend(self._hook(modules, tap) for tap in dict.fromkeys(taps))

    def _hook(self, modules: dict[str, nn.Module], tap: str) -> Any:
        path, _, side = tap.partition(":")
        module = modules[path]

        def keep_input(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            self._keep(tap, inputs[0] if inputs else None)

        def keep_output(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
            self._keep(tap, output)

        if side == "input":
            return module.register_forward_pre_hook(keep_input)
        return module.register_forward_hook(keep_output)

    def _keep(self, tap: str, value: object) -> None:
        self._seen[tap] = (value, _version(value))

    def __call__(self, images: Tensor) -> Outputs:
        """Run the model on ``images`` ``(B, C, H, W)``, compiled if it is and the size fits."""
        said = self.compiled(self, images) if self.compiled else None
        return said or self.run(images)

    def run(self, images: Tensor) -> Outputs:
        """Run the model as it is."""
        self._seen.clear()
        logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ConfigError(
                f"{type(self.model).__name__} returns {_describe(logits)}, not logits (B, K)",
                "wrap it in a module whose forward returns only the logits",
            )
        read = {
            role: tuple(self._read(tap) for tap in taps)
            for role, taps in self.taps.wanted(sorted(self.roles)).items()
        }
        self._seen.clear()
        pooled = read[POOLED][0].flatten(1) if POOLED in read else None
        spatial = read[SPATIAL][0] if SPATIAL in read else None
        return Outputs(_widen(logits), read.get(MAPS, ()), read.get(PREACT, ()), pooled, spatial)

    def _read(self, tap: str) -> Tensor:
        if tap not in self._seen:
            raise ConfigError(f"the module of tap {tap!r} did not run", "tap one that does")
        value, version = self._seen[tap]
        if not isinstance(value, Tensor):
            raise ConfigError(f"tap {tap!r} gives {_describe(value)}", "tap one tensor")
        if _version(value) != version:
            raise ConfigError(
                f"what tap {tap!r} read was changed in place by a later module",
                "make that one not in-place, e.g. ReLU(inplace=False), or tap its output",
            )
        return _widen(as_map(value, tap))

    def close(self) -> None:
        """Remove the hooks; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TappedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def probe(model: nn.Module, taps: Taps, roles: Iterable[str], image: Tensor) -> Shapes:
    """Find the sizes of a model's taps by running it once on ``image`` ``(B, C, H, W)``.

    The model's mode, statistics and gradients are left as they were.
    """
    with eval_mode(model), torch.no_grad(), TappedModel(model, taps, frozenset(roles)) as tapped:
        out = tapped(image)
    return Shapes(
        num_classes=out.logits.shape[1],
        maps=tuple(tuple(m.shape[1:]) for m in out.maps),
        preact=tuple(tuple(m.shape[1:]) for m in out.preact),
        pooled=0 if out.pooled is None else out.pooled.shape[1],
        spatial=() if out.spatial is None else tuple(out.spatial.shape[1:]),
    )


def as_map(value: Tensor, tap: str) -> Tensor:
    """Tokens, or channels that come last, as a map ``(B, C, H, W)``; ``tap`` ends in which it is.

    Raises:
        ConfigError: the tensor has another number of dimensions.
    """
    side = tap.partition(":")[2]
    if side == "nhwc" and value.dim() == 4:
        return value.permute(0, 3, 1, 2)
    if side == "tokens" and value.dim() == 3:
        size = math.isqrt(value.shape[1])
        columns = value[:, -size * size :].transpose(1, 2)
        return columns.reshape(*columns.shape[:2], size, size)
    if side in ("nhwc", "tokens"):
        raise ConfigError(f"tap {tap!r} gives {_describe(value)}", f"leave ':{side}' out")
    return value


def _check_tap(tap: str, modules: dict[str, nn.Module]) -> None:
    path, _, side = tap.partition(":")
    if path not in modules:
        raise ConfigError(f"no module for tap {tap!r}", did_you_mean(path, filter(None, modules)))
    if side not in SIDES:
        sides = ", ".join(repr(side) for side in SIDES if side)
        raise ConfigError(f"tap {tap!r} ends in {side!r}", f"end it in {sides} or nothing")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _version(value: object) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    if torch.compiler.is_compiling():  # the compiler makes a graph without in-place writes
        return 0
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
