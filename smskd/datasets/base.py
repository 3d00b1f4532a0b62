"""What a dataset is: images as bytes, facts known without reading them, a hash, seeded splits.

Needs numpy only. Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smskd.errors import ConfigError, DataError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

SPLIT_STREAM = 0x53504C4954
"""Second half of the split generator's key ("SPLIT"), so no other use of a seed shares its bits."""

VERIFIED = "sha256:"
"""A fingerprint that begins so is the content hash, and loading compares it."""


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``, classes from 0.
    """

    images: Bytes
    labels: Indices


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that planning needs; reading them touches no data.

    Attributes:
        name: Name in the registry.
        num_classes: K.
        channels: C.
        size: Height and width in pixels.
        num_train: Training images.
        num_test: Test images.
        mean: Mean of each channel, pixels scaled to 0..1, that recipes subtract.
        std: Standard deviation of each channel, same scale, that recipes divide by.
        pad: Zero pixels a side for the random crop of training images.
        flip: Whether training images are mirrored at random.
        fingerprint: Identity of the content, part of a stage run's key: ``sha256:`` and
            :func:`content_sha256`, or the published archive's checksum if that is all there is.
        version: Raised when a change of the code changes what is read.
    """

    name: str
    num_classes: int
    channels: int
    size: int
    num_train: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    fingerprint: str
    version: int = 1


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory, in its published order."""

    info: DatasetInfo
    train: ImageSet
    test: ImageSet


def content_sha256(dataset: Dataset) -> str:
    """Hash of all images and labels, whatever form they had on disk.

    SHA-256 over, for train then test: a line ``<split> <N> <C> <H> <W>``, the images' bytes in
    order N, C, H, W, then the labels as little-endian int64.
    """
    digest = hashlib.sha256()
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        shape = " ".join(str(n) for n in part.images.shape)
        digest.update(f"{split} {shape}\n".encode())
        digest.update(np.ascontiguousarray(part.images, np.uint8).data)
        digest.update(np.ascontiguousarray(part.labels, "<i8").data)
    return digest.hexdigest()


def verify_content(dataset: Dataset, hint: str) -> None:
    """Compare a dataset with its fingerprint, where that is a content hash.

    Args:
        dataset: What was read.
        hint: What the user can do if it differs.

    Raises:
        DataError: the content is not what the fingerprint says.
    """
    expected = dataset.info.fingerprint
    if not expected.startswith(VERIFIED):
        return
    found = VERIFIED + content_sha256(dataset)
    if found != expected:
        raise DataError(
            f"dataset {dataset.info.name!r} differs from the published one: "
            f"content is {found}, expected {expected}",
            hint,
        )


def split_indices(
    labels: npt.ArrayLike, num_classes: int, train_size: int | None, dev_size: int, seed: int
) -> tuple[Indices, Indices]:
    """Choose training and development images at random, equally many of each class.

    The training set depends on the seed and its own size only, and a smaller one is part of a
    larger one; so is the development set. Every numpy gives the same answer: only the raw bits of
    Philox are used, which numpy promises to keep, unlike its distributions.

    Args:
        labels: ``(N,)``, classes 0 to num_classes - 1.
        num_classes: K.
        train_size: Number of training images, a multiple of K; None takes all that dev leaves,
            whether balanced or not.
        dev_size: Number of development images, a multiple of K or 0.
        seed: From 0 to 2**64 - 1.

    Returns:
        Sorted, disjoint indices ``(train_size,)`` and ``(dev_size,)``.

    Raises:
        ConfigError: sizes or seed cannot be met.
    """
    labels = np.asarray(labels, np.int64)
    num_dev = _per_class("dev_size", dev_size, num_classes)
    num_train = None if train_size is None else _per_class("train_size", train_size, num_classes)
    if train_size == 0:
        raise ConfigError("train_size is 0", "leave train_size out to train on all images")
    _check_room(labels, num_classes, num_train, num_dev)
    shuffled = _shuffle(len(labels), seed)
    of_class = [shuffled[labels[shuffled] == c] for c in range(num_classes)]
    # From both ends, so that neither choice depends on the size of the other.
    dev = np.sort(_join(chosen[:num_dev] for chosen in of_class))
    if num_train is None:
        return np.setdiff1d(np.arange(len(labels)), dev), dev
    train = np.sort(_join(chosen[len(chosen) - num_train :] for chosen in of_class))
    return train, dev


def _per_class(what: str, size: int, num_classes: int) -> int:
    if size < 0 or size % num_classes:
        raise ConfigError(
            f"{what} {size} cannot be shared equally by {num_classes} classes",
            f"give a multiple of {num_classes}, e.g. {max(1, size // num_classes) * num_classes}",
        )
    return size // num_classes


def _check_room(labels: Indices, num_classes: int, num_train: int | None, num_dev: int) -> None:
    counts = np.bincount(labels, minlength=num_classes)
    wanted = num_dev + (num_train or 0)
    rarest = int(counts.argmin())
    if wanted > counts[rarest]:
        raise ConfigError(
            f"the split asks for {wanted} images of each class ({num_train or 0} train, "
            f"{num_dev} dev), but class {rarest} has {counts[rarest]}",
            "lower train_size or dev_size",
        )
    if num_train is None and num_dev * num_classes == len(labels):
        raise ConfigError(f"dev_size {len(labels)} leaves nothing to train on", "lower dev_size")


def _shuffle(count: int, seed: int) -> Indices:
    if not 0 <= seed < 2**64:
        raise ConfigError(f"split seed {seed} is outside 0 to 2**64 - 1", "choose another seed")
    key = np.array([seed, SPLIT_STREAM], np.uint64)
    raw = np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)
    return np.argsort(raw, kind="stable").astype(np.int64)


def _join(parts: Iterable[Indices]) -> Indices:
    return np.concatenate(list(parts))
