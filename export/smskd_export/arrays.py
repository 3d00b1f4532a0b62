"""Arrays in files, read with suspicion: never a pickle, and any damage is one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smskd.errors import StoreError


def read_array(path: Path, remedy: str = "export the student again") -> NDArray[Any]:
    """The one array of a ``.npy`` file.

    Args:
        path: The file.
        remedy: What to do if it is damaged.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with path.open("rb") as file:  # numpy leaves a damaged .npz open
            array = np.load(file, allow_pickle=False)
    except Exception as error:  # damaged headers make numpy raise much that it does not document
        raise StoreError(f"{path} is damaged: {error}", remedy) from error
    if not isinstance(array, np.ndarray):
        raise StoreError(f"{path} is damaged: it holds several arrays", remedy)
    return array
