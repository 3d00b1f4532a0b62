"""How a GPU computes for a contestant; these settings are global, so each turn sets its own.

Conventional loops switch cudnn's search for the fastest kernel on and leave TF32 convolutions
allowed, as torch does. Ours has both off, as its harness does, so that results repeat.
No effect on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True)
class Numerics:
    """Global settings of torch's CUDA back ends.

    Attributes:
        matmul_tf32: Matrix products in fp32 may round to TF32.
        conv_tf32: Convolutions in fp32 may round to TF32.
        deterministic: Only kernels that give the same bits each time.
        search: cudnn times its kernels and takes the fastest.
    """

    matmul_tf32: bool
    conv_tf32: bool
    deterministic: bool
    search: bool

    def apply(self) -> None:
        """Set them."""
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32
        torch.backends.cudnn.allow_tf32 = self.conv_tf32
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark = self.search


CONVENTIONAL = Numerics(matmul_tf32=False, conv_tf32=True, deterministic=False, search=True)
EXACT = Numerics(matmul_tf32=False, conv_tf32=False, deterministic=True, search=False)
"""What :func:`smskd_bench.worker.pin_numerics` sets."""

TF32 = Numerics(matmul_tf32=True, conv_tf32=True, deterministic=True, search=False)
"""As :data:`EXACT`, but for what precision "tf32" allows (:func:`smskd.precision.tensor_cores`)."""


@contextmanager
def unchanged_numerics() -> Iterator[None]:
    """Give the settings back as they were."""
    before = Numerics(
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    try:
        yield
    finally:
        Numerics(*astuple(before)).apply()
