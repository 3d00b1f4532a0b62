"""``smskd-bench import``, and weights of other code as teachers of a matrix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smskd.checkpoints import State, fitted, read_checkpoint
from smskd.datasets import dataset_info
from smskd.datasets.base import DatasetInfo
from smskd.errors import ConfigError, StoreError
from smskd_bench.plan import Plan
from smskd_bench.store import load_weights, save_weights

SUFFIX = ".safetensors"

RECORD = "imported"
"""Entry of the file's metadata that says where the weights are from, as JSON."""


@dataclass(frozen=True)
class ImportRequest:
    """What the user asked for on the command line.

    Attributes:
        file: A checkpoint of ``torch.save``, or a safetensors file.
        model: Name of the model whose weights it holds.
        classes: Classes that it tells apart.
        channels: Channels of its images.
        image_size: Side of its images, for models that are made for one size.
        out: File to write.
    """

    file: Path
    model: str
    classes: int
    out: Path
    channels: int = 3
    image_size: int | None = None


def import_file(request: ImportRequest) -> list[str]:
    """Write the weights of a checkpoint as safetensors; returns what to say about it.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: the file cannot be read, or does not hold such weights; or the result cannot
            be written.
    """
    source, out = request.file, request.out
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"{out} is the file to import", "write the result beside it")
    read = read_weights(source)
    weights = fitted(
        read, request.model, request.classes, request.channels, request.image_size,
        where=str(source),
    )  # fmt: skip
    source_sha = hashlib.sha256(source.read_bytes()).hexdigest()
    record = {
        "source": source.name,
        "source_sha256": source_sha,
        "model": request.model,
        "classes": request.classes,
    }
    try:
        # In one entry: safetensors writes several in any order, and the hash would be a dice throw.
        result_sha = save_weights(out, weights, {RECORD: json.dumps(record)})
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", "see --out") from None
    return [
        f"{request.model} for {request.classes} classes: {len(weights)} tensors, "
        f"{sum(tensor.numel() for tensor in weights.values()):,} values",
        f"{source}  sha256:{source_sha}",
        f"{out}  sha256:{result_sha}",
    ]


def read_weights(file: Path) -> State:
    """Weights by name, from a safetensors file or a checkpoint of ``torch.save``.

    Raises:
        ConfigError: it is neither, or cannot be read.
    """
    if file.suffix != SUFFIX and not _is_safetensors(file):
        return read_checkpoint(file)
    try:
        return load_weights(file)
    except StoreError as error:
        raise ConfigError(error.message, error.hint) from None


def teacher_weights(file: Path, model: str, info: DatasetInfo) -> State:
    """Weights in a file that a matrix names, as the model for its data set takes them.

    Raises:
        ConfigError: they cannot be read, or are of another model or number of classes.
    """
    sizes = info.num_classes, info.channels, info.size
    return fitted(read_weights(file), model, *sizes, where=str(file))


def check_imports(plan: Plan, keys: Iterable[str]) -> None:
    """Refuse weights that could only fail when their turn comes.

    Args:
        plan: Of the matrix.
        keys: Of the stage runs to look at; those that train are none of this one's business.

    Raises:
        ConfigError: as :func:`teacher_weights`.
    """
    for key in keys:
        spec, file = plan.nodes[key], plan.weights.get(key)
        if file is not None:
            teacher_weights(file, spec.model, dataset_info(spec.dataset.name))


def _is_safetensors(file: Path) -> bool:
    """Whether a file begins like one: the length of a header in JSON, and the header."""
    try:
        with file.open("rb") as opened:
            return opened.read(9)[8:] == b"{"
    except OSError:
        return False  # the reader says why
