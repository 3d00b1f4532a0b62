"""Checkpoints that other code saved with ``torch.save``: read without running them, and checked.

A pickle may run code when it is read; these are read with torch's restricted reader, which makes
tensors and plain values only. The one class allowed beyond is ``argparse.Namespace``, which holds
values and runs nothing: the CRD code (RepDistiller) saves its options so.

The weights may stand at the top or under one of :data:`SECTIONS`, as bare tensors by name; prefixes
that wrappers put before every name are taken off.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smskd.errors import ConfigError
from smskd.models import MODELS, ModelEntry, outline

SECTIONS = ("model", "state_dict", "model_state_dict", "student", "net")
"""Where published checkpoints keep the weights: first those of the CRD and DKD code."""

PREFIXES = ("module.", "_orig_mod.")
"""What ``nn.DataParallel`` and ``torch.compile`` put before every name."""

COUNTER = "num_batches_tracked"
"""Statistic of batch norm that files of torch before 0.4.1 do not have; nothing reads it here."""

NAMED = 3
"""Keys that a message names."""

State = dict[str, Tensor]


def read_checkpoint(path: Path) -> State:
    """The weights in a file of ``torch.save``, by name, on the CPU.

    Args:
        path: The file, of any layout that this module's docstring names.

    Raises:
        ConfigError: it cannot be read, is no such file, would run code, or holds no weights.
    """
    return weights_in(_content(path), str(path))


def weights_in(content: object, where: str) -> State:
    """Find the weights in what a checkpoint holds.

    Raises:
        ConfigError: there are none.
    """
    found = content
    while isinstance(found, Mapping):
        section = next((s for s in SECTIONS if isinstance(found.get(s), Mapping)), None)
        if section is None:
            break
        found = found[section]
    if not isinstance(found, Mapping) or not _is_state(found):
        raise ConfigError(f"no weights by name in {where}: it holds {_describe(content)}", _SAVE)
    return _without_prefix(dict(found))


def fitted(
    state: State, model: str, num_classes: int, in_channels: int = 3,
    image_size: int | None = None, *, where: str = "the file",
) -> State:  # fmt: skip
    """Weights as the zoo's model takes them: in its order, floating point as float32.

    Args:
        state: As :func:`read_checkpoint` gives it.
        model: Name of the model.
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Side of the images, for models that are made for one size.
        where: What to call the weights in a message.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: they are of another model, or of another number of classes, or not finite.
    """
    wanted = _shapes(outline(model, num_classes, in_channels, image_size).state_dict())
    given = {k: v for k, v in state.items() if k in wanted or not k.endswith(COUNTER)}
    if not _fits(given, wanted):
        asked = f"{model} for {num_classes} classes"
        reason, hint = _misfit(given, wanted, model, num_classes)
        raise ConfigError(f"{where} does not hold weights of {asked}: {reason}", hint)
    zero = torch.zeros((), dtype=torch.int64)
    fitting = {key: _as_float32(given.get(key, zero)) for key in wanted}
    broken = [k for k, v in fitting.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ConfigError(f"{where} holds values that are not finite: {_some(broken)}", _OTHER)
    return fitting


_SAVE = "save the weights alone: torch.save({'model': network.state_dict()}, FILE)"
_OTHER = "take another checkpoint"


def _content(path: Path) -> object:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check its path") from None
    if problem := _no_checkpoint(data):
        raise ConfigError(f"{path} is no checkpoint: {problem}", "download it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _unreadable(path, error) from None


def _no_checkpoint(data: bytes) -> str:
    """What the first bytes say against a file; torch's own messages are for programmers."""
    start = data[:512].lstrip().lower()
    if not data:
        return "it is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as servers send for a file that they do not have"
    zipped, pickled = data.startswith(b"PK\x03\x04"), data.startswith(b"\x80")
    return "" if zipped or pickled else "it does not begin as files of torch.save do"


def _unreadable(path: Path, error: Exception) -> ConfigError:
    """A file that is cut or damaged, or that names what the restricted reader does not know."""
    unknown = re.search(r"GLOBAL (\S+)", str(error))
    if not isinstance(error, pickle.UnpicklingError):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = lines[0].partition(". ")[0]
        return ConfigError(f"{path} cannot be read, it is damaged: {what}", "download it again")
    return ConfigError(
        f"{path} is refused: it holds more than tensors and plain values"
        f"{f' ({unknown[1]})' if unknown else ', or it is damaged'}; reading it could run code",
        "where you trust it, read it yourself and save the weights alone: "
        "torch.save({'model': state_dict}, FILE)",
    )


def _is_state(found: Mapping[Any, Any]) -> bool:
    named = (isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    return len(found) > 0 and all(named)


def _without_prefix(state: State) -> State:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _fits(given: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> bool:
    shapes = _shapes(given)
    missing = {key: shape for key, shape in wanted.items() if key not in shapes}
    return shapes | missing == dict(wanted) and all(key.endswith(COUNTER) for key in missing)


def _as_float32(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()


def _misfit(
    given: State, wanted: Mapping[str, tuple[int, ...]], model: str, num_classes: int
) -> tuple[str, str]:
    """Why weights do not fit, and what they fit."""
    fits = {name: (count, channels) for name, count, channels in _fitting_models(given)}
    count = fits.get(model, (num_classes, 0))[0]
    if count != num_classes:
        return f"they are for {count} classes", f"say {count}, or take another checkpoint"
    shapes = _shapes(given)
    missing = [k for k in wanted if k not in shapes and not k.endswith(COUNTER)]
    strange = [k for k in shapes if k not in wanted]
    other = [k for k in wanted if k in shapes and shapes[k] != wanted[k]]
    parts = ((missing, "missing"), (strange, "unknown"), (other, "of another size"))
    reason = "; ".join(f"{what}: {_some(keys)}" for keys, what in parts if keys)
    names = [
        f"{name} for {count} classes and {channels}-channel images"
        for name, (count, channels) in fits.items()
    ]
    fit = " or ".join(names) or "no model of the zoo (but for what needs an extra)"
    return reason, f"they fit {fit}"


def _fitting_models(given: State) -> Iterator[tuple[str, int, int]]:
    """Models of the zoo, numbers of classes and channels of the images that the weights fit."""
    first = next((v for v in given.values() if v.dim() == 4), None)
    for name, entry in MODELS.items():
        count = _count_classes(given, entry)
        if not count or first is None or entry.extra:
            continue
        wanted = _shapes(outline(name, count, first.shape[1]).state_dict())
        if _fits(given, wanted):
            yield name, count, first.shape[1]


def _count_classes(given: State, entry: ModelEntry) -> int:
    """Rows of the classifier, or 0 if there is none of this model's."""
    weight = given.get(f"{entry.found_taps().classifier}.weight")
    return 0 if weight is None or weight.dim() != 2 else weight.shape[0]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"the entries {_some([str(key) for key in content])}" if content else "nothing"
    return f"a {type(content).__name__}"
