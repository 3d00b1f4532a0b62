"""A data set as a worker trains on it: on its device, split as a specification says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smskd.data import Normalisation, ResidentBatches
from smskd.datasets import load_dataset
from smskd.datasets.base import Dataset, split_indices
from smskd.errors import StoreError
from smskd.evaluate import FixedSet
from smskd.views import Augmentation
from smskd_bench.spec import DataSpec

SMALL_BATCH = 100


@dataclass(frozen=True)
class LoadedData:
    """A data set on the device, split as a specification says."""

    dataset: Dataset
    train_images: Tensor
    train_labels: Tensor
    dev: FixedSet | None
    test: FixedSet
    batches: ResidentBatches

    @property
    def normalise(self) -> Normalisation:
        """The data set's own constants."""
        return Normalisation(self.dataset.info.mean, self.dataset.info.std)

    def in_small_batches(self) -> LoadedData:
        """The same data, evaluated with a tenth of the memory."""
        small = replace(self.test, batch_size=SMALL_BATCH)
        dev = replace(self.dev, batch_size=SMALL_BATCH) if self.dev else None
        return replace(self, test=small, dev=dev)

    def one_image(self) -> Tensor:
        """The first training image, network-ready ``(1, C, H, W)``, to find sizes with."""
        return FixedSet(self.train_images[:1], self.train_labels[:1], self.normalise).batch(0, 1)


def load_split(spec: DataSpec, device: str, root: Path | None, download: bool) -> LoadedData:
    """Load a data set, split it, and put it on a device.

    Raises:
        SmskdError: it is not there, damaged, or not the one that the plan was made for.
    """
    dataset = load_dataset(spec.name, root, download)
    if dataset.info.fingerprint != spec.fingerprint:
        raise StoreError(f"{spec.name} is not the data that this plan was made for")
    labels = dataset.train.labels
    train_index, dev_index = split_indices(
        labels, dataset.info.num_classes, spec.train_size, spec.dev_size, spec.split_seed
    )
    normalise = Normalisation(dataset.info.mean, dataset.info.std)

    def on_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device)

    dev = None
    if len(dev_index):
        images = on_device(dataset.train.images[dev_index])
        dev = FixedSet(images, on_device(labels[dev_index]), normalise)
    images, kept = on_device(dataset.train.images[train_index]), on_device(labels[train_index])
    test = FixedSet(on_device(dataset.test.images), on_device(dataset.test.labels), normalise)
    # Padded and mirrored once for all seeds and batch sizes.
    batches = ResidentBatches(images, kept, normalise=normalise, augment=_augmentation(dataset))
    return LoadedData(dataset, images, kept, dev, test, batches)


def _augmentation(dataset: Dataset) -> Augmentation:
    return Augmentation(dataset.info.pad, dataset.info.flip)
