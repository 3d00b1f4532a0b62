"""What all ways of training in the learning benchmark have in common: images, networks, recipe."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.images import DATASET, INFO, RANDOM, TrainImages, load_images
from benchmarks.pair import Pair
from smskd.data import Normalisation, ResidentBatches
from smskd.datasets import load_dataset
from smskd.datasets.base import split_indices
from smskd.evaluate import FixedSet
from smskd.models import build_model
from smskd.seeding import seeded
from smskd.views import Augmentation

SPLIT_SEED = 0
NORMALISE = Normalisation(INFO.mean, INFO.std)
AUGMENT = Augmentation(INFO.pad, INFO.flip)


@dataclass(frozen=True)
class Setting:
    """What is the same for all.

    Attributes:
        pair: ``teacher>student``.
        data_root: Folder with CIFAR-100; None takes random images.
        train_size: Training images, equally many of each class.
        test_size: Test images; None takes all.
        epochs: Of each student.
        teacher_epochs: Of the teacher.
        batch_size: B.
        device: "cpu" or "cuda".
        threads: CPU threads of each process.
    """

    pair: str
    data_root: Path | None
    train_size: int
    test_size: int | None
    epochs: int
    teacher_epochs: int
    batch_size: int
    device: str
    threads: int

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides a result; the folder of the data does not."""
        facts = asdict(self) | {"data_root": self.data_root is not None, "torch": torch.__version__}
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()

    def build(self, model: str, seed: int) -> nn.Module:
        """A network as it is before training."""
        with seeded(seed):
            return build_model(model, INFO.num_classes)

    def student(self, seed: int) -> nn.Module:
        """The student before training."""
        return self.build(Pair.parse(self.pair).student, seed)


@dataclass(frozen=True)
class Images:
    """The images of a setting, on the CPU.

    Attributes:
        train: Training images.
        test: The test set.
    """

    train: TrainImages
    test: FixedSet

    def resident(self, setting: Setting, seed: int) -> ResidentBatches:
        """Our data path on the device, its order and crops decided by ``seed``."""
        images, labels = (x.to(setting.device) for x in (self.train.images, self.train.labels))
        return ResidentBatches(images, labels, setting.batch_size, seed, NORMALISE, AUGMENT)


def images_of(setting: Setting) -> Images:
    """Read and choose them.

    Raises:
        MissingDataError: the folder does not hold CIFAR-100.
    """
    if setting.data_root is None:
        everything = load_images(None)
        chosen = torch.arange(setting.train_size)
        rest = torch.arange(setting.train_size, setting.train_size + (setting.test_size or 0))
        test = FixedSet(everything.images[rest], everything.labels[rest], NORMALISE)
        return Images(_part(everything.images, everything.labels, chosen, RANDOM), test)
    data = load_dataset(DATASET, setting.data_root)
    train = data.train
    index, _ = split_indices(train.labels, INFO.num_classes, setting.train_size, 0, SPLIT_SEED)
    images, labels = (torch.from_numpy(np.asarray(x)) for x in (train.images, train.labels))
    cut = slice(setting.test_size)
    test_images, test_labels = (torch.from_numpy(x) for x in (data.test.images, data.test.labels))
    test = FixedSet(test_images[cut], test_labels[cut], NORMALISE)
    return Images(_part(images, labels, torch.from_numpy(index), DATASET), test)


def state_sha256(model: nn.Module) -> str:
    """Hash of names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _part(images: Tensor, labels: Tensor, index: Tensor, source: str) -> TrainImages:
    return TrainImages(images[index].contiguous(), labels[index], source)
