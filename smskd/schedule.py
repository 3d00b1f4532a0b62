"""Splitting a budget of epochs over stages."""

from __future__ import annotations

from smskd.errors import ConfigError


def equal_budget(total: int, num_stages: int) -> tuple[int, ...]:
    """Split ``total`` epochs equally; what is left over goes to the first stages.

    Raises:
        ConfigError: fewer epochs than stages.
    """
    if total < num_stages:
        raise ConfigError(
            f"{total} epochs cannot be split over {num_stages} stages",
            "give every stage at least one epoch",
        )
    share, rest = divmod(total, num_stages)
    return tuple(share + (i < rest) for i in range(num_stages))


def stage_epochs(per_stage: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Epochs of each stage from a list whose last entry repeats: (240, 90) -> 240, 90, 90, ..."""
    last = per_stage[-1]
    return tuple(per_stage[i] if i < len(per_stage) else last for i in range(num_stages))
