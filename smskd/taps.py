"""Read features from any ``nn.Module`` by module name, without editing the model.

A *tap* is a module path as in ``named_modules()``: ``"layer2"`` reads that module's output,
``"fc:input"`` its first input. :class:`Taps` says which taps of a model play which role.

Shapes: B batch, K classes, C channels, H and W height and width, D width of the pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smskd.errors import ConfigError, did_you_mean

MAPS, PREACT, POOLED = "maps", "preact", "pooled"


@dataclass(frozen=True)
class Taps:
    """Where the features that distillation methods ask for are found in one model.

    Attributes:
        maps: Feature maps ``(B, C, H, W)`` from the stem (f0) to the last block (fn).
        preact: The same places before their activation; empty if the model has none to offer.
        pooled: Penultimate feature ``(B, D)``, usually ``"<classifier>:input"``.
        classifier: Module path of the last linear layer.
    """

    maps: tuple[str, ...] = ()
    preact: tuple[str, ...] = ()
    pooled: str | None = None
    classifier: str | None = None

    def wanted(self, roles: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Map each role to its tap strings.

        Raises:
            ConfigError: a role is asked for that this model has no tap for.
        """
        have = {
            MAPS: self.maps,
            PREACT: self.preact,
            POOLED: (self.pooled,) if self.pooled else (),
        }
        missing = [role for role in roles if not have[role]]
        if missing:
            raise ConfigError(
                f"the model has no tap for {' and '.join(missing)}",
                f"name the modules to read, e.g. Taps({missing[0]}=...)",
            )
        return {role: have[role] for role in roles}


@dataclass(frozen=True)
class Outputs:
    """What one network said about one batch.

    Attributes:
        logits: ``(B, K)``, always float32 or wider.
        maps: Feature maps ``(B, C, H, W)``; empty unless asked for.
        preact: Maps before their activation; empty unless asked for.
        pooled: ``(B, D)``; None unless asked for.
    """

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    preact: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Shapes:
    """Sizes of what one network says, without the batch dimension.

    Attributes:
        num_classes: K.
        maps: One ``(C, H, W)`` a map.
        preact: One ``(C, H, W)`` a map before activation.
        pooled: D, or 0 if not tapped.
    """

    num_classes: int
    maps: tuple[tuple[int, ...], ...] = ()
    preact: tuple[tuple[int, ...], ...] = ()
    pooled: int = 0


@dataclass
class TappedModel:
    """A model together with hooks on the taps that the roles in ``roles`` need.

    Calling it runs the model and returns :class:`Outputs`. Losses want float32, so features that
    autocast made narrower are widened here, once, for every method. Use ``close()`` (or a ``with``
    block) to take the hooks off again.
    """

    model: nn.Module
    taps: Taps
    roles: frozenset[str] = frozenset()
    _seen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _handles: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules())
        for taps in self.taps.wanted(sorted(self.roles)).values():
            for tap in taps:
                self._handles.append(self._hook(modules, tap))

    def _hook(self, modules: dict[str, nn.Module], tap: str) -> Any:
        path, _, side = tap.partition(":")
        if path not in modules or side not in ("", "input", "output"):
            raise ConfigError(
                f"no module for tap {tap!r}", did_you_mean(path, filter(None, modules))
            )
        return modules[path].register_forward_hook(self._keeper(tap, side == "input"))

    def _keeper(self, tap: str, of_input: bool) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[tap] = inputs[0] if of_input else output

        return keep

    def __call__(self, images: Tensor) -> Outputs:
        """Run the model on ``(B, C, H, W)`` and return what the taps read."""
        logits = self.model(images)
        seen, self._seen = self._seen, {}
        read = {
            role: tuple(_widen(seen[tap]) for tap in taps)
            for role, taps in self.taps.wanted(sorted(self.roles)).items()
        }
        pooled = read[POOLED][0].flatten(1) if POOLED in read else None
        return Outputs(_widen(logits), read.get(MAPS, ()), read.get(PREACT, ()), pooled)

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
    was_training = model.training
    model.eval()
    try:
        with TappedModel(model, taps, frozenset(roles)) as tapped, torch.no_grad():
            out = tapped(image)
    finally:
        model.train(was_training)
    return Shapes(
        num_classes=out.logits.shape[1],
        maps=tuple(tuple(m.shape[1:]) for m in out.maps),
        preact=tuple(tuple(m.shape[1:]) for m in out.preact),
        pooled=0 if out.pooled is None else out.pooled.shape[1],
    )


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
