"""Which arithmetic the networks run in; losses and batch-norm statistics stay float32.

"fp32" is float32 throughout. "tf32" lets a GPU round the factors of float32 convolutions and matrix
products to 10 bits. "bf16" runs the networks under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smskd.errors import ConfigError
from smskd.settings import Precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which networks are run."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """Allow a GPU TF32 where, and only where, the precision says so."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def why_not(precision: Precision, device: torch.device) -> str | None:
    """Why a device does not have a precision, or None if it does."""
    if precision == "fp32":
        return None
    if device.type == "cuda":
        return _why_not_cuda(precision, device)
    if precision == "tf32":
        return "TF32 is arithmetic of NVIDIA GPUs from compute capability 8.0 on"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 arithmetic (AVX512 or ARM's BF16)"
    return None


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        ConfigError: with the reason.
    """
    if (reason := why_not(precision, device)) is not None:
        raise ConfigError(
            f"precision {precision!r} is not to be had on {device}: {reason}",
            "use precision: fp32, or another device",
        )


def _why_not_cuda(precision: Precision, device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"{precision} needs compute capability 8.0, this GPU has {major}.{minor}"
