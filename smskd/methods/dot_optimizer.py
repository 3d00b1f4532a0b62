"""SGD with one momentum buffer for the label loss and one for the distillation loss.

The update is in :mod:`smskd.methods.dot`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smskd.errors import ConfigError

TASK, DISTILL = "task_momentum", "distill_momentum"
"""Names of the buffers in the optimiser's state; the weight decay goes with the first there is."""

_Pull = tuple[Tensor, Tensor | None, str]
"""A weight, the gradient of one loss for it (None is 0), and which loss's."""


class TwoMomentumSGD(torch.optim.Optimizer):
    """SGD whose step takes the gradients of two losses.

    Args:
        groups: With "params", "lr", "momentum", "weight_decay" and "nesterov".
        delta: Momentum of the distillation loss minus the group's, and that minus the label loss's.

    Raises:
        ConfigError: a momentum would be less than 0, or not less than 1.
    """

    def __init__(self, groups: list[dict[str, Any]], delta: float) -> None:
        for momentum in (group["momentum"] for group in groups):
            if not abs(delta) <= momentum < 1 - abs(delta):
                raise ConfigError(
                    f"dot: delta {delta:g} makes {momentum - delta:g} and {momentum + delta:g} of "
                    f"momentum {momentum:g}, but momenta are at least 0 and less than 1",
                    "choose a smaller delta",
                )
        super().__init__(groups, {"delta": delta})

    @property
    def weights(self) -> list[Tensor]:
        """What is optimised, in the order of the gradients that :meth:`descend` takes."""
        return [weight for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def descend(self, task: Sequence[Tensor | None], distill: Sequence[Tensor | None]) -> None:
        """One step; weights without any gradient stay.

        Args:
            task: Gradient of the label loss for each weight, None where it has none.
            distill: Gradient of the distillation loss.
        """
        gradients = iter(zip(task, distill, strict=True))
        for group in self.param_groups:
            pulls: dict[tuple[bool, float], list[_Pull]] = defaultdict(list)
            for weight in group["params"]:
                found = dict(zip((TASK, DISTILL), next(gradients), strict=True))
                momenta = self._momenta(group, weight, found)
                for i, (name, momentum) in enumerate(momenta.items()):
                    pulls[i == 0, momentum].append((weight, found[name], name))
            # What decays first: it reads the weights, which all others move.
            for (decays, momentum), members in sorted(pulls.items(), reverse=True, key=_order):
                self._move(group, decays, momentum, members)

    def _momenta(
        self, group: dict[str, Any], weight: Tensor, found: dict[str, Tensor | None]
    ) -> dict[str, float]:
        """Momentum of each buffer that moves the weight, with the group's for one alone."""
        if all(gradient is None for gradient in found.values()):
            return {}
        names = [n for n in found if found[n] is not None or n in self.state[weight]]
        spread = group["delta"] if len(names) > 1 else 0.0
        sign = {TASK: -1.0, DISTILL: 1.0}
        return {name: group["momentum"] + sign[name] * spread for name in names}

    def _move(
        self, group: dict[str, Any], decays: bool, momentum: float, members: list[_Pull]
    ) -> None:
        weights = [weight for weight, _, _ in members]
        steps = [torch.zeros_like(w) if g is None else g for w, g, _ in members]
        buffers = [self._buffer(weight, name) for weight, _, name in members]
        if decays and group["weight_decay"]:
            steps = list(torch._foreach_add(steps, weights, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, steps)
        if group["nesterov"]:
            steps = list(torch._foreach_add(steps, buffers, alpha=momentum))
        else:
            steps = buffers
        torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def _buffer(self, weight: Tensor, name: str) -> Tensor:
        state = self.state[weight]
        if name not in state:
            state[name] = torch.zeros_like(weight)
        buffer: Tensor = state[name]
        return buffer


def _order(pull: tuple[tuple[bool, float], list[_Pull]]) -> tuple[bool, float]:
    return pull[0]
