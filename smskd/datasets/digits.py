"""The 1,797 handwritten digits that come with scikit-learn: 8x8, grey, nothing to download.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository;
scikit-learn ships its test part. The file keeps a writer's digits together, so with the first 1,000
images for training and the last 797 for testing, the hands differ: a harder test than a shuffled
one.
"""

from __future__ import annotations

import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smskd.datasets.base import Dataset, DatasetInfo, ImageSet, verify_content
from smskd.errors import DataError

NUM_TRAIN = 1000
INK_LEVELS = 16

INFO = DatasetInfo(
    name="digits",
    num_classes=10,
    channels=1,
    size=8,
    num_train=NUM_TRAIN,
    num_test=797,
    mean=(0.3070,),
    std=(0.3762,),
    pad=1,
    flip=False,
    fingerprint="sha256:0eeb6af4babedd04c011cf32a853fe8cc3d7225ca3b749de98dc653be2833aa6",
)


def load_digits() -> Dataset:
    """Read the digits from the installed scikit-learn.

    Ink from 0 to 16 becomes bytes from 0 to 255, rounded.

    Raises:
        DataError: scikit-learn is missing, or its digits are not the known ones.
    """
    table = _read_table()
    ink, labels = table[:, :-1], table[:, -1].astype(np.int64)
    images = np.rint(ink * (255 / INK_LEVELS)).astype(np.uint8).reshape(-1, 1, INFO.size, INFO.size)
    dataset = Dataset(
        INFO,
        train=ImageSet(images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        test=ImageSet(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
    )
    verify_content(dataset, "reinstall scikit-learn; if its digits changed, report it")
    return dataset


def _read_table() -> NDArray[np.uint8]:
    """64 levels of ink and the class of each digit ``(1797, 65)``.

    From the file itself, as importing scikit-learn takes a second; its checksum is what counts.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError(
            "dataset 'digits' comes with scikit-learn, which is not installed",
            "pip install scikit-learn",
        )
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}", "reinstall scikit-learn") from error
