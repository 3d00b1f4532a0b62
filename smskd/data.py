"""Training data as a stream of device batches.

:class:`ResidentBatches` keeps a whole data set on the device as uint8 and cuts every batch out of
it with one gather. :class:`LoaderBatches` takes any ``DataLoader``-like iterable instead.

Shapes: N samples, B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smskd.errors import ConfigError, DataError
from smskd.views import Augmentation, draw_order, draw_views


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: ``(B, C, H, W)`` float32.
        labels: ``(B,)``.
        index: Positions in the training set ``(B,)``; -1 if unknown.
        view: Which view of its image each sample shows ``(B,)``; None if unknown.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor | None = None


class Batches(Protocol):
    """A training set that can be walked through, epoch by epoch."""

    @property
    def num_samples(self) -> int:
        """N, or 0 if unknown."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """All batches of one epoch; the same epoch number gives the same batches if possible."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of images in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(B, C, H, W)`` to normalised float32, the operations in torchvision's order.

        The result is channels-last in memory.

        Raises:
            DataError: the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise DataError(
                f"normalisation is for uint8 images, but these are {images.dtype}",
                "leave normalise out: float images are taken as they are",
            )
        batch, channels, height, width = images.shape
        # As rows of pixels: walking along long rows is several times faster than along channels.
        rows = images.permute(0, 2, 3, 1).reshape(batch, -1)
        mean, std = _pixel_constants(self, images.device, height * width)
        floats = rows.float().div_(255.0).sub_(mean).div_(std)
        return floats.view(batch, height, width, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _pixel_constants(
    normalise: Normalisation, device: torch.device, pixels: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every number of an image; kept, as a GPU waits for a copy."""
    mean, std = torch.tensor(normalise.mean), torch.tensor(normalise.std)
    return mean.repeat(pixels).to(device), std.repeat(pixels).to(device)


class ResidentBatches:
    """A training set held on one device, augmented by view index.

    Args:
        images: ``(N, C, H, W)``, uint8 (then ``normalise`` applies) or float32, taken as it is.
        labels: ``(N,)`` integers.
        batch_size: B; the last, smaller batch is kept.
        seed: Decides order and views together with the epoch number.
        normalise: Applied after padding and cropping, so that the border is black, not grey.
        augment: Which views there are.

    Raises:
        DataError: images and labels do not fit together or cannot be trained on as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 64,
        seed: int = 0,
        normalise: Normalisation | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        check_images(images, labels, normalise)
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} samples", "give a batch size of at least 1")
        self.labels = labels.to(images.device, torch.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.images = images
        self.normalise = normalise
        self.augment = augment or Augmentation()
        self._windows = _crop_windows(images, self.augment)

    def of_seed(self, seed: int, batch_size: int) -> ResidentBatches:
        """The same images, shared, in another order and other views."""
        other = copy.copy(self)
        other.seed, other.batch_size = seed, batch_size
        return other

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.labels)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of one epoch in the order and with the views that (seed, epoch) decide."""
        device = self.labels.device
        order = torch.from_numpy(draw_order(self.seed, epoch, self.num_samples)).to(device)
        views = torch.from_numpy(self.views(epoch)).to(device)
        for index in order.split(self.batch_size):
            view = views[index]
            yield Batch(self.cut(index, view), self.labels[index], index, view)

    def views(self, epoch: int) -> NDArray[np.int64]:
        """The view of every sample ``(N,)`` in one epoch."""
        return draw_views(self.seed, epoch, self.num_samples, self.augment.num_views)

    def cut(self, index: Tensor, view: Tensor) -> Tensor:
        """Views ``(B,)`` of samples ``(B,)`` as network-ready float32 images ``(B, C, H, W)``."""
        dy, dx, flip = self.augment.split(view)
        # A mirrored image shows at column 2 * pad - dx what the image itself shows at dx.
        dx = torch.where(flip.bool(), 2 * self.augment.pad - dx, dx)
        pixels = self._windows[index + flip * self.num_samples, dy, dx].permute(0, 3, 1, 2)
        return self.normalise(pixels) if self.normalise else pixels


class LoaderBatches:
    """Any iterable of (images, labels) or (images, labels, index), walked once an epoch.

    Order and augmentation are then the loader's own affair.

    Raises:
        DataError: the loader can be walked only once.
    """

    def __init__(
        self, loader: Iterable[tuple[Tensor, ...]], device: torch.device | str = "cpu"
    ) -> None:
        if isinstance(loader, Iterator):
            raise DataError(
                f"the training data are a {type(loader).__name__}, which ends after one pass",
                "pass something that can be walked through again, such as a DataLoader",
            )
        self.loader = loader
        self.device = torch.device(device)

    @property
    def num_samples(self) -> int:
        """Length of the loader's data set, or 0 if it does not say."""
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) else 0

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """One pass over the loader.

        Raises:
            DataError: it gives something else than (images, labels) or (images, labels, index).
        """
        for batch in self.loader:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise DataError(
                    f"the loader gives a {type(batch).__name__}",
                    "make it give (images, labels) or (images, labels, index)",
                )
            images, labels, *rest = batch
            index = rest[0] if rest else torch.full((len(labels),), -1)
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                index.to(self.device, non_blocking=True),
            )


def check_images(images: Tensor, labels: Tensor, normalise: Normalisation | None) -> None:
    """Refuse images ``(N, C, H, W)`` and labels ``(N,)`` that no network could be given.

    Raises:
        DataError: with what is wrong.
    """
    if images.dim() != 4 or labels.dim() != 1:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise DataError(f"images and labels have shapes {shapes}", "expected (N, C, H, W) and (N,)")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"{len(images)} images but {len(labels)} labels",
            "give one label for each image, and at least one image",
        )
    if normalise is None and not images.is_floating_point():
        raise DataError(
            f"{images.dtype} images without a normalisation",
            "pass normalise=Normalisation(mean, std), or float images",
        )


def _crop_windows(images: Tensor, augment: Augmentation) -> Tensor:
    """All crops of the zero-padded images as a view ``(N, 2*pad+1, 2*pad+1, H, W, C)``.

    With flips, N mirrored images follow the N images: twice the memory, and no flipping later.
    """
    height, width = images.shape[-2:]
    pad = augment.pad
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1).contiguous()
    if augment.flip:
        padded = torch.cat([padded, padded.flip(2)])
    windows: Tensor = padded.unfold(1, height, 1).unfold(2, width, 1)
    return windows.permute(0, 1, 2, 4, 5, 3)
