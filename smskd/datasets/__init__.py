"""Datasets by name: facts that planning reads, and readers that return uint8 arrays.

Importing this needs numpy only; scikit-learn has to be installed where its digits are read. To add
a dataset, write a reader and add a line to :data:`DATASETS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from smskd.datasets.base import (
    Dataset,
    DatasetInfo,
    ImageSet,
    content_sha256,
    split_indices,
)
from smskd.datasets.cifar import CIFAR10, CIFAR100, CifarSpec, load_cifar
from smskd.datasets.digits import INFO as DIGITS_INFO
from smskd.datasets.digits import load_digits
from smskd.errors import unknown_name

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetEntry",
    "DatasetInfo",
    "ImageSet",
    "content_sha256",
    "dataset_info",
    "load_dataset",
    "split_indices",
]

DATA_ENV = "SMSKD_DATA"
DEFAULT_ROOT = Path("data")


@dataclass(frozen=True)
class DatasetEntry:
    """One line of the registry.

    Attributes:
        info: Static facts.
        load: Called with the data folder and whether it may download; reads and checks the data.
    """

    info: DatasetInfo
    load: Callable[[Path, bool], Dataset]


def _cifar(spec: CifarSpec) -> DatasetEntry:
    return DatasetEntry(spec.info, partial(load_cifar, spec))


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(DIGITS_INFO, lambda _root, _download: load_digits()),
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
}


def dataset_info(name: str) -> DatasetInfo:
    """Facts about a dataset; touches no data.

    Raises:
        UnknownNameError: no dataset has this name.
    """
    return _entry(name).info


def load_dataset(name: str, data_root: Path | None, download: bool = False) -> Dataset:
    """Read a dataset into memory and check that it is the published one.

    Args:
        name: A key of :data:`DATASETS`.
        data_root: Folder to look in; None means the environment variable ``SMSKD_DATA``, else
            ``data`` in the working directory.
        download: Fetch the published archive if the files are not there.

    Raises:
        UnknownNameError: no dataset has this name.
        DataError: data missing, truncated or corrupt.
    """
    root = data_root or Path(os.environ.get(DATA_ENV) or DEFAULT_ROOT)
    return _entry(name).load(root, download)


def _entry(name: str) -> DatasetEntry:
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    return DATASETS[name]
