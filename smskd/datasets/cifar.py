"""CIFAR-10 and CIFAR-100, read from the files their authors publish.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html: 60,000 colour images of 32x32 pixels, in two forms.

- Binary: records of one (CIFAR-10) or two label bytes (CIFAR-100: coarse, then fine), then 3,072
  pixel bytes, planes red, green, blue. The authors give no checksums of single files. SHA-1 sums of
  the CIFAR-100 ones are in use and checked here; for CIFAR-10's, sizes, label range and class
  counts are all that can be checked.
- Python: pickles written by Python 2, MD5 sums as used by torchvision. They are read with an
  unpickler that can build numpy arrays and nothing else.

The order of images is the same in both forms.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smskd.datasets.base import Bytes, Dataset, DatasetInfo, ImageSet, Indices, verify_content
from smskd.datasets.download import download_archive
from smskd.errors import DataError, MissingDataError

URL_BASE = "https://www.cs.toronto.edu/~kriz/"
NEXT_STEP = "say where the files are with --data-root DIR or SMSKD_DATA, or add --download"


@dataclass(frozen=True)
class DataFile:
    """One published file.

    Attributes:
        name: File name.
        records: Images in it.
        checksum: ``sha1:`` or ``md5:`` and the hexadecimal sum; empty if none is published.
    """

    name: str
    records: int
    checksum: str = ""


@dataclass(frozen=True)
class Layout:
    """One published form of a dataset.

    Attributes:
        form: How the files are written.
        folder: Name of the folder the archive unpacks to.
        train: Files of the training images, in order.
        test: Files of the test images.
        extra: Files that are not needed, but must not be damaged if they are there.
    """

    form: Literal["binary", "python"]
    folder: str
    train: tuple[DataFile, ...]
    test: tuple[DataFile, ...]
    extra: tuple[DataFile, ...] = ()


@dataclass(frozen=True)
class CifarSpec:
    """Everything that tells one CIFAR from the other.

    Attributes:
        info: Facts about the dataset.
        label_bytes: Label bytes in a binary record; the last one is the class.
        label_key: Key of the classes in a pickle.
        layouts: Published forms, the preferred one first.
        archive_url: What ``--download`` fetches.
        archive_md5: Its checksum.
    """

    info: DatasetInfo
    label_bytes: int
    label_key: str
    layouts: tuple[Layout, ...]
    archive_url: str
    archive_md5: str


CIFAR10 = CifarSpec(
    info=DatasetInfo(
        name="cifar10",
        num_classes=10,
        channels=3,
        size=32,
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        pad=4,
        flip=True,
        fingerprint="archive-md5:c58f30108f718f92721af3b95e74349a",
    ),
    label_bytes=1,
    label_key="labels",
    layouts=(
        Layout(
            form="python",
            folder="cifar-10-batches-py",
            train=(
                DataFile("data_batch_1", 10_000, "md5:c99cafc152244af753f735de768cd75f"),
                DataFile("data_batch_2", 10_000, "md5:d4bba439e000b95fd0a9bffe97cbabec"),
                DataFile("data_batch_3", 10_000, "md5:54ebc095f3ab1f0389bbae665268c751"),
                DataFile("data_batch_4", 10_000, "md5:634d18415352ddfa80567beed471001a"),
                DataFile("data_batch_5", 10_000, "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
            ),
            test=(DataFile("test_batch", 10_000, "md5:40351d587109b95175f43aff81a1287e"),),
            extra=(DataFile("batches.meta", 0, "md5:5ff9c542aee3614f3951f8cda6e48888"),),
        ),
        Layout(
            form="binary",
            folder="cifar-10-batches-bin",
            train=tuple(DataFile(f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
            test=(DataFile("test_batch.bin", 10_000),),
        ),
    ),
    archive_url=URL_BASE + "cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
)

CIFAR100 = CifarSpec(
    info=DatasetInfo(
        name="cifar100",
        num_classes=100,
        channels=3,
        size=32,
        num_train=50_000,
        num_test=10_000,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        pad=4,
        flip=True,
        fingerprint="sha256:14ce0edc389bebaea959cb7a1824fe880964d752fdfd339bcb57d09c44d39adf",
    ),
    label_bytes=2,
    label_key="fine_labels",
    layouts=(
        Layout(
            form="binary",
            folder="cifar-100-binary",
            train=(DataFile("train.bin", 50_000, "sha1:e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),),
            test=(DataFile("test.bin", 10_000, "sha1:8fb6623e830365ff53cf14adec797474f5478006"),),
        ),
        Layout(
            form="python",
            folder="cifar-100-python",
            train=(DataFile("train", 50_000, "md5:16019d7e3df5f24257cddd939b257f8d"),),
            test=(DataFile("test", 10_000, "md5:f0ef6b0ae62326f3e7ffdfab6717acfc"),),
            extra=(DataFile("meta", 0, "md5:7973b15100ade9c7d40fb424638fde48"),),
        ),
    ),
    archive_url=URL_BASE + "cifar-100-binary.tar.gz",
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)


def load_cifar(spec: CifarSpec, data_root: Path, download: bool = False) -> Dataset:
    """Find, check and read a CIFAR dataset.

    Args:
        spec: Which one.
        data_root: Folder that holds the files, or the folder they were published in.
        download: Fetch the published archive into ``data_root`` if no files are there.

    Raises:
        DataError: files missing, unreadable, truncated, corrupt or not the published ones.
    """
    try:
        return _load(spec, data_root, download)
    except OSError as error:
        raise DataError(
            f"dataset {spec.info.name!r}: cannot read {error.filename}: {error.strerror}",
            f"check the path and its permissions, or {NEXT_STEP}",
        ) from error


def _load(spec: CifarSpec, data_root: Path, download: bool) -> Dataset:
    found = _find(spec, data_root)
    if found is None and download:
        download_archive(spec.archive_url, spec.archive_md5, data_root)
        found = _find(spec, data_root)
    if found is None:
        raise MissingDataError(
            f"dataset {spec.info.name!r} not found: {_places(spec, data_root)}", NEXT_STEP
        )
    layout, folder = found
    for file in layout.extra:
        if (folder / file.name).is_file():
            _checked_bytes(folder / file.name, file.checksum)
    dataset = Dataset(
        spec.info,
        train=_read_split(spec, layout.form, folder, layout.train),
        test=_read_split(spec, layout.form, folder, layout.test),
    )
    _check_classes(spec.info, dataset, folder)
    verify_content(dataset, f"remove {folder} and fetch the files again")
    return dataset


def _find(spec: CifarSpec, data_root: Path) -> tuple[Layout, Path] | None:
    """The first complete layout; None if there is nothing; an error if all are incomplete."""
    missing_in: dict[Path, list[str]] = {}
    for layout in spec.layouts:
        needed = [file.name for file in (*layout.train, *layout.test)]
        for folder in (data_root / layout.folder, data_root):
            missing = [name for name in needed if not (folder / name).is_file()]
            if not missing:
                return layout, folder
            if len(missing) < len(needed):
                missing_in[folder] = missing
    if missing_in:
        folder, missing = next(iter(missing_in.items()))
        raise DataError(
            f"dataset {spec.info.name!r} is incomplete: {folder} lacks {', '.join(missing)}",
            f"unpack {spec.archive_url} again, or move {folder} away and add --download",
        )
    return None


def _places(spec: CifarSpec, data_root: Path) -> str:
    forms = " or ".join(
        f"{layout.folder}/ with {', '.join(f.name for f in (*layout.train, *layout.test))}"
        for layout in spec.layouts
    )
    return f"looked in {data_root.absolute()} for {forms}"


def _read_split(spec: CifarSpec, form: str, folder: Path, files: Sequence[DataFile]) -> ImageSet:
    parse = _parse_binary if form == "binary" else _parse_pickle
    parts = [parse(spec, folder / file.name, file) for file in files]
    info = spec.info
    # Concatenating copies, so the arrays are writable and own no part of a whole file.
    images = np.concatenate([pixels for pixels, _ in parts])
    return ImageSet(
        images.reshape(-1, info.channels, info.size, info.size),
        np.concatenate([labels for _, labels in parts]),
    )


def _parse_binary(spec: CifarSpec, path: Path, file: DataFile) -> tuple[Bytes, Indices]:
    record_bytes = spec.label_bytes + _pixels(spec.info)
    expected, size = file.records * record_bytes, path.stat().st_size
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, expected {expected} ({file.records} records of "
            f"{record_bytes}): it is truncated or another file",
            "fetch it again",
        )
    records = np.frombuffer(_checked_bytes(path, file.checksum), np.uint8)
    records = records.reshape(file.records, record_bytes)
    labels = records[:, spec.label_bytes - 1].astype(np.int64)
    return records[:, spec.label_bytes :], labels


def _parse_pickle(spec: CifarSpec, path: Path, file: DataFile) -> tuple[Bytes, Indices]:
    batch = load_restricted_pickle(_checked_bytes(path, file.checksum), path)
    pixels = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get(spec.label_key) if isinstance(batch, dict) else None
    shape = (file.records, _pixels(spec.info))
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape != shape
        or not isinstance(labels, list)
        or len(labels) != file.records
        or not all(isinstance(label, int) for label in labels)
    ):
        raise DataError(
            f"{path} is a pickle, but not of {file.records} images and {spec.label_key!r}",
            "fetch the published file again",
        )
    return pixels, np.array(labels, np.int64)


def _checked_bytes(path: Path, checksum: str) -> bytes:
    """Read a file whole and compare its checksum, if one is published."""
    content = path.read_bytes()
    algorithm, _, expected = checksum.partition(":")
    if not checksum:
        return content
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is corrupt or not the published file: {algorithm.upper()} is {found}, "
            f"expected {expected}",
            "remove it and fetch it again",
        )
    return content


def _check_classes(info: DatasetInfo, dataset: Dataset, folder: Path) -> None:
    """Every class must be there equally often, as published."""
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        counts = np.bincount(part.labels, minlength=info.num_classes)
        each = len(part.labels) // info.num_classes
        if len(counts) > info.num_classes or (counts != each).any():
            raise DataError(
                f"the {split} labels in {folder} are damaged: expected {each} images of each of "
                f"{info.num_classes} classes, found classes 0 to {len(counts) - 1} with "
                f"{counts.min()} to {counts.max()} images",
                "remove the files and fetch them again",
            )


def _pixels(info: DatasetInfo) -> int:
    return info.channels * info.size**2


def load_restricted_pickle(content: bytes, path: Path) -> Any:
    """Read a pickle that may hold plain values and numpy arrays, and nothing that runs code.

    Args:
        content: The pickle.
        path: Where it came from, for messages.

    Raises:
        DataError: it names anything else, or is damaged.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path} cannot be read as a pickle of arrays: {error}",
            "do not use this file; fetch the published one",
        ) from error


# What rebuilds an array, obtained from numpy itself: its home has moved between versions.
_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]

_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse every name but those that rebuild arrays."""
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which is not allowed"
            ) from None
