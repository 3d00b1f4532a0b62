"""A device that broke under a process: nothing more can be computed on it by that process.

After an illegal access, an uncorrectable memory error or a hung kernel, CUDA answers every later
call of the same process with the same error. Another process may well use the device.
"""

from __future__ import annotations

import torch

from smskd.errors import RefusedError

BROKEN_TEXTS = (
    "CUDA error:",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)
"""How torch words it, which has no type of its own for all of these."""

EXIT_STATUS = 70
"""Of a worker process that ends because of it."""


class DeviceFailedError(RefusedError):
    """The device no longer answers this process."""


def is_device_failure(error: Exception) -> bool:
    """Whether every later call of this process would fail too; memory that ran out does not."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in BROKEN_TEXTS)


def device_failed(error: Exception) -> DeviceFailedError:
    """The error for the user, where no other process can take over."""
    words = " ".join(str(error).partition("\n")[0].split())
    return DeviceFailedError(
        f"the device failed: {words}",
        "run the same command again: it goes on from the last checkpoint; if it happens again, "
        "look at nvidia-smi and the system's log",
    )
