"""Networks of other packages: built untrained, made readable, their taps found by a dry run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from smskd.errors import ConfigError, UnknownNameError, did_you_mean
from smskd.models.auto_taps import auto_taps, not_in_place
from smskd.seeding import seeded
from smskd.taps import Taps

TRIED_SIZES = (64, 128, 224, 256)
"""Sides of the images that taps are looked for with: the smallest that a network takes."""

Build = Callable[..., nn.Module]
"""Called with ``num_classes``, ``in_channels`` and ``image_size``."""


def readable(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` builds, with no activation that works in place.

    Raises:
        ConfigError: the package refuses to build it.
    """
    with _one_message(name):
        return not_in_place(make())


def unknown_network(package: str, name: str, names: Sequence[str]) -> UnknownNameError:
    """The error for a name that a package does not have; of its many, only close ones are told."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = (
        did_you_mean(name, close) if close else f"names are those of {package}, e.g. {names[0]!r}"
    )
    return UnknownNameError(f"{package} has no network {name!r}", hint)


def taps_by_running(name: str, build: Build) -> Taps:
    """The taps of a network, from a dry run at the smallest image that it takes.

    Raises:
        ConfigError: it takes none of them.
    """
    problems = []
    for size in TRIED_SIZES:
        try:
            # Drawing its weights must not move the stream that the caller draws from.
            with seeded(0), _one_message(name):
                model = build(num_classes=10, in_channels=3, image_size=size)
                return auto_taps(model, torch.rand(1, 3, size, size))
        except ConfigError as error:
            problems.append(error)
    raise problems[-1]


@contextmanager
def _one_message(name: str) -> Iterator[None]:
    try:
        yield
    # What these packages raise for a size that does not fit.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{name} cannot be built as asked: {lines[0]}",
            "choose a network that takes images of this size",
        ) from None
