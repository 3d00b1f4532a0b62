"""What one epoch logs, summed on the device so that no step waits for the host.

Shapes: B batch.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from smskd.errors import DataError, DivergedError
from smskd.methods.base import Signals, Terms
from smskd.reference import true_class_probability

Row = dict[str, float]
"""What one epoch logs: flat names, plain numbers."""

TCP_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Meter:
    """Sums over one epoch.

    Args:
        epoch: Within the stage, from 1; named in messages.
        sharing: How many stage runs share the time; each is charged its part.
    """

    def __init__(self, epoch: int, sharing: int = 1) -> None:
        self.epoch = epoch
        self.sharing = sharing
        self.started = time.perf_counter()
        self.samples = 0
        self.sums: dict[str, Tensor] = {}
        self.tcp: list[Tensor] = []

    def state(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint within an epoch."""
        return {
            "samples": self.samples,
            "sums": self.sums,
            "tcp": torch.cat(self.tcp) if self.tcp else None,
            "seconds": self._seconds(),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], epoch: int, sharing: int, device: torch.device
    ) -> Meter:
        """Go on from what :meth:`state` returned; the time between does not count."""
        meter = cls(epoch, sharing)
        meter.started -= state["seconds"] * sharing
        meter.samples = state["samples"]
        meter.sums = {name: value.to(device) for name, value in state["sums"].items()}
        meter.tcp = [] if state["tcp"] is None else [state["tcp"].to(device)]
        return meter

    def add(self, signals: Signals, terms: Terms) -> None:
        """Count one batch: loss terms, training accuracy, the teacher's TCP."""
        size = len(signals.labels)
        self.samples += size
        for name, value in terms.items():
            self._sum(f"loss/{name}", value.detach() * size)
        hits = signals.student.logits.detach().argmax(dim=1) == signals.labels
        self._sum("train_top1", hits.sum() * 100.0)
        # A teacher of other classes (features only) has no probability for these labels.
        if signals.teachers and signals.teacher.logits.shape == signals.student.logits.shape:
            self.tcp.append(true_class_probability(signals.teacher.logits, signals.labels))

    def add_weights(self, weights: Tensor) -> None:
        """Count the reference's sample weights ``(B,)``."""
        self._sum("reference/mean_weight", weights.detach().sum())

    def row(self) -> Row:
        """Means over the epoch.

        Raises:
            DivergedError: a loss term's mean is not finite.
            DataError: there was nothing to count.
        """
        if not self.samples:
            raise DataError(
                f"the training data gave no batches in epoch {self.epoch}",
                "pass data that give at least one batch each time",
            )
        means = {name: value.item() / self.samples for name, value in self.sums.items()}
        losses = {name: mean for name, mean in means.items() if name.startswith("loss/")}
        broken = [name.removeprefix("loss/") for name, x in losses.items() if not math.isfinite(x)]
        if broken:
            raise DivergedError(
                f"loss term {' and '.join(broken)} is no longer finite in epoch {self.epoch}",
                "lower the learning rate or the term's weight",
            )
        seconds = self._seconds()
        speed = {"seconds": seconds, "images_per_s": self.samples / seconds}
        return {"loss": sum(losses.values()), **means, **self._tcp_row(), **speed}

    def _tcp_row(self) -> Row:
        if not self.tcp:
            return {}
        tcp = torch.cat(self.tcp)
        places = torch.tensor(TCP_QUANTILES, dtype=tcp.dtype, device=tcp.device)
        quantiles = torch.quantile(tcp, places).tolist()
        named = {f"tcp/q{q:.2f}": v for q, v in zip(TCP_QUANTILES, quantiles, strict=True)}
        return {"tcp/mean": tcp.mean().item(), **named}

    def _seconds(self) -> float:
        return (time.perf_counter() - self.started) / self.sharing

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value
