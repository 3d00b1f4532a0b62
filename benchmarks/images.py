"""The training images of a benchmark: CIFAR-100 if it is here, else random ones of its shape.

The time of a step does not depend on what the images show.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smskd.datasets import dataset_info, load_dataset
from smskd.errors import MissingDataError

DATASET = "cifar100"
RANDOM = "random uint8"


@dataclass(frozen=True)
class TrainImages:
    """A training set in memory.

    Attributes:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        source: What the images are, for the record.
    """

    images: Tensor
    labels: Tensor
    source: str


INFO = dataset_info(DATASET)
DIGITS = dataset_info("digits")


def load_images(data_root: Path | None) -> TrainImages:
    """Read CIFAR-100 from ``data_root``; random images if that is None.

    Raises:
        MissingDataError: a folder was named, but it does not hold CIFAR-100.
        DataError: the files are damaged.
    """
    if data_root is None:
        return _random_images()
    try:
        train = load_dataset(DATASET, data_root).train
    except MissingDataError as error:
        raise MissingDataError(
            error.message, "leave --data-root out to measure with random images"
        ) from error
    return TrainImages(torch.from_numpy(train.images), torch.from_numpy(train.labels), INFO.name)


def load_digits() -> TrainImages:
    """The 8x8 digits that are always here: 1,000 grey images of 10 classes."""
    train = load_dataset(DIGITS.name, None).train
    return TrainImages(torch.from_numpy(train.images), torch.from_numpy(train.labels), DIGITS.name)


def _random_images() -> TrainImages:
    generator = torch.Generator().manual_seed(0)
    shape = (INFO.num_train, INFO.channels, INFO.size, INFO.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, INFO.num_classes, shape[:1], generator=generator)
    return TrainImages(images, labels, RANDOM)
