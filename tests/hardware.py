"""What a test needs of the processor it runs on."""

import pytest
import torch

from smskd.precision import why_not

needs_bf16 = pytest.mark.skipif(
    why_not("bf16", torch.device("cpu")) is not None, reason="this CPU has no bfloat16 arithmetic"
)
EVERY_PRECISION = ["fp32", pytest.param("bf16", marks=needs_bf16)]
