"""The data path that most distillation code has: PIL images, torchvision transforms, a DataLoader.

Transforms and order as in RepDistiller and mdistiller (``dataset/cifar100.py`` in both):
RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize; shuffled; the last smaller
batch kept; no pinned memory; worker processes, if any, start anew in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.images import INFO, TrainImages
from smskd.torchvision_bridge import import_torchvision

PREFETCH_BATCHES = 2
"""Batches that a worker makes ahead, torch's default."""


class PilImages(Dataset[Any]):
    """Images as torchvision's CIFAR100 gives them: a PIL image for each index, then the transform.

    Args:
        data: The training set.
        transform: PIL image to whatever a batch is made of.
    """

    def __init__(self, data: TrainImages, transform: Callable[[Any], Tensor]) -> None:
        self.pixels = np.ascontiguousarray(data.images.permute(0, 2, 3, 1).numpy())
        self.labels: list[int] = data.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def train_transform() -> Callable[[Any], Tensor]:
    """The training transform.

    Raises:
        ConfigError: torchvision is not installed.
    """
    import_torchvision()
    from torchvision import transforms

    composed: Callable[[Any], Tensor] = transforms.Compose(
        [
            transforms.RandomCrop(INFO.size, padding=INFO.pad),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(INFO.mean, INFO.std),
        ]
    )
    return composed


def make_loader(data: TrainImages, batch_size: int, workers: int) -> DataLoader[Any]:
    """The training loader."""
    images = PilImages(data, train_transform())
    return DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=workers)


class Passes(Iterator[Any]):
    """The batches of a loader, pass after pass without end.

    Args:
        loader: Walked through again each time it ends.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self._pass: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):
            if self._pass is None:
                self._pass = iter(self.loader)
            batch = next(self._pass, None)
            if batch is not None:
                return batch
            self._pass = None
        raise StopIteration

    def begin(self) -> None:
        """Begin a new pass, and take the batches that its workers make before anyone waits."""
        self.close()
        for _ in range(self.loader.num_workers * PREFETCH_BATCHES):
            next(self)

    def close(self) -> None:
        """End the pass and its worker processes."""
        self._pass = None


class Steps:
    """The next so many batches of a source, as something with a length.

    Args:
        source: Endless.
        count: How many.
    """

    def __init__(self, source: Iterator[Any], count: int) -> None:
        self.source = source
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (next(self.source) for _ in range(self.count))
